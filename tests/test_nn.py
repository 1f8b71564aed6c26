"""Layers, UNet and autoencoder: identities at the start, shapes, gradients, and equality with diffusers after copying weights."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.autoencoder.bottleneck import KL, DiagonalGaussian
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.interfaces import Cond
from ldm.nn.attention import SelfAttention, SpatialTransformer, TransformerBlock, attend, timestep_embedding
from ldm.nn.blocks import Downsample, NormActConv, ResBlock, Upsample, group_norm
from ldm.nn.unet import UNet

quick = settings(deadline=None, max_examples=60)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What a block is before training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_fresh_residual_block_is_the_identity(scale_shift: bool) -> None:
    x, embedding = normal(2, 32, 5, 5), normal(2, 16, seed=1)
    block = ResBlock(32, 32, embed_dim=16, scale_shift=scale_shift, zero_init=True)
    assert torch.equal(block(x, embedding), x)
    assert not torch.equal(randomise(block)(x, embedding), x)
    wider = ResBlock(32, 64, embed_dim=16, scale_shift=scale_shift, zero_init=True)
    assert torch.equal(wider(x, embedding), wider.skip(x))
    assert not torch.equal(ResBlock(32, 32)(x), x), "the autoencoder's blocks do not start as the identity"


def test_fresh_attention_is_the_identity() -> None:
    x, tokens = normal(2, 32, 3, 4), normal(2, 5, 6, seed=1)
    attention = SelfAttention(32, heads=2, zero_init=True)
    assert torch.equal(attention(x), x)
    assert not torch.equal(randomise(attention)(x), x)
    assert not torch.equal(SelfAttention(32, heads=2)(x), x)
    transformer = SpatialTransformer(32, heads=2, token_dim=6, depth=2)
    assert torch.equal(transformer(x, tokens), x)
    assert not torch.equal(randomise(transformer)(x, tokens), x)


@pytest.mark.parametrize("options", [{}, {"vector_dim": 7}, {"token_dim": 6}, {"patch": 2}, {"concat_channels": 2, "scale_shift": False}])
def test_a_fresh_unet_returns_zero(options: dict[str, int]) -> None:
    unet = UNet(3, channels=16, multipliers=(1, 2), num_blocks=1, attention_levels=(1,), **options)
    x, t = normal(2, 3, 8, 8), torch.tensor([0.0, 999.0])
    cond = Cond(vector=normal(2, 7), tokens=normal(2, 4, 6), concat=normal(2, 2, 8, 8) if "concat_channels" in options else None)
    assert torch.equal(unet(x, t, cond), torch.zeros_like(x))
    assert (randomise(unet)(x, t, cond) != 0).all()


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (128, 32), (96, 32), (48, 16), (60, 4), (24, 8), (8, 8), (7, 1)])
def test_group_norm(channels: int, groups: int) -> None:
    norm = group_norm(channels, 1e-3)
    assert (norm.num_groups, norm.eps) == (groups, 1e-3)
    assert norm(normal(2, channels, 3, 3)).shape == (2, channels, 3, 3)


# ---------------------------------------------------------------------------------------------------------------------
# NormActConv: norm and activation are done again in backward, but it is the same function
# ---------------------------------------------------------------------------------------------------------------------


def plain(layer: NormActConv, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """conv3x3(dropout(silu((1 + scale) * norm(x) + shift))), written out."""
    groups = x.unflatten(1, (layer.norm.num_groups, -1))
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
    h = ((groups - mean) / (variance + layer.norm.eps).sqrt()).flatten(1, 2)
    h = h * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    if scale is not None and shift is not None:
        h = h * (1 + scale) + shift
    h = h * torch.sigmoid(h)
    h = F.dropout(h, layer.dropout, layer.training)
    return F.conv2d(h, layer.conv.weight, layer.conv.bias, padding=1)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputing_changes_neither_output_nor_gradients(modulated: bool, dropout: float) -> None:
    layer = randomise(NormActConv(32, 6, 1e-5, dropout)).double().train()
    inputs = [normal(3, 32, 5, 4, seed=1).double().requires_grad_()]
    if modulated:
        inputs += [normal(3, 32, 1, 1, seed=seed).double().requires_grad_() for seed in (2, 3)]
    arguments = (inputs[0], inputs[1] if modulated else None, inputs[2] if modulated else None)
    leaves, probe = [*inputs, *layer.parameters()], normal(3, 6, 5, 4, seed=4).double()

    def run(function: Any) -> list[Tensor]:
        torch.manual_seed(7)  # the same dropout mask
        out = function(*arguments)
        torch.manual_seed(8)  # backward has to bring the first generator state back
        return [out.detach(), *torch.autograd.grad((out * probe).sum(), leaves)]

    recomputed, formula = run(layer), run(lambda *a: plain(layer, *a))
    assert len(recomputed) == 1 + len(leaves)
    for a, b in zip(recomputed, formula, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    stored = run(lambda *a: layer.conv(layer.activated(*a)))
    assert all(torch.equal(a, b) for a, b in zip(recomputed, stored, strict=True)), "bit for bit what it is without recomputing"


def test_evaluation_equals_training_without_dropout() -> None:
    layer, x = randomise(NormActConv(16, 8, 1e-5, dropout=0.5)), normal(2, 16, 4, 4)
    layer.eval()
    torch.testing.assert_close(layer(x), plain(layer, x, None, None), rtol=1e-5, atol=1e-5)
    layer.train()
    assert not torch.allclose(layer(x), plain(layer.eval(), x, None, None)), "training drops"


def test_recomputing_does_not_convolve_twice() -> None:
    layer, flops = randomise(NormActConv(8, 16, 1e-5)), {}
    for training in (True, False):
        layer.train(training)
        with FlopCounterMode(display=False) as counter:
            layer(normal(2, 8, 6, 6).requires_grad_()).sum().backward()
        flops[training] = counter.get_total_flops()
    one_convolution = 2 * (2 * 6 * 6) * 16 * 8 * 9
    assert flops[True] == flops[False] == 3 * one_convolution, "forward, and in backward one for x and one for the weight"


def test_recomputing_keeps_only_the_input() -> None:
    layer, kept = randomise(NormActConv(8, 16, 1e-5)), {}
    for training in (True, False):
        layer.train(training)
        x, found = normal(2, 8, 6, 6).requires_grad_(), []

        def note(tensor: Tensor, found: list[Tensor] = found) -> Tensor:
            found.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x)
        kept[training] = [tensor.data_ptr() == x.data_ptr() for tensor in found if tensor.shape == x.shape]
    assert kept[False] == [True, False, False], "the inputs of norm, silu and convolution"
    assert kept[True] == [True]


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head, with loops."""
    out, d = torch.zeros_like(q), q.shape[2] // heads
    for b, head in itertools.product(range(len(q)), range(heads)):
        part = slice(head * d, head * d + d)
        keep = torch.ones(k.shape[1], dtype=torch.bool) if mask is None else mask[b]
        weights = torch.softmax(q[b, :, part] @ k[b, keep, part].T / math.sqrt(d), dim=1)
        out[b, :, part] = weights @ v[b, keep, part]
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attend(heads: int, masked: bool) -> None:
    q, k, v = normal(2, 5, 8).double(), normal(2, 7, 8, seed=1).double(), normal(2, 7, 8, seed=2).double()
    mask = (
        torch.tensor([[True, False, True, True, False, True, True], [False, False, False, True, False, False, False]]) if masked else None
    )
    torch.testing.assert_close(attend(q, k, v, heads, mask), softmax_attention(q, k, v, heads, mask), rtol=1e-12, atol=1e-12)


