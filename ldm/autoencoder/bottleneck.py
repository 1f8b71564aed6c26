"""What lies between encoder and decoder: a Gaussian (KL), a codebook (VQ) or a grid (FSQ)."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ldm.devices import full
from ldm.errors import UserError
from ldm.interfaces import Bottleneck, BottleneckOutput, Posterior

Noise = Callable[[Tensor], Tensor]
DISTANCES = 2**26  # between latents and codes that VQ has in memory at once: 256 MiB


@dataclass(frozen=True)
class DiagonalGaussian(Posterior):
    """N(mean, exp(log_variance)), each (B,C,h,w); the log variance is clamped to [-30, 20] as in LDM."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "DiagonalGaussian":
        """moments (B,2C,h,w): means, then log variances."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(-30, 20))

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) (B,) in nats, summed over the latent dimensions (Eq. 10, arXiv:1312.6114)."""
        mean, log_variance = map(full, (self.mean, self.log_variance))
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


class KL(Bottleneck):
    """weight * KL(q || N(0, 1)) in nats / (3*H*W): LDM's 1e-6 on sums over an image means the same here.

    Per latent dimension the KL so counts weight * C / (3 f^2) of what the mean error of a pixel value counts.
    """

    def __init__(self, channels: int = 4, weight: float = 1e-6) -> None:
        super().__init__()
        if channels < 1 or weight < 0:
            raise UserError(f"KL has {channels} channels and weight {weight}; allowed are 1 channel or more and a weight of 0 or more")
        self.channels, self.moment_channels, self.weight = channels, 2 * channels, weight

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.of(moments)

    def forward(self, moments: Tensor, noise: Noise, values: int) -> BottleneckOutput:
        posterior = self.posterior(moments)
        z, kl = posterior.sample(noise(posterior.mean)), posterior.kl()
        return BottleneckOutput(z, self.weight * kl / values, {"kl_per_dim": kl.mean() / z[0].numel()})


@dataclass(frozen=True)
class Deterministic(Posterior):
    """A latent without uncertainty."""

    z: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.z

    def mode(self) -> Tensor:
        return self.z


class Discrete(Bottleneck):
    """Stage 2 sees the encoder's continuous latents, the decoder only codes (as LDM's VQ models, arXiv:2112.10752, section 3.1)."""

    def posterior(self, moments: Tensor) -> Posterior:
        return Deterministic(self.project(moments))

    @abstractmethod
    def project(self, moments: Tensor) -> Tensor:
        """The encoder's output in the space of the codes, (B,C,h,w) both."""

    def logs(self, indices: Tensor) -> dict[str, Tensor]:
        """Perplexity of the codes in this batch, over their number."""
        counts = torch.zeros(self.num_codes, device=indices.device)
        share = counts.index_add_(0, indices.flatten(), torch.ones_like(indices.flatten(), dtype=counts.dtype)) / indices.numel()
        return {"perplexity": torch.special.entr(share).sum().exp() / self.num_codes}


def straight_through(z: Tensor, code: Tensor) -> Tensor:
    """`code` in the forward pass, the identity in the backward pass (arXiv:1308.3432)."""
    return z + (code - z).detach()


