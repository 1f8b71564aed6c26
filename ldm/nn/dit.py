"""The diffusion transformer DiT (arXiv:2212.09748), with the changes that its successors agreed on as options."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError, require_at_least
from ldm.interfaces import Cond, Network, required
from ldm.nn.attention import timestep_embedding
from ldm.nn.blocks import zero

FREQUENCIES = 256  # of the time embedding


def positions(h: int, w: int, device: torch.device) -> Tensor:
    """(h*w, 2): column and row of each patch."""
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1).float()


def sin_cos(places: Tensor, dim: int) -> Tensor:
    """places (L,2) -> (L,dim): sines and cosines of the column, then of the row."""
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, device=places.device) / (dim // 4))
    angles = places[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of x (B,heads,L,D): half of the pairs turn with the column, half with the row."""
    frequencies = 100.0 ** -(torch.arange(x.shape[-1] // 4, device=x.device) / (x.shape[-1] // 4))
    angles = (places[:, :, None] * frequencies).flatten(1)
    cos, sin, (a, b) = angles.cos().to(x), angles.sin().to(x), x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class GELU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.wide(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv:2002.05202) with as many weights as GELU's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = int(4 * dim * 2 / 3 + 7) // 8 * 8
        self.wide, self.out = nn.Linear(dim, 2 * width), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        values, gate = self.wide(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * values)


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the embedding; starts as the identity (adaLN-zero)."""

    def __init__(self, dim: int, heads: int, rope: bool, qk_norm: bool, swiglu: bool) -> None:
        super().__init__()
        self.heads, self.rope = heads, rope
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = zero(nn.Linear(dim, 6 * dim))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))
        self.feed_forward = SwiGLU(dim) if swiglu else GELU(dim)

    def attend(self, x: Tensor, places: Tensor) -> Tensor:
        q, k, v = (a.unflatten(2, (self.heads, -1)).transpose(1, 2) for a in self.qkv(x).chunk(3, dim=2))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, places), rotate(k, places)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, embedding: Tensor, places: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(F.silu(embedding))[:, None].chunk(6, dim=2)
        x = x + gate_a * self.attend(torch.addcmul(shift_a, self.norm(x), 1 + scale_a), places)
        return x + gate_f * self.feed_forward(torch.addcmul(shift_f, self.norm(x), 1 + scale_f))


class DiT(Network):
    """F(x, t, cond): x (B, in_channels, h, w) [+ cond.concat], h and w divisible by patch.  Any size: positions are computed.

    vector_dim > 0: cond.vector joins the time embedding.  position: "sincos" as published or "rope".  recompute: blocks keep only their
    input and run again in backward.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 2,
        vector_dim: int | None = None,
        concat_channels: int | None = None,
        position: Literal["sincos", "rope"] = "sincos",
        qk_norm: bool = False,
        swiglu: bool = False,
        learn_variance: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        in_channels, vector_dim, concat_channels = required(in_channels, "the DiT's in_channels"), vector_dim or 0, concat_channels or 0
        require_at_least(1, dim=dim, heads=heads, depth=depth, patch=patch)
        if dim % heads or dim // heads % 4 or dim % 4:
            raise UserError(f"a DiT of width {dim} with {heads} heads; allowed are heads of a multiple of 4 channels that fill the width")
        self.in_channels, self.vector_dim, self.dim, self.patch = in_channels, vector_dim, dim, patch
        self.multiple = patch
        self.concat_channels, self.position = concat_channels, position
        self.learn_variance, self.recompute = learn_variance, recompute
        self.time_embed = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.vector_embed = nn.Linear(vector_dim, dim) if vector_dim else None
        self.stem = nn.Linear((in_channels + concat_channels) * patch**2, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, position == "rope", qk_norm, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation, self.head = zero(nn.Linear(dim, 2 * dim)), zero(nn.Linear(dim, in_channels * (1 + learn_variance) * patch**2))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if x.shape[-1] % self.patch or x.shape[-2] % self.patch:
            raise UserError(
                f"latents of {x.shape[-1]}x{x.shape[-2]} do not divide by this DiT's patch {self.patch}: choose another image size"
            )
        embedding = self.time_embed(timestep_embedding(t, FREQUENCIES).to(x.dtype))
        if self.vector_embed is not None:
            embedding = embedding + self.vector_embed(cond.vector)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat.expand(len(x), -1, *x.shape[2:])], dim=1)
        patches = F.pixel_unshuffle(x, self.patch)
        places = positions(patches.shape[2], patches.shape[3], x.device)
        h = self.stem(patches.flatten(2).transpose(1, 2))
        if self.position == "sincos":
            h = h + sin_cos(places, self.dim).to(h)
        for block in self.blocks:
            if self.recompute and self.training and torch.is_grad_enabled():
                h = checkpoint(block, h, embedding, places, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, embedding, places)
        shift, scale = self.modulation(F.silu(embedding))[:, None].chunk(2, dim=2)
        h = self.head(torch.addcmul(shift, self.norm(h), 1 + scale))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, patches.shape[2:]), self.patch)