def test_self_attention_formula() -> None:
    layer, x = randomise(SelfAttention(8, heads=2, eps=1e-3)).double(), normal(2, 8, 3, 4).double()
    assert layer.norm.eps == 1e-3
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (tokens @ w.T + b for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True))
    mixed = softmax_attention(q, k, v, 2) @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(layer(x), x + mixed.transpose(1, 2).reshape(x.shape), rtol=1e-12, atol=1e-12)


def test_transformer_block_formula() -> None:
    block = randomise(TransformerBlock(8, heads=2, token_dim=5)).double()
    x, tokens = normal(2, 6, 8).double(), normal(2, 4, 5, seed=1).double()
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    h = block.norm_self(x)
    q, k, v = (h @ w.T for w in block.qkv.weight.chunk(3))
    y = x + block.self_out(softmax_attention(q, k, v, 2))
    q, (k, v) = block.q(block.norm_cross(y)), (tokens @ w.T for w in block.kv.weight.chunk(2))
    y = y + block.cross_out(softmax_attention(q, k, v, 2, mask))
    values, gate = block.ff_in(block.norm_ff(y)).chunk(2, dim=2)
    y = y + block.ff_out(values * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))))
    torch.testing.assert_close(block(x, tokens, mask), y, rtol=1e-12, atol=1e-12)