class VQ(Discrete):
    """Codes (num_codes, C) that follow the mean of the latents nearest to them (EMA, arXiv:1711.00937, appendix A.1).

    commitment: beta, on the term that draws the encoder to its codes.  decay: of the average; 1 leaves the codes alone.
    restart: a code used less than this share of the average is moved to a random latent of the batch (arXiv:2005.00341); 0 never.
    normalise: latents and codes have length 1 (arXiv:2110.04627).  Statistics are summed over ranks and the batches of a step.
    """

    values: Tensor  # (K,C) the codes
    used: Tensor  # (K,) average number of latents per step
    sums: Tensor  # (K,C) average sum of them

    def __init__(
        self, channels: int = 3, num_codes: int = 8192, commitment: float = 0.25, decay: float = 0.99, restart: float = 0.03,
        normalise: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_codes < 2 or channels < 1 or not 0 <= decay <= 1:
            raise UserError(
                f"a codebook of {num_codes} codes of {channels} channels with decay {decay}; "
                "allowed are 2 codes or more, 1 channel or more, and a decay of 0 to 1"
            )
        self.channels, self.moment_channels, self.num_codes = channels, channels, num_codes
        self.commitment, self.decay, self.restart, self.normalise = commitment, decay, restart, normalise
        values = torch.randn(num_codes, channels)
        self.register_buffer("values", F.normalize(values, dim=1) if normalise else values)
        self.register_buffer("used", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, channels))
        self._seen: list[tuple[Tensor, Tensor]] = []  # latents (N,C) and their codes (N,) since the last step

    def project(self, moments: Tensor) -> Tensor:
        return F.normalize(moments.float(), dim=1) if self.normalise else moments.float()

    def codes(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # half precision finds other codes
            return self._nearest(z)

    def _nearest(self, z: Tensor) -> Tensor:
        rows = z.float().movedim(1, -1).flatten(0, -2)
        offset = self.values.square().sum(1)
        most = max(1, DISTANCES // self.num_codes)
        found = [torch.addmm(offset, part, self.values.T, alpha=-2).argmin(1) for part in rows.split(most)]
        return torch.cat(found).view(z.shape[0], *z.shape[2:])

    def quantize(self, z: Tensor) -> Tensor:
        return F.embedding(self.codes(z), self.values).movedim(-1, 1).contiguous().to(z)

    def forward(self, moments: Tensor, noise: Noise, values: int) -> BottleneckOutput:
        z = self.project(moments)
        indices = self.codes(z.detach())
        code = F.embedding(indices, self.values).movedim(-1, 1).contiguous()
        if self.training:
            self._seen.append((z.detach().movedim(1, -1).flatten(0, -2), indices.flatten()))
        distance = (z - code).square().flatten(1).mean(1)
        return BottleneckOutput(straight_through(z, code), self.commitment * distance, self.logs(indices))

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._seen or self.decay == 1:
            return self._seen.clear()
        latents, indices = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        finite = latents.isfinite().all(1, keepdim=True)  # the optimizer skips such a step, and so do the codes
        seen = torch.zeros(self.num_codes, self.channels + 1, device=latents.device)
        seen.index_add_(0, indices, torch.cat([latents.where(finite, 0), finite], dim=1))
        chosen = torch.randint(len(latents), (self.num_codes,), device=latents.device)
        stray = latents[chosen].where(finite[chosen], self.values)
        if dist.is_initialized():
            dist.all_reduce(seen)
            dist.broadcast(stray, 0)
        self.used.lerp_(seen[:, -1], 1 - self.decay)
        self.sums.lerp_(seen[:, :-1], 1 - self.decay)
        share = self.used.mean()
        dead = self.used < self.restart * share
        self.used.copy_(torch.where(dead, share, self.used))
        self.sums.copy_(torch.where(dead[:, None], stray * share, self.sums))
        used = self.used[:, None]
        values = torch.where(used > 1e-12, self.sums / used, self.values)
        self.values.copy_(F.normalize(values, dim=1) if self.normalise else values)


class FSQ(Discrete):
    """Each channel rounded to one of levels[c] values in [-1, 1]: no codebook, no penalty (arXiv:2309.15505)."""

    levels: Tensor  # (C,1,1)

    def __init__(self, levels: Sequence[int] = (8, 8, 8, 5, 5, 5)) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise UserError(f"FSQ's levels are {list(levels)}; each channel needs at least 2")
        self.channels = self.moment_channels = len(levels)
        self.num_codes = int(torch.tensor(levels).prod())
        self.register_buffer("levels", torch.tensor(levels).view(-1, 1, 1), persistent=False)

    def _grid(self, z: Tensor) -> Tensor:
        """[-1, 1] -> nearest whole number of 0 .. level - 1; of NaN 0, as there is no code for it."""
        return ((z.float().nan_to_num(-1) + 1) / 2 * (self.levels - 1)).round().clamp(min=0).minimum(self.levels - 1)

    def project(self, moments: Tensor) -> Tensor:
        return torch.tanh(moments.float())

    def quantize(self, z: Tensor) -> Tensor:
        return (self._grid(z) / (self.levels - 1) * 2 - 1).to(z)

    def codes(self, z: Tensor) -> Tensor:
        radix = torch.cat([self.levels.new_ones(1, 1, 1), self.levels[:-1].cumprod(0)])
        return (self._grid(z).long() * radix).sum(1)

    def forward(self, moments: Tensor, noise: Noise, values: int) -> BottleneckOutput:
        z = self.project(moments)
        return BottleneckOutput(straight_through(z, self.quantize(z)), z.new_zeros(len(z)), self.logs(self.codes(z.detach())))
