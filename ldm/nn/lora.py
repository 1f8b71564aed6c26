"""Low-rank adaptation of a trained network (LoRA, arXiv:2106.09685), as a parametrisation of its weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ldm.errors import UserError


class LowRank(nn.Module):
    """weight -> weight + scale * up @ down, for a weight of any shape (outs, ...); zero at first."""

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        ins = weight[0].numel()
        rank = min(rank, ins, len(weight))
        self.down = nn.Parameter(torch.randn(rank, ins, device=weight.device) / ins**0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))
        self.register_buffer("scale", torch.tensor(alpha / rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * self.up @ self.down).view_as(weight)


def adapt(network: nn.Module, rank: int, alpha: float, layers: Sequence[str]) -> list[str]:
    """Freeze the network and add a low rank to its linear and convolutional layers whose name has one of `layers` in it (none: to all);
    returns their names."""
    if rank < 1:
        raise UserError(f"LoRA's rank is {rank}; allowed is 1 or more")
    network.requires_grad_(False)
    known = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    chosen = {name: module for name, module in known.items() if not layers or any(part in name for part in layers)}
    if not chosen:
        parts = sorted({part for name in known for part in name.split(".") if not part.isdigit()})
        raise UserError(f"no layer's name has any of {list(layers)} in it; their parts are {', '.join(parts)}")
    for module in chosen.values():
        register_parametrization(module, "weight", LowRank(module.weight, rank, alpha))
    return list(chosen)