def test_masked_tokens_have_no_influence() -> None:
    unet = randomise(UNet(2, channels=16, multipliers=(1, 2), num_blocks=1, attention_levels=(0, 1), token_dim=6))
    x, t, tokens = normal(2, 2, 8, 8), torch.tensor([3.0, 700.0]), normal(2, 5, 6, seed=1)
    mask = torch.tensor([[True, True, False, False, True], [True, False, True, False, False]])
    out = unet(x, t, Cond(tokens=tokens, mask=mask))
    disturbed = torch.where(mask[:, :, None], tokens, 100 * normal(2, 5, 6, seed=2))
    assert torch.equal(unet(x, t, Cond(tokens=disturbed, mask=mask)), out)
    assert not torch.equal(unet(x, t, Cond(tokens=disturbed)), unet(x, t, Cond(tokens=tokens))), "without a mask they count"
    shorter = unet(x[:1], t[:1], Cond(tokens=tokens[:1, [0, 1, 4]]))
    torch.testing.assert_close(out[:1], shorter, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


@quick
@given(t=st.lists(st.floats(0, 999, width=32), min_size=1, max_size=4), dim=st.integers(2, 65))
def test_timestep_embedding_formula(t: list[float], dim: int) -> None:
    """[cos(t w_0), ..., cos(t w_{n-1}), sin(t w_0), ..., sin(t w_{n-1})], w_i = 10000^(-i / n), n = dim // 2."""
    made = timestep_embedding(torch.tensor(t), dim)
    assert made.shape == (len(t), dim)
    half = dim // 2
    for row, time in zip(made.tolist(), t, strict=True):
        angles = [time * 10_000 ** (-i / half) for i in range(half)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2)
        assert max(abs(a - b) for a, b in zip(row, expected, strict=True)) <= 1e-6 + time * 3e-7, "float32 rounding of the angle"


def test_timestep_embedding_of_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 0.5, 1.0, 17.25, 500.0, 999.0])
    for dim in (8, 33, 128):
        theirs = embeddings.get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        torch.testing.assert_close(timestep_embedding(t, dim), theirs, rtol=0, atol=3e-4)
        torch.testing.assert_close(timestep_embedding(t[:3], dim), theirs[:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_timestep_embedding_of_any_kind_of_number(dtype: torch.dtype) -> None:
    t = torch.tensor([0, 7, 999])
    assert torch.equal(timestep_embedding(t.to(dtype), 8), timestep_embedding(t.float(), 8))


# ---------------------------------------------------------------------------------------------------------------------
# UNet
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("concat_channels", [0, 3])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (2, 1, 3)])
def test_unet_shapes(patch: int, concat_channels: int, multipliers: tuple[int, ...]) -> None:
    levels = range(len(multipliers))
    unet = UNet(5, 8, multipliers, 1, list(levels)[1:], vector_dim=7, concat_channels=concat_channels, patch=patch)
    assert unet.in_channels == 5
    assert unet.multiple == patch * 2 ** (len(multipliers) - 1)
    height, width = 2 * unet.multiple, unet.multiple
    concat = normal(2, concat_channels, height, width) if concat_channels else None
    out = randomise(unet)(normal(2, 5, height, width), torch.tensor([1.0, 9.0]), Cond(vector=normal(2, 7), concat=concat))
    assert out.shape == (2, 5, height, width)
    assert torch.isfinite(out).all()
    assert unet.stem.in_channels == (5 + concat_channels) * patch**2


