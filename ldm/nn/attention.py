"""Attention over the positions of a feature map, through PyTorch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.blocks import group_norm, zero


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q (B,L,D), k and v (B,S,D), mask (B,S) True where a token counts -> (B,L,D)."""
    q, k, v = (a.unflatten(2, (heads, -1)).transpose(1, 2) for a in (q, k, v))
    attention_mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask).transpose(1, 2).flatten(2)


def attend_within(qkv: Tensor, heads: int, frames: int = 1) -> Tensor:
    """qkv (B*T,L,3*D) -> (B*T,L,D): every position sees all T*L of its clip (3D full attention, arXiv:2408.06072); T = 1 is an image."""
    q, k, v = qkv.unflatten(0, (-1, frames)).flatten(1, 2).chunk(3, dim=2)
    return attend(q, k, v, heads).unflatten(1, (frames, -1)).flatten(0, 1)


class SelfAttention(nn.Module):
    """x + out(attention(norm(x))) over the h*w positions of x (B,C,h,w), or over those of all frames of a clip, x (B*T,C,h,w)."""

    def __init__(self, channels: int, heads: int, zero_init: bool = False, eps: float = 1e-6, frames: int = 1) -> None:
        super().__init__()
        self.heads, self.frames = heads, frames
        self.norm = group_norm(channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        if zero_init:
            zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        mixed = self.out(attend_within(self.qkv(tokens), self.heads, self.frames))
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to tokens, GEGLU feed-forward, each pre-normalised and residual."""

    def __init__(self, channels: int, heads: int, token_dim: int, dropout: float = 0.0, frames: int = 1) -> None:
        super().__init__()
        self.heads, self.frames = heads, frames
        self.norm_self, self.norm_cross, self.norm_ff = (nn.LayerNorm(channels) for _ in range(3))
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.self_out = nn.Linear(channels, channels)
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(token_dim, 2 * channels, bias=False)
        self.cross_out = nn.Linear(channels, channels)
        self.ff_in = nn.Linear(channels, 8 * channels)
        self.ff_out = nn.Linear(4 * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.self_out(attend_within(self.qkv(self.norm_self(x)), self.heads, self.frames)))
        k, v = self.kv(tokens).chunk(2, dim=2)
        x = x + self.dropout(self.cross_out(attend(self.q(self.norm_cross(x)), k, v, self.heads, mask)))
        values, gate = self.ff_in(self.norm_ff(x)).chunk(2, dim=2)
        return x + self.ff_out(self.dropout(values * F.gelu(gate)))


class SpatialTransformer(nn.Module):
    """LDM's transformer over positions with cross-attention to tokens (arXiv:2112.10752, section 3.3)."""

    def __init__(self, channels: int, heads: int, token_dim: int, depth: int = 1, dropout: float = 0.0, frames: int = 1) -> None:
        super().__init__()
        self.norm = group_norm(channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, token_dim, dropout, frames) for _ in range(depth))
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            h = block(h, tokens, mask)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """t (B,) -> (B, dim): cosines, then sines, of t at geometric frequencies (ADM's order, arXiv:2105.05233)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * max_period**-exponents
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))
