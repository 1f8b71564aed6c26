"""Every extension point of ldm: its signature, shapes and units.  Read this first.

Shapes: B batch, C latent channels, h = H / factor, w = W / factor.  Images are float in [-1, 1].
Diffusion runs in x = z0 + sigma * eps, sigma being the noise level relative to the (normalised) data.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

Denoise = Callable[[Tensor, Tensor], Tensor]  # x (B,C,h,w), sigma () or (B,) -> E[z0 | x] (B,C,h,w)
Noise = Callable[[], Tensor]  # -> standard normal (B,C,h,w), one new draw per call
# image uint8 (B,3,H,W), 3 or the images' channels, or moments (B,M,h,w); map uint8 (B,3,H,W); seen Seen; label (B,);
# id, text list[str]; numbers list[dict]
Batch = dict[str, Any]


class Buildable:
    """A part that remembers its constructor's arguments, so that a model folder can name and rebuild it."""

    init_args: dict[str, Any] = {}  # noqa: RUF012  replaced per instance

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            init, signature = cls.__init__, inspect.signature(cls.__init__)

            @wraps(init)
            def recording_init(self: Any, *args: Any, **kwargs: Any) -> None:
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                if "init_args" not in vars(self):  # the outermost class is the one that can be called again
                    object.__setattr__(self, "init_args", dict(list(bound.arguments.items())[1:]))
                init(self, *args, **kwargs)

            cls.__init__ = recording_init  # type: ignore[method-assign]


@dataclass(frozen=True)
class Cond:
    """What the network is told besides x and t; absent parts are None."""

    vector: Tensor | None = None  # (B, D) added to the time embedding
    tokens: Tensor | None = None  # (B, L, D) attended to
    mask: Tensor | None = None  # (B, L) bool, True where a token counts
    concat: Tensor | None = None  # (B, K, h, w), or (B, K, 1, 1) for the same everywhere, appended to x's channels

    def _zip(self, other: "Cond", join: Callable[[Tensor, Tensor], Tensor]) -> "Cond":
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        return replace(self, **{name: None if a is None else join(a, b) for name, (a, b) in pairs.items()})

    def where(self, keep: Tensor, other: "Cond") -> "Cond":
        """Sample b of self where keep[b] (B, bool), of other elsewhere."""
        return self._zip(other, lambda a, b: torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b))

    def stack(self, other: "Cond") -> "Cond":
        """Both batches one after the other: 2B samples."""
        return self._zip(other, lambda a, b: torch.cat([a, b.expand(len(b), *a.shape[1:])]))

    def __getitem__(self, samples: slice) -> "Cond":
        return self._zip(self, lambda a, _: a[samples])

    def repeat(self, times: int) -> "Cond":
        """Each sample so many times, one after the other."""
        return self._zip(self, lambda a, _: a.repeat_interleave(times, dim=0))


class Posterior(ABC):
    """q(z | x) of an autoencoder, all (B,C,h,w)."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """z for standard normal noise of z's shape."""

    @abstractmethod
    def mode(self) -> Tensor: ...


class Latent(NamedTuple):
    """What training sends from the encoder to the decoder."""

    z: Tensor  # (B,C,h,w)
    penalty: Tensor  # (B,) the regulariser, weighted, per value of the image
    logs: dict[str, Tensor]  # () each