def attentive(unet: UNet) -> tuple[list[bool], list[bool]]:
    """Which blocks on the way down and up have attention."""
    return tuple([s.attention is not None for s in path if hasattr(s, "attention")] for path in (unet.down, unet.up))  # type: ignore[return-value]


def test_unet_layout() -> None:
    unet = UNet(4, 32, (1, 2, 4), num_blocks=2, attention_levels=(0, 2), head_channels=32)
    down, up = attentive(unet)
    assert down == [True, True, False, False, True, True]
    assert up == [True] * 3 + [False] * 3 + [True] * 3
    assert unet.middle[0].attention.heads == 128 // 32
    assert unet.middle[1].attention is None
    assert UNet(4, 32, (1,), attention_levels=(), head_channels=64).middle[0].attention.heads == 1
    widths = [stage.block.first.conv.out_channels for stage in unet.up]
    assert widths == [128] * 3 + [64] * 3 + [32] * 3
    assert [isinstance(layer, Downsample) for layer in unet.down] == [False, False, True, False, False, True, False, False]
    assert [isinstance(stage.resample, Upsample) for stage in unet.up] == [False, False, True, False, False, True, False, False, False]
    assert {norm.eps for norm in unet.modules() if isinstance(norm, nn.GroupNorm)} == {1e-5}


def test_every_condition_reaches_every_sample_alone() -> None:
    unet = randomise(UNet(2, 16, (1, 2), 1, (1,), vector_dim=4, token_dim=6, concat_channels=1))
    x, t = normal(2, 2, 8, 8), torch.tensor([3.0, 700.0])
    cond = {"vector": normal(2, 4), "tokens": normal(2, 3, 6), "concat": normal(2, 1, 8, 8)}
    unet.requires_grad_(False)
    out = unet(x, t, Cond(**cond))
    for name in cond:
        other = cond[name].clone()
        other[1] += 1
        changed = unet(x, t, Cond(**{**cond, name: other}))
        assert torch.allclose(changed[0], out[0], atol=1e-6), f"{name} of sample 1 changes sample 0"
        assert float((changed[1] - out[1]).abs().max()) > 1e-3, f"{name} has no influence"
    later = unet(x, t + torch.tensor([0.0, 5.0]), Cond(**cond))
    assert torch.allclose(later[0], out[0], atol=1e-6)
    assert float((later[1] - out[1]).abs().max()) > 1e-3


def test_what_a_unet_refuses() -> None:
    unet = UNet(2, 8, (1, 1, 1), 1, (), patch=2)
    t = torch.zeros(1)
    for height, width in ((8, 12), (12, 8), (4, 4), (9, 8)):
        with pytest.raises(ValueError, match=f"latents of {width}x{height} do not divide by 8"):
            unet(normal(1, 2, height, width), t, Cond())
    assert unet(normal(1, 2, 8, 16), t, Cond()).shape == (1, 2, 8, 16)
    for levels, bad in (([3], 3), ([0, -1], -1), ([7, 9], 7)):
        with pytest.raises(ValueError, match=f"attention_levels has {bad}; the UNet's levels are 0 to 2"):
            UNet(2, 8, (1, 1, 1), 1, levels)


