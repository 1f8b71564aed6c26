"""The health of a latent space, over all ranks."""

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