class Bottleneck(Buildable, nn.Module, ABC):
    """What lies between encoder and decoder and regularises the latents, its weight included."""

    channels: int  # C
    moment_channels: int  # M, what the encoder makes for C latent channels
    num_codes: int = 0  # of a discrete latent space; 0: continuous

    @abstractmethod
    def posterior(self, moments: Tensor) -> Posterior:
        """moments (B,M,h,w)."""

    @abstractmethod
    def forward(self, moments: Tensor, noise: Callable[[Tensor], Tensor], values: int) -> Latent:
        """The training path; noise makes standard normal values of its argument's shape; values: 3*H*W of an image."""

    def snap(self, z: Tensor) -> Tensor:
        """z (B,C,h,w) as the decoder may see it: the nearest code where latents are discrete."""
        return z

    def codes(self, z: Tensor) -> Tensor:
        """As Autoencoder.codes."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def after_step(self) -> None:
        """Called after each optimizer step, on all ranks together."""


class Reconstruction(NamedTuple):
    x: Tensor  # (B,3,H,W)
    latent: Latent


class Autoencoder(Buildable, nn.Module, ABC):
    """Images <-> latents.  `moments` is all that a latent cache has to keep of an image."""

    factor: int  # H / h
    channels: int  # C
    image_channels: int = 3
    num_codes: int = 0  # of a discrete latent space; 0: continuous
    pixels: bool = False  # whether the latents are the images themselves

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) in [-1,1] -> parameters (B,M,h,w) of the posterior."""

    @abstractmethod
    def posterior(self, moments: Tensor) -> Posterior: ...

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """z (B,C,h,w) -> x (B,3,H,W); quantises first where the latent space is discrete."""

    def encode(self, x: Tensor) -> Posterior:
        self.require_divisible(x)
        return self.posterior(self.moments(x))

    def forward(self, x: Tensor, noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Reconstruction:
        """The training path of an autoencoder that can be trained; needs `last_layer` for an adaptive adversarial weight."""
        raise NotImplementedError(f"{type(self).__name__} cannot be trained")

    @property
    def last_layer(self) -> Tensor:
        """The weights that make the pixels."""
        raise NotImplementedError(f"{type(self).__name__} has no last layer")

    def codes(self, z: Tensor) -> Tensor:
        """Indices (B,h,w) of the codes nearest to z (B,C,h,w), where latents are discrete."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def after_step(self) -> None:
        """Called after each optimizer step, on all ranks together."""

    def require_divisible(self, x: Tensor) -> None:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(
                f"images of {x.shape[-1]}x{x.shape[-2]} pixels do not divide by the autoencoder's factor {self.factor}: "
                f"choose a size that is a multiple of {self.factor}"
            )


class AutoencoderLoss(Buildable, nn.Module, ABC):
    """A further term of stage 1's reconstruction loss, such as LPIPS; called in fp32."""

    name: str  # in logs
    weight: float = 1.0

    @abstractmethod
    def forward(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """(B,) for images (B,3,H,W) in [-1,1], unweighted."""


class Discriminator(Buildable, nn.Module, ABC):
    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) -> logits (B,1,.,.), high where x looks real."""


class Adversary(Buildable, nn.Module, ABC):
    """The adversarial term of stage 1's loss, from optimizer step `start` on; its parameters are the discriminator's.  In fp32."""

    start: int
    alone: int = 0  # steps from `start` on in which the discriminator learns and the generator does not hear of it
    weight: float  # of the generator's loss

    def check(self, x: Tensor) -> None:
        """Before training: a ValueError if images of the shape of x (B,3,H,W) are none for the discriminator."""

    @abstractmethod
    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """(), unweighted; gradients reach the reconstruction (B,3,H,W), not the discriminator."""

    @abstractmethod
    def scale(self, reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, values: int) -> Tensor:
        """() what the generator's loss is multiplied by besides its weight; `values`: numbers in the batch of images."""

    @abstractmethod
    def discriminator_loss(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(), and figures that tell of the discriminator's health; gradients reach the discriminator alone."""


class ReconstructionMetric(nn.Module, ABC):
    """How close reconstructions come to their images, over all ranks; torchmetrics.Metric has the plumbing."""

    @property
    def made(self) -> dict[str, str | int]:
        """What decides the figures besides the images: of distances between sets `features` (the network's name), `resize`, `rounding`."""
        return {}

    @abstractmethod
    def update(self, reconstruction: Tensor, x: Tensor) -> None:
        """Both (B,3,H,W) in [-1, 1]."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """() each, by name."""

    @abstractmethod
    def reset(self) -> None: ...


class Features(Buildable, nn.Module, ABC):
    """A frozen network in whose features images are compared."""

    name: str  # in results: FD-<name>
    resize: int  # px to which images are resized first, bilinear with antialias

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> (B,D)."""


class NoiseSchedule(Buildable, ABC):
    """T discrete noise levels, increasing: sigma^2 = 1 / alpha_bar - 1."""

    sigmas: Tensor  # (T,) float64

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of the (possibly fractional) step t in [0, T-1]."""

    @abstractmethod
    def t(self, sigma: Tensor) -> Tensor:
        """Inverse of `sigma`."""

    def scale(self, sigma: Tensor) -> Tensor:
        """What x is multiplied by before the network sees it; by default for variance 1, given data of variance 1."""
        return (1 + sigma**2).rsqrt()

    def prior(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The state from which sampling starts at noise level sigma (): the network sees it as N(0, 1) (LDM starts there)."""
        return noise / float(self.scale(sigma))

    @abstractmethod
    def steps(self, n: int | Sequence[float], spacing: str = "trailing") -> Tensor:
        """(n+1,) decreasing noise levels for n steps, or for the given (fractional) steps t, the last one 0."""


class Network(Buildable, nn.Module, ABC):
    """The learned function of stage 2."""

    in_channels: int  # of x, without cond.concat
    frames: int = 1  # T where x is clips: the frames lie one after the other in its channels
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


class Seen(NamedTuple):
    """What a model that works on images is shown of a picture."""

    x: Tensor  # (B,3,H/s,W/s) in [-1,1], s times smaller than the picture
    mask: Tensor | None = None  # (B,1,H,W), 1 where the picture is to be made anew


class Corruption(Buildable, ABC):
    """What is done to training images so that a model learns to undo it, with random numbers of torch's generator."""

    shrinks: int = 1  # how many times smaller the images get
    masks: bool = False  # whether parts of them are hidden

    @abstractmethod
    def see(self, x: Tensor) -> Seen:
        """x (B,3,H,W) in [-1,1]."""


class Conditioner(Buildable, nn.Module, ABC):
    """Batch -> Cond.  `null` is what the network sees when the condition is dropped."""

    num_classes: int = 0  # class labels it knows; 0: it takes none
    takes_text: bool = False
    numbers: Sequence[str] = ()  # the numeric attributes it takes
    shrinks: int = 0  # how many times smaller than the picture the images it takes are; 0: it takes none
    masks: bool = False  # whether it takes masks with them
    vector_dim: int = 0  # D of the vectors it makes; 0: it makes none
    token_dim: int = 0  # D of the tokens it makes; 0: it makes none
    concat_channels: int = 0  # K

    def see(self, batch: Batch) -> Seen | None:
        """What it shows to the network of a training batch's images, where it takes images."""
        return None

    def cache_in(self, folder: str) -> None:
        """Keep in this folder, from now on, what is costly and found again and again, such as the states of texts."""

    @abstractmethod
    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond: ...

    @abstractmethod
    def null(self, batch: Batch) -> Cond: ...

    def asked(self) -> list["Conditioner"]:
        """Itself, or its parts, where users ask for conditions in words, classes or numbers."""
        return [self] if self.num_classes or self.takes_text or self.numbers else []

    def ask(self, label: str | None, text: str, numbers: Mapping[str, float]) -> str | None:
        """What `request` takes for a sample of this class, text and numeric attributes; None where there is nothing to ask for."""
        said = []
        for part in self.asked():
            found = ", ".join(f"{name}={numbers[name]}" for name in part.numbers if name in numbers)
            said.append((label or "") if part.num_classes else text if part.takes_text else found)
        return " | ".join(said) if any(said) else None

    def request(self, wanted: str | int | None, names: list[str]) -> Batch:
        """One sample's batch entries for what a user asks for in words (`names`: the data's class names)."""
        if wanted is None:
            return {}
        raise ValueError(f"this model takes no condition, {wanted!r} was asked for: leave --classes out")


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


class TimeSampler(Buildable, ABC):
    """Which steps are trained how often."""

    @abstractmethod
    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """u (B,) uniform in [0, 1) -> steps t (B,)."""


class Objective(Buildable, ABC):
    teacher: str | None = None  # model folder or checkpoint of a model of the same latents that it learns from
    guidance: "Guidance | None" = None  # of the teacher; None: the one that `predict` uses

    @abstractmethod
    def draw(self, z0: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """noise (B,C,h,w) and steps t (B,) for a training step."""

    @abstractmethod
    def error(self, denoiser: Denoiser, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        """(B,) for the network's output at x = z0 + sigma (B,) * noise."""

    def loss(self, denoiser: Denoiser, z0: Tensor, noise: Tensor, t: Tensor, cond: Cond, teacher: Denoise | None = None) -> Tensor:
        """(B,) for z0, noise (B,C,h,w) and steps t (B,); teacher: the guided D of the teacher for the same batch."""
        sigma = denoiser.schedule.sigma(t)
        x = z0 + sigma.view(-1, *[1] * (z0.ndim - 1)).to(z0) * noise
        return self.error(denoiser, denoiser.raw(x, sigma, cond), x, z0, sigma)


class Guidance(Buildable, ABC):
    @property
    def second(self) -> str | None:
        """Model folder or checkpoint of a second model that it wants."""
        return None

    classifies: ClassVar[bool] = False  # whether that is a classifier, for whose sake a model without classes may be asked for one

    @abstractmethod
    def guide(self, predict: Callable[[Tensor, Tensor, Cond], Tensor], cond: Cond, null: Cond, second: Denoise | None = None) -> Denoise:
        """second: what the second model's `guiding` makes of the same batch.  sigma is () or (B,)."""


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


class Given(NamedTuple):
    """Images that a task works on."""

    y: Tensor  # (B,3,.,.) in [-1,1], as they were given
    x: Tensor  # (B,3,H,W) the same at the size of the picture
    mask: Tensor  # (B,1,H,W), 1 where the picture is to be made anew, 0 where x stays
    z0: Tensor  # (B,C,h,w) latents of x
    plain: Denoise  # D without guidance, for what x shows
    to_images: Callable[[Tensor], Tensor]  # latents -> images, with gradients
    other: Tensor | None = None  # (B,C,h,w) latents of a second image
    share: Tensor | None = None  # (B,) of it


class Task(Buildable, ABC):
    """What any trained model can do with given images: where sampling starts, and what D may say on the way."""

    @property
    def shrinks(self) -> int:
        """How many times smaller than the picture the given image is."""
        return 1

    def canvas(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,3,H,W) and mask (B,1,H,W) as the user gave them -> at the size of the picture."""
        return x, mask

    def start(self, given: Given, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """The first state and the noise levels from there; by default pure noise and all of them."""
        return schedule.prior(noise(), sigmas[0]), sigmas

    def wrap(self, denoise: Denoise, given: Given) -> Denoise:
        return denoise

    def finish(self, pictures: Tensor, given: Given) -> Tensor:
        """The pictures (B,3,H,W) as the user gets them."""
        return pictures


class TrainingData(ABC):
    """What stage 2 asks of a data module besides its loaders; data.ImageData is one."""

    classes: list[str]
    has_texts: bool  # whether any image has one
    numbers: list[str]  # the numeric attributes of any image
    size: int
    channels: int  # of the images
    window: tuple[float, float] | None = None  # values of images with more than 8 bits that are black and white
    cache: str | None = None  # folder for latents, and for what conditioners keep
    with_images: bool = False  # whether batches have the images even where they have cached moments

    @abstractmethod
    def cache_latents(self, moments: Callable[[Tensor], Tensor], key: str, device: torch.device) -> None:
        """Where a cache is configured: write moments(x) of every training image and its mirror image once, all ranks
        together (key: the autoencoder's hash), and load from it from now on."""

    @abstractmethod
    def share(self) -> Iterator[Batch]:
        """This rank's share of the training images, each once, in order."""
