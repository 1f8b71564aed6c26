"""Stage 2: noise levels, networks, objectives, guidance, samplers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ldm.draws import Draws
from ldm.interfaces.core import Buildable, Cond, Denoise, Noise


class NoiseSchedule(Buildable, ABC):
    """T discrete noise levels, increasing: sigma^2 = 1 / alpha_bar - 1."""

    sigmas: Tensor  # (T,) float64

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of the (possibly fractional) step t in [0, T-1]."""

    @abstractmethod
    def t(self, sigma: Tensor) -> Tensor:
        """Inverse of `sigma`."""

    @abstractmethod
    def scale(self, sigma: Tensor) -> Tensor:
        """Factor by which x is multiplied before the network sees it."""

    @abstractmethod
    def prior(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The state from which sampling starts at noise level sigma (): the network sees it as N(0, 1) (LDM starts there)."""

    @abstractmethod
    def steps(self, n: int | Sequence[float], spacing: str = "trailing") -> Tensor:
        """(n+1,) decreasing noise levels for n steps, or for the given (fractional) steps t, the last one 0."""


class Network(Buildable, nn.Module, ABC):
    """The learned function of stage 2."""

    in_channels: int  # of x, without cond.concat
    frames: int = 1  # T where x is clips: the frames lie one after the other in its channels
    multiple: int = 1  # of which h and w have to be multiples
    vector_dim: int = 0  # D of cond.vector; 0: it takes none
    token_dim: int = 0  # D of cond.tokens; 0: it takes none
    concat_channels: int = 0  # K of cond.concat; 0: it takes none
    learn_variance: bool = False  # twice the channels come out, the second half says how large the reverse process' variances are

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x (B,C,h,w), t (B,) float32 in schedule steps -> (B,C,h,w), or (B,2C,h,w) with learn_variance."""


class Classifier(Buildable, nn.Module, ABC):
    """Tells the class of noisy latents."""

    in_channels: int
    num_classes: int

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B,C,h,w), t (B,) as a Network's -> logits (B, num_classes)."""


class Denoiser(nn.Module, ABC):
    """A network with its noise schedule and prediction type; sigma is () or (B,)."""

    schedule: NoiseSchedule

    @abstractmethod
    def raw(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The network's own output (B,C,h,w), its F, or (B,2C,h,w) where it learns variances: F comes first."""

    @abstractmethod
    def z0(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """E[z0 | x] = c_skip(sigma) * x + c_out(sigma) * F, for the network's output."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """E[z0 | x]."""
        return self.z0(x, sigma, self.raw(x, sigma, cond))

    @abstractmethod
    def target(self, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        """The F for which `predict` gives z0."""

    @abstractmethod
    def output_weight(self, sigma: Tensor) -> Tensor:
        """c_out^2: turns a weight on the error of z0 into one on the error of F."""


class TimeSampler(Buildable, ABC):
    """Which steps are trained how often."""

    @abstractmethod
    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """u (B,) uniform in [0, 1) -> steps t (B,)."""


class Objective(Buildable, ABC):
    """The loss of stage 2 for given data, noise and steps."""

    teacher: str | None = None  # model folder or checkpoint of a model of the same latents that it learns from
    guidance: "Guidance | None" = None  # of the teacher; None: the one with which it is sampled

    @abstractmethod
    def draw(self, z0: Tensor, schedule: NoiseSchedule, draws: Draws) -> tuple[Tensor, Tensor]:
        """noise (B,C,h,w) and steps t (B,) for a training step."""

    @abstractmethod
    def error(self, denoiser: Denoiser, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        """(B,) for the network's output at x = z0 + sigma (B,) * noise."""

    @abstractmethod
    def loss(self, denoiser: Denoiser, z0: Tensor, noise: Tensor, t: Tensor, cond: Cond, teacher: Denoise | None = None) -> Tensor:
        """(B,) for z0, noise (B,C,h,w) and steps t (B,); teacher: the guided D of the teacher for the same batch."""


Predict = Callable[[Tensor, Tensor, Cond], Tensor]  # x (B,C,h,w), sigma () or (B,), condition -> E[z0 | x]


class Guidance(Buildable, ABC):
    """How predictions with and without the condition become the D that a sampler sees."""

    needs_labels: ClassVar[bool] = False  # its companion is a classifier, for whose sake a model without classes is asked for one

    @property
    def companion(self) -> str | None:
        """Model folder or checkpoint of a second model that it wants."""
        return None

    @abstractmethod
    def guide(self, predict: Predict, cond: Cond, null: Cond, companion: Denoise | None = None) -> Denoise:
        """D for a batch's cond and null; companion: what the second model's `as_companion` makes of the same batch."""


class Sampler(Buildable, ABC):
    """A solver of the reverse process.  It sees D(x, sigma) and noise levels, never a network, text or mask."""

    @property
    def ancestral(self) -> bool:
        """Whether its noise is the posterior's between two successive levels, in whose place a model may have learned another one."""
        return False

    @abstractmethod
    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """Yields x (B,C,h,w) after each of the n steps of sigmas (n+1,); x itself is not changed."""

    def sample(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
        for state in self.steps(denoise, x, sigmas, noise):
            x = state
        return x
