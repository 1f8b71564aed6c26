"""Values on their way to a GPU, which nothing here waits for, their precision, and who reads images for it."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MOST_READERS = 8


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on a device.  From the CPU to a GPU it goes through pinned memory: a plain `.to` would wait until the GPU has done all it has."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def full(x: Tensor) -> Tensor:
    """x in single precision, or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def factor(value: Tensor, x: Tensor) -> Tensor:
    """A value for a product with x (B, ...), in x's precision: () stays where it is, as on the CPU it is an argument of the GPU's kernel,
    for which nothing waits; (B,) becomes (B,1,...) on x's device."""
    if value.ndim == 0:
        return value.to(x.dtype)
    return send(value.view(-1, *[1] * (x.ndim - 1)).to(x.dtype), x.device)


def each(value: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A value () or (B,) for each sample of x (B, ...): (B,) on x's device."""
    if value.ndim == 0 and value.device != x.device:
        return torch.full((len(x),), float(value), dtype=dtype, device=x.device)
    return send(value.to(dtype), x.device).expand(len(x))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readers(device: torch.device, ranks: int = 1) -> int:
    """How many processes should read images for a device: none for a CPU, whose cores are at work already; for each of a machine's GPUs
    its share of the cores, at most MOST_READERS."""
    if device.type != "cuda":
        return 0
    return max(1, min(MOST_READERS, cores() // ranks))


def computing(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context for a precision: 32-true, bf16-mixed, 16-mixed."""
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return nullcontext() if kind is None else torch.autocast(device.type, kind)


def sampling_precision(device: torch.device) -> str:
    """That of pictures where nobody chose one."""
    return "bf16-mixed" if device.type == "cuda" else "32-true"
