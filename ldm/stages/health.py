"""The health of a latent space and of a training, over all ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric


class LatentMoments(Metric):
    """Mean, standard deviation and kurtosis (3 for a Gaussian) of each latent channel; float64."""

    sums: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        self.add_state("sums", torch.zeros(5, channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """z (B,C,h,w)."""
        z = z.double().movedim(1, 0).flatten(1)
        self.sums += torch.stack([z.pow(power).sum(1) for power in range(5)])

    def compute(self) -> dict[str, Tensor]:
        m1, m2, m3, m4 = self.sums[1:] / self.sums[0]
        variance = m2 - m1**2
        kurtosis = (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2
        figures = {"mean": m1, "std": variance.sqrt(), "kurtosis": kurtosis}
        return {f"latent_{name}_{c}": value.float() for name, values in figures.items() for c, value in enumerate(values)}


class LatentSpectrum(Metric):
    """Power of the latents' frequencies in BANDS rings from low to high, relative to white noise of their variance (1 everywhere).

    The higher bands of an autoencoder's latents should not be far above those of natural images: what lies there is hard to predict
    from noise (arXiv:2502.14831).
    """

    BANDS = 4
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, self.BANDS), dist_reduce_fx="sum")  # power, coefficients

    def update(self, z: Tensor) -> None:
        """z (B,C,h,w)."""
        power = torch.fft.fft2(z.float(), norm="ortho").abs().square().mean((0, 1))
        rows, columns = (torch.fft.fftfreq(side, device=z.device) for side in z.shape[2:])
        radius = (rows[:, None].square() + columns.square()).sqrt()
        band = (radius / 0.5 * self.BANDS).ceil().long().sub(1).clamp(0, self.BANDS - 1)
        varies = (radius > 0).float()  # all but the mean
        for i, values in enumerate((power * varies, varies)):
            self.sums[i].index_add_(0, band.flatten(), values.flatten() * len(z))

    def compute(self) -> dict[str, Tensor]:
        power = self.sums[0] / self.sums[1]
        relative = power / (self.sums[0].sum() / self.sums[1].sum())
        return {f"latent_power_{band}": value for band, value in enumerate(relative) if self.sums[1, band]}  # 4x4 latents have no low ones


class LossByLevel(Metric):
    """The mean loss in quarters of the schedule's steps, from the least noise to the most; each `compute` halves what was before."""

    QUARTERS = 4
    sums: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.add_state("sums", torch.zeros(2, self.QUARTERS), dist_reduce_fx="sum")  # losses, samples

    def update(self, share: Tensor, loss: Tensor) -> None:
        """share (B,) in [0, 1) of the steps, loss (B,); what is not finite is left out."""
        quarter, good = (share * self.QUARTERS).long().clamp(0, self.QUARTERS - 1), loss.isfinite()
        self.sums[0].index_add_(0, quarter, torch.where(good, loss, 0).float())
        self.sums[1].index_add_(0, quarter, good.float())

    def compute(self) -> dict[str, Tensor]:
        means = self.sums[0] / self.sums[1]
        self.sums *= 0.5
        return {f"loss_level_{quarter}": value for quarter, value in enumerate(means)}


class CodeUsage(Metric):
    """Of a codebook: the share of the codes used at all, and the perplexity exp(entropy) of their use over their number."""

    counts: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts))

    def compute(self) -> dict[str, Tensor]:
        share = self.counts / self.counts.sum()
        perplexity = torch.special.entr(share).sum().exp()
        return {"codes_used": (self.counts > 0).float().mean(), "code_perplexity": perplexity / len(self.counts)}
