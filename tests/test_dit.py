"""The diffusion transformer: equal to diffusers' with the same weights; what its options mean."""

from typing import Any

import pytest
import torch
from conftest import normal, randomise
from torch import Tensor, nn

from ldm.interfaces import Cond
from ldm.nn.dit import DiT, positions, rotate


def test_dit_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, num_embeds_ada_norm=10, norm_eps=1e-6
    ).eval()
    randomise(theirs, scale=0.05)
    shared = theirs.transformer_blocks[0].norm1.emb  # published models have one embedding; theirs has one per block
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(shared.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's own frequencies
    ours = DiT(4, dim=32, depth=3, heads=4, vector_dim=32).eval()
    for parameter in ours.parameters():
        nn.init.constant_(parameter, torch.nan)  # what is not copied shows
    copy(ours, theirs, shared)
    x, t, labels = normal(3, 4, 8, 8), torch.tensor([0.0, 17.0, 999.0]), torch.tensor([1, 5, 9])
    with torch.no_grad():
        wanted = theirs(x, t, labels).sample
        found = ours(x, t, Cond(vector=shared.class_embedder.embedding_table(labels)))
    assert float(wanted.std()) > 1e-2
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def copy(ours: DiT, theirs: Any, shared: Any) -> None:
    state = {
        "stem": (theirs.pos_embed.proj.weight.flatten(1), theirs.pos_embed.proj.bias),
        "time_embed.0": weights(shared.timestep_embedder.linear_1),
        "time_embed.2": weights(shared.timestep_embedder.linear_2),
        "vector_embed": (torch.eye(32), torch.zeros(32)),
        "modulation": weights(theirs.proj_out_1),
        # theirs has a patch's channels last
        "head": tuple(a.unflatten(0, (2, 2, 4)).movedim(2, 0).flatten(0, 2) for a in weights(theirs.proj_out_2)),
    }
    for i, block in enumerate(theirs.transformer_blocks):
        attention = [weights(getattr(block.attn1, name)) for name in ("to_q", "to_k", "to_v")]
        state |= {
            f"blocks.{i}.modulation": weights(block.norm1.linear),
            f"blocks.{i}.qkv": tuple(torch.cat(parts) for parts in zip(*attention, strict=True)),
            f"blocks.{i}.out": weights(block.attn1.to_out[0]),
            f"blocks.{i}.feed_forward.wide": weights(block.ff.net[0].proj),
            f"blocks.{i}.feed_forward.out": weights(block.ff.net[2]),
        }
    ours.load_state_dict({f"{name}.{kind}": a for name, pair in state.items() for kind, a in zip(("weight", "bias"), pair, strict=True)})


def weights(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.detach(), layer.bias.detach()


OPTIONS = [{}, {"position": "rope"}, {"qk_norm": True}, {"swiglu": True}, {"position": "rope", "qk_norm": True, "swiglu": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_fresh_dit_returns_zero_and_takes_any_size(options: dict[str, Any]) -> None:
    model = DiT(4, dim=32, depth=2, heads=4, vector_dim=5, concat_channels=3, **options)
    for h, w in ((8, 8), (4, 10)):
        cond = Cond(vector=normal(2, 5), concat=normal(2, 3, h, w))
        assert torch.equal(model(normal(2, 4, h, w), torch.tensor([3.0, 7.0]), cond), torch.zeros(2, 4, h, w))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_input_reaches_its_own_sample_and_recomputing_changes_nothing(options: dict[str, Any]) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = randomise(DiT(4, dim=32, depth=2, heads=4, vector_dim=5, recompute=recompute, **options)).train()
        x, t, vector = normal(2, 4, 4, 4).requires_grad_(), torch.tensor([3.0, 700.0]), normal(2, 5).requires_grad_()
        out = model(x, t, Cond(vector=vector))
        out[0].square().sum().backward()
        assert torch.equal(x.grad[1], torch.zeros(4, 4, 4))
        assert x.grad[0].abs().min() > 0
        assert vector.grad[0].abs().min() > 0
        results.append((out, x.grad, [p.grad for p in model.parameters()]))
    (one, grad_one, all_one), (two, grad_two, all_two) = results
    assert torch.equal(one, two)
    assert torch.equal(grad_one, grad_two)
    assert all(torch.equal(a, b) for a, b in zip(all_one, all_two, strict=True) if a is not None)


def test_rotary_products_depend_on_distance_alone() -> None:
    q, k = normal(1, 1, 1, 16).double(), normal(1, 1, 1, 16, seed=1).double()

    def product(a: tuple[float, float], b: tuple[float, float]) -> float:
        return float((rotate(q, torch.tensor([a]).double()) * rotate(k, torch.tensor([b]).double())).sum())

    assert product((3, 5), (1, 2)) == pytest.approx(product((12, 9), (10, 6)), rel=1e-9)
    assert product((3, 5), (1, 2)) != pytest.approx(product((3, 5), (2, 1)), rel=1e-3)


def test_positions_are_columns_and_rows() -> None:
    assert positions(2, 3, torch.device("cpu")).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


def test_what_a_dit_refuses() -> None:
    with pytest.raises(ValueError, match="width 30 with 4 heads"):
        DiT(4, dim=30, heads=4)
    with pytest.raises(ValueError, match="latents of 8x7 do not divide by this DiT's patch 2"):
        DiT(4, dim=32, depth=1, heads=4)(normal(1, 4, 7, 8), torch.zeros(1), Cond())
