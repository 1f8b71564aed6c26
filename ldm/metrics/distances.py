"""Distances between two sets of feature vectors."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.files import replacing


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D,D) of the features of n images, float64, and how they were made."""

    mean: Tensor
    covariance: Tensor
    n: int
    made: dict[str, str | int]  # features, resize, rounding, size, ...

    @classmethod
    def of(cls, features: Tensor, made: dict[str, str | int] | None = None) -> "Statistics":
        """features (N,D), N >= 2."""
        if len(features) < 2:
            raise UserError(f"a distance between sets of images needs at least 2 of each, {len(features)} were given")
        features = features.double()
        dim = features.shape[1]
        return cls(features.mean(0), features.T.cov().reshape(dim, dim), len(features), made or {})

    def save(self, path: str | Path) -> None:
        facts = {key: json.dumps(value) for key, value in asdict(self).items() if key in ("n", "made")}
        with replacing(Path(path)) as temporary:
            safetensors.torch.save_file({"mean": self.mean, "covariance": self.covariance.contiguous()}, temporary, facts)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        try:
            with safetensors.safe_open(path, "pt") as file:  # type: ignore[attr-defined]
                facts = {key: json.loads(value) for key, value in file.metadata().items()}
                found = cls(file.get_tensor("mean").double(), file.get_tensor("covariance").double(), **facts)
            (dim,) = found.mean.shape
            fits = found.covariance.shape == (dim, dim) and isinstance(found.n, int) and found.n >= 2 and isinstance(found.made, dict)
            if not (fits and found.mean.isfinite().all() and found.covariance.isfinite().all()):
                raise ValueError("no statistics")
            return found
        except (safetensors.SafetensorError, AttributeError, TypeError, ValueError, RecursionError) as error:  # type: ignore[attr-defined]
            raise UserError(f"{path} does not hold statistics that `ldm evaluate --save` wrote") from error


def frechet_distance(a: Statistics, b: Statistics) -> Tensor:
    """() |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (arXiv:1706.08500), by symmetric eigenvalues in float64."""
    if different := sorted(key for key in a.made.keys() | b.made.keys() if a.made.get(key) != b.made.get(key)):
        key = different[0]
        one, other = a.made.get(key), b.made.get(key)
        raise UserError(f"two sets of features made with {key} {one!r} and {other!r} cannot be compared: make them alike")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return distance.clamp(min=0)  # below 0 by rounding alone


def kernel_distance(a: Tensor, b: Tensor) -> Tensor:
    """() KID (arXiv:1801.01401): unbiased squared MMD with the kernel (x.y/D + 1)^3 of features (N,D) and (M,D); can be below 0.

    Over all pairs at once, not averaged over random subsets.
    """
    a, b = a.double(), b.double()

    def total(x: Tensor, y: Tensor) -> Tensor:
        parts = [((part @ y.T / x.shape[1] + 1) ** 3).sum() for part in x.split(1024)]  # all pairs of 50,000 need 20 GB
        return torch.stack(parts).sum()

    def among(x: Tensor) -> Tensor:
        alone = (x.square().sum(1) / x.shape[1] + 1) ** 3
        return (total(x, x) - alone.sum()) / (len(x) * (len(x) - 1))

    return among(a) + among(b) - 2 * total(a, b) / (len(a) * len(b))