def test_dropout_is_in_the_second_convolution_of_each_block() -> None:
    unet = UNet(2, 8, (1,), 1, (), dropout=0.3)
    layers = {name: module.dropout for name, module in unet.named_modules() if isinstance(module, NormActConv)}
    assert {name for name, dropout in layers.items() if dropout} == {name for name in layers if name.endswith("second")}


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "multipliers", "patch"), [(4, (1, 2, 4), 1), (8, (1, 2, 4, 4), 1), (16, (1, 1, 2, 2, 4), 1), (4, (1,), 4), (8, (1, 2), 4)]
)
def test_autoencoder_shapes(factor: int, multipliers: tuple[int, ...], patch: int) -> None:
    model = ConvAutoencoder(KL(3), channels=8, multipliers=multipliers, num_blocks=1, patch=patch)
    assert (model.factor, model.channels) == (factor, 3)
    x = normal(2, 3, 2 * factor, factor)
    moments = model.moments(x)
    assert moments.shape == (2, 6, 2, 1)
    posterior = model.encode(x)
    assert torch.equal(posterior.mode(), moments[:, :3])
    assert torch.equal(model.posterior(moments).mode(), posterior.mode())
    assert model.decode(posterior.mode()).shape == x.shape
    for height, width in ((factor + 1, factor), (factor, factor // 2), (factor + factor // 2, factor)):
        with pytest.raises(ValueError, match=f"{width}x{height} pixels do not divide by the autoencoder's factor {factor}"):
            model.encode(normal(1, 3, height, width))


def test_autoencoder_refuses_levels_that_do_not_exist() -> None:
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=f"attention_levels has {bad}; this autoencoder's levels are 0 to 1"):
            ConvAutoencoder(KL(), channels=8, multipliers=(1, 2), attention_levels=[0, bad])


def test_downsampling_pads_right_and_bottom_or_all_sides() -> None:
    x = normal(1, 2, 6, 6).double()
    for asymmetric, padding in ((True, (0, 1, 0, 1)), (False, (1, 1, 1, 1))):
        layer = Downsample(2, asymmetric).double()
        padded = F.pad(x, padding)
        expected = torch.stack([
            torch.stack([
                torch.einsum("oikl,ikl->o", layer.conv.weight, padded[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]) + layer.conv.bias
                for j in range(3)
            ], 1)
            for i in range(3)
        ], 1)  # fmt: skip
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)
    up = Upsample(2).double()
    torch.testing.assert_close(up(x), up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Parameter for parameter: diffusers
# ---------------------------------------------------------------------------------------------------------------------


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def copy_resnet(ours: ResBlock, theirs: Any) -> None:
    for mine, name in ((ours.first.norm, "norm1"), (ours.first.conv, "conv1"), (ours.second.norm, "norm2"), (ours.second.conv, "conv2")):
        copy(mine, getattr(theirs, name))
    assert isinstance(ours.skip, nn.Identity) == (theirs.conv_shortcut is None)
    if theirs.conv_shortcut is not None:
        copy(ours.skip, theirs.conv_shortcut)
    assert (ours.embed is None) == (theirs.time_emb_proj is None)
    if ours.embed is not None:
        copy(ours.embed, theirs.time_emb_proj)


def copy_attention(ours: SelfAttention, theirs: Any) -> None:
    """q, k, v of diffusers are one linear layer here."""
    copy(ours.norm, theirs.group_norm)
    copy(ours.out, theirs.to_out[0])
    parts = [theirs.to_q, theirs.to_k, theirs.to_v]
    ours.qkv.load_state_dict({name: torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias")})
    assert ours.heads == theirs.heads


def copy_in_order(ours: Sequence[nn.Module], theirs: Sequence[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, ResBlock):
            copy_resnet(mine, other)
        elif isinstance(mine, SelfAttention):
            copy_attention(mine, other)
        else:
            copy(mine.conv, other.conv)  # type: ignore[arg-type]


def in_order(block: Any) -> list[Any]:
    """A block of diffusers as it runs: residual block, attention, ..., resampling."""
    attentions = list(getattr(block, "attentions", None) or [])
    if type(block).__name__ == "UNetMidBlock2D":
        return [block.resnets[0], attentions[0], block.resnets[1]]
    layers = [layer for pair in itertools.zip_longest(block.resnets, attentions) for layer in pair if layer is not None]
    return layers + list(getattr(block, "downsamplers", None) or []) + list(getattr(block, "upsamplers", None) or [])


def unfused_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of all parameters, the fused q, k, v of ours counted as three."""
    shapes: list[tuple[int, ...]] = []
    for name, parameter in module.named_parameters():
        fused = ".qkv." in name
        shapes += [(parameter.shape[0] // 3, *parameter.shape[1:])] * 3 if fused else [tuple(parameter.shape)]
    return sorted(shapes)


def compare_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    assert count(ours) == count(theirs)
    assert unfused_shapes(ours) == unfused_shapes(theirs)
    randomise(theirs, scale=0.02)
    for parameter in ours.parameters():
        nn.init.constant_(parameter, math.nan)  # what is not copied shows


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert float(theirs.std()) > 1e-2, "a comparison of nothing"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("multipliers", "num_blocks", "attention"), [((1, 2, 4, 4), 2, False), ((1, 2), 1, True)])
def test_autoencoder_is_that_of_diffusers(multipliers: tuple[int, ...], num_blocks: int, attention: bool) -> None:
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl")
    levels = len(multipliers)
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    if attention:
        down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    theirs = module.AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=[32 * m for m in multipliers], layers_per_block=num_blocks,
        latent_channels=4, norm_num_groups=32,
    ).eval()  # fmt: skip
    ours = ConvAutoencoder(KL(4), 32, multipliers, num_blocks, [levels - 1] if attention else []).eval()
    compare_parameters(ours, theirs)

    for mine, other, blocks in ((ours.encoder, theirs.encoder, "down_blocks"), (ours.decoder, theirs.decoder, "up_blocks")):
        copy(mine.stem, other.conv_in)
        middle, outer = in_order(other.mid_block), [layer for block in getattr(other, blocks) for layer in in_order(block)]
        layers = [part for layer in mine.layers for part in (layer if isinstance(layer, nn.Sequential) else [layer])]
        copy_in_order(layers, outer + middle if blocks == "down_blocks" else middle + outer)
        copy(mine.head.norm, other.conv_norm_out)
        copy(mine.head.conv, other.conv_out)
    copy(ours.quant_conv, theirs.quant_conv)
    copy(ours.post_quant_conv, theirs.post_quant_conv)

    x, z = normal(2, 3, 32, 48), normal(2, 4, 4, 6, seed=1)
    with torch.no_grad():
        agree(ours.moments(x), theirs.encode(x).latent_dist.parameters)
        agree(ours.decode(z), theirs.decode(z).sample)
        agree(ours.train().moments(x), theirs.encode(x).latent_dist.parameters)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize(("multipliers", "num_blocks", "levels"), [((1, 2, 3), 2, (1,)), ((1, 2), 1, (0, 1))])
def test_unet_is_that_of_diffusers(scale_shift: bool, multipliers: tuple[int, ...], num_blocks: int, levels: tuple[int, ...]) -> None:
    module = pytest.importorskip("diffusers.models.unets.unet_2d")
    theirs = module.UNet2DModel(
        in_channels=4, out_channels=4, block_out_channels=[32 * m for m in multipliers], layers_per_block=num_blocks,
        down_block_types=["AttnDownBlock2D" if i in levels else "DownBlock2D" for i in range(len(multipliers))],
        up_block_types=["AttnUpBlock2D" if i in levels else "UpBlock2D" for i in reversed(range(len(multipliers)))],
        attention_head_dim=16, resnet_time_scale_shift="scale_shift" if scale_shift else "default", attn_norm_num_groups=32,
    ).eval()  # fmt: skip
    ours = UNet(4, 32, multipliers, num_blocks, levels, head_channels=16, scale_shift=scale_shift).eval()
    compare_parameters(ours, theirs)

    copy(ours.stem, theirs.conv_in)
    copy(ours.time_embed[0], theirs.time_embedding.linear_1)
    copy(ours.time_embed[2], theirs.time_embedding.linear_2)
    for path, blocks in ((ours.down, theirs.down_blocks), (ours.middle, [theirs.mid_block]), (ours.up, theirs.up_blocks)):
        layers: list[nn.Module] = []
        for stage in path:
            parts = [stage] if isinstance(stage, Downsample) else [stage.block, stage.attention, stage.resample]
            layers += [part for part in parts if part is not None]
        copy_in_order(layers, [layer for block in blocks for layer in in_order(block)])
    copy(ours.head.norm, theirs.conv_norm_out)
    copy(ours.head.conv, theirs.conv_out)

    x, t = normal(3, 4, 8, 12), torch.tensor([0.0, 3.0, 57.0])
    with torch.no_grad():
        agree(ours(x, t, Cond()), theirs(x, t).sample)
    single = theirs(x[:1], torch.tensor([999.0])).sample
    torch.testing.assert_close(ours(x[:1], torch.tensor([999.0]), Cond()), single, rtol=1e-4, atol=1e-4)


def copy_transformer(ours: Any, theirs: Any) -> None:
    """Their 1x1 convolutions are our linear layers, their separate projections are one matrix here."""

    def load(layer: nn.Linear, *others: nn.Module) -> None:
        with torch.no_grad():
            layer.weight.copy_(torch.cat([other.weight.flatten(1) for other in others]))
            if layer.bias is not None:
                layer.bias.copy_(torch.cat([other.bias for other in others]))

    ours.norm.load_state_dict(theirs.norm.state_dict())
    load(ours.proj_in, theirs.proj_in)
    load(ours.proj_out, theirs.proj_out)
    for mine, other in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        for a, b in ((mine.norm_self, other.norm1), (mine.norm_cross, other.norm2), (mine.norm_ff, other.norm3)):
            a.load_state_dict(b.state_dict())
        load(mine.qkv, other.attn1.to_q, other.attn1.to_k, other.attn1.to_v)
        load(mine.self_out, other.attn1.to_out[0])
        load(mine.q, other.attn2.to_q)
        load(mine.kv, other.attn2.to_k, other.attn2.to_v)
        load(mine.cross_out, other.attn2.to_out[0])
        load(mine.ff_in, other.ff.net[0].proj)
        load(mine.ff_out, other.ff.net[2])


def test_unet_with_cross_attention_is_that_of_diffusers() -> None:
    """The layout of Stable Diffusion 1: four levels, two blocks, transformers on all but the last, eight heads everywhere."""
    module = pytest.importorskip("diffusers.models.unets.unet_2d_condition")
    multipliers = (1, 2, 4, 4)
    theirs = module.UNet2DConditionModel(
        block_out_channels=[32 * m for m in multipliers], cross_attention_dim=24, attention_head_dim=8, sample_size=16
    ).eval()
    randomise(theirs, scale=0.02)
    ours = UNet(4, 32, multipliers, 2, (0, 1, 2), heads=8, token_dim=24, scale_shift=False).eval()
    assert count(ours) == count(theirs)
    for parameter in ours.parameters():
        nn.init.constant_(parameter, torch.nan)  # what is not copied shows
    copy(ours.stem, theirs.conv_in)
    copy(ours.time_embed[0], theirs.time_embedding.linear_1)
    copy(ours.time_embed[2], theirs.time_embedding.linear_2)
    for path, blocks in ((ours.down, theirs.down_blocks), (ours.middle, [theirs.mid_block]), (ours.up, theirs.up_blocks)):
        layers: list[nn.Module] = []
        for stage in path:
            parts = [stage] if isinstance(stage, Downsample) else [stage.block, stage.attention, stage.resample]
            layers += [part for part in parts if part is not None]
        for mine, other in zip(layers, [layer for block in blocks for layer in in_order(block)], strict=True):
            copy_transformer(mine, other) if isinstance(mine, SpatialTransformer) else copy_in_order([mine], [other])
    copy(ours.head.norm, theirs.conv_norm_out)
    copy(ours.head.conv, theirs.conv_out)
    x, t, tokens = normal(3, 4, 16, 24), torch.tensor([0.0, 3.0, 57.0]), normal(3, 7, 24, seed=1)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    with torch.no_grad():
        wanted = theirs(x, t, tokens).sample
        assert float(wanted.std()) > 1e-2
        torch.testing.assert_close(ours(x, t, Cond(tokens=tokens)), wanted, rtol=0, atol=1e-5)
        wanted = theirs(x, t, tokens, encoder_attention_mask=mask).sample
        torch.testing.assert_close(ours(x, t, Cond(tokens=tokens, mask=mask)), wanted, rtol=0, atol=1e-5)


def test_recomputed_stages_have_the_same_gradients_and_keep_less() -> None:
    x, t, cond = normal(2, 4, 16, 16), torch.tensor([3.0, 900.0]), Cond(vector=normal(2, 6, seed=1), tokens=normal(2, 5, 8, seed=2))
    stored, again = (UNet(4, 16, (1, 2), 1, (1,), vector_dim=6, token_dim=8, recompute=recompute) for recompute in (False, True))
    again.load_state_dict(randomise(stored).state_dict())
    gradients, kept = [], []
    for unet in (stored, again):
        sizes: list[int] = []

        def keep(a: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(a.numel())
            return a

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
            loss = unet(x, t, cond).square().sum()
        gradients.append(torch.autograd.grad(loss, list(unet.parameters())))
        kept.append(sum(sizes))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert kept[1] < 0.5 * kept[0]


# ---------------------------------------------------------------------------------------------------------------------
# The posterior
# ---------------------------------------------------------------------------------------------------------------------


@quick
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 3), spread=st.floats(0.1, 5.0))
def test_kl_against_torch(seed: int, channels: int, spread: float) -> None:
    moments = spread * normal(3, 2 * channels, 2, 2, seed=seed).double()
    posterior = DiagonalGaussian.of(moments)
    mean, log_variance = moments[:, :channels], moments[:, channels:]
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
    assert posterior.kl().shape == (3,)
    torch.testing.assert_close(posterior.kl(), kl, rtol=1e-10, atol=1e-10)
    assert (posterior.kl() >= 0).all()


def test_kl_of_the_prior_is_zero() -> None:
    assert torch.equal(DiagonalGaussian.of(torch.zeros(2, 4, 3, 3)).kl(), torch.zeros(2))


def test_samples_have_the_moments() -> None:
    moments = torch.tensor([1.5, -2.0, math.log(0.25), math.log(9.0)]).view(1, 4, 1, 1)
    posterior, n = DiagonalGaussian.of(moments), 200_000
    assert torch.equal(posterior.mode(), moments[:, :2])
    assert torch.equal(posterior.sample(torch.zeros(1, 2, 1, 1)), posterior.mode())
    z = posterior.sample(normal(n, 2, 1, 1)).flatten(1).double()
    for channel, (mean, std) in enumerate([(1.5, 0.5), (-2.0, 3.0)]):
        assert abs(float(z[:, channel].mean()) - mean) < 4 * std / math.sqrt(n)
        assert abs(float(z[:, channel].std()) - std) < 4 * std / math.sqrt(2 * n)


def test_the_log_variance_is_clamped() -> None:
    raw = torch.tensor([-1e9, -30.5, -30.0, -29.5, 0.0, 19.5, 20.0, 20.5, 1e9])
    moments = torch.cat([torch.zeros(1, 9, 1, 1), raw.view(1, 9, 1, 1)], dim=1)
    posterior = DiagonalGaussian.of(moments)
    assert posterior.log_variance.flatten().tolist() == [-30.0, -30.0, -30.0, -29.5, 0.0, 19.5, 20.0, 20.0, 20.0]
    assert torch.isfinite(posterior.kl()).all()
    std = posterior.sample(torch.ones(1, 9, 1, 1)).flatten()
    torch.testing.assert_close(std, (raw.clamp(-30, 20) / 2).exp(), rtol=1e-6, atol=0)
    unclamped = DiagonalGaussian.of(moments * 0.001)
    assert torch.equal(unclamped.log_variance[:, 1:8], moments[:, 10:17] * 0.001)
