"""Bottlenecks: KL, VQ and FSQ against formulas, loops and torch.cdist; the codebook on one process and on two."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.autoencoder.bottleneck import FSQ, KL, VQ
from ldm.autoencoder.conv import ConvAutoencoder

quick = settings(deadline=None, max_examples=40)


def no_noise(like: Tensor) -> Tensor:
    raise AssertionError("a discrete bottleneck drew noise")


def codebook(*, channels: int = 3, num_codes: int = 16, seed: int = 0, **options: float | bool) -> VQ:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQ(channels, num_codes, **options)  # type: ignore[arg-type]


def rows(z: Tensor) -> Tensor:
    """(B,C,h,w) -> (B*h*w,C)."""
    return z.movedim(1, -1).flatten(0, 2)


def step(vq: VQ, *batches: Tensor) -> None:
    for moments in batches:
        vq(moments, no_noise, 1)
    vq.after_step()


# ---------------------------------------------------------------------------------------------------------------------
# KL
# ---------------------------------------------------------------------------------------------------------------------


def test_the_kl_penalty_counts_per_value_of_the_image() -> None:
    moments = normal(2, 6, 4, 5).double()
    mean, log_variance = moments.chunk(2, dim=1)
    latent = KL(3, weight=0.7)(moments, torch.ones_like, values=192)
    q, p = torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
    torch.testing.assert_close(latent.penalty, 0.7 * kl / 192, rtol=1e-12, atol=0)
    torch.testing.assert_close(latent.logs["kl_per_dim"], kl.mean() / (3 * 4 * 5), rtol=1e-12, atol=0)
    torch.testing.assert_close(latent.z, mean + q.stddev, rtol=1e-12, atol=0)


def test_the_gradient_of_the_kl_penalty() -> None:
    moments = normal(2, 4, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: KL(2, weight=0.7)(m, torch.zeros_like, values=10).penalty, moments)


# ---------------------------------------------------------------------------------------------------------------------
# VQ: nearest code, commitment, straight-through
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [False, True])
def test_the_nearest_code_is_that_of_cdist(normalise: bool) -> None:
    vq, moments = codebook(num_codes=64, normalise=normalise), 3 * normal(2, 3, 5, 7)
    z = vq.posterior(moments).mode()
    nearest = torch.cdist(rows(z).double(), vq.values.double()).argmin(1).view(2, 5, 7)
    assert len(nearest.unique()) > 20
    assert torch.equal(vq.codes(z), nearest)
    snapped = vq.quantize(z)
    assert torch.equal(snapped, vq.values[nearest].movedim(-1, 1))
    assert torch.equal(vq.quantize(snapped), snapped)
    torch.testing.assert_close(vq(moments, no_noise, 1).z, snapped, rtol=1e-6, atol=1e-6)
    share = torch.bincount(nearest.flatten(), minlength=64).double() / nearest.numel()
    perplexity = (-(share[share > 0] * share[share > 0].log()).sum()).exp() / 64
    torch.testing.assert_close(vq(moments, no_noise, 1).logs["perplexity"].double(), perplexity, rtol=1e-5, atol=0)


def test_many_latents_are_coded_in_parts() -> None:
    vq, z = codebook(), normal(2, 3, 200, 200)
    assert len(rows(z)) > 2**16
    assert torch.equal(vq.codes(z), torch.cat([vq.codes(part) for part in z.split(1)]))


def test_half_precision_finds_the_same_codes() -> None:
    vq, z = codebook(num_codes=256), normal(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = vq.codes(z), vq(z, no_noise, 1)
    full = vq.codes(z), vq(z, no_noise, 1)
    assert torch.equal(half[0], full[0])
    assert torch.equal(half[1].z, full[1].z)
    assert torch.equal(half[1].penalty, full[1].penalty)


def test_the_commitment_reaches_the_encoder_as_twice_beta_times_the_mean_difference() -> None:
    vq, moments = codebook(commitment=0.4), normal(2, 3, 4, 5).requires_grad_()
    penalty = vq(moments, no_noise, 192).penalty
    difference = moments.detach() - vq.quantize(moments.detach())
    torch.testing.assert_close(penalty, 0.4 * difference.square().sum((1, 2, 3)) / (3 * 4 * 5), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(penalty.sum(), moments)
    torch.testing.assert_close(gradient, 0.4 * 2 * difference / (3 * 4 * 5), rtol=1e-5, atol=1e-8)


def test_the_gradient_passes_the_codes_unchanged_and_leaves_them_alone() -> None:
    vq, moments, probe = codebook(), normal(2, 3, 4, 5).requires_grad_(), normal(2, 3, 4, 5, seed=1)
    (gradient,) = torch.autograd.grad((vq(moments, no_noise, 1).z * probe).sum(), moments)
    assert torch.equal(gradient, probe)
    assert list(vq.parameters()) == []
    assert not any(buffer.requires_grad for buffer in vq.buffers())


def test_normalised_codes_and_latents_have_length_1() -> None:
    vq, moments = codebook(normalise=True), 5 * normal(2, 3, 4, 5)
    for _ in range(3):
        lengths = [vq.values.norm(dim=1), vq.posterior(moments).mode().norm(dim=1), vq.quantize(vq.project(moments)).norm(dim=1)]
        for length in lengths:
            torch.testing.assert_close(length, torch.ones_like(length), rtol=1e-6, atol=1e-6)
        step(vq, moments)


def test_a_decoder_sees_codes_only() -> None:
    model = ConvAutoencoder(codebook(), 8, (1, 2), 1).eval()
    z = normal(2, 3, 4, 4)
    assert model.num_codes == 16
    with torch.no_grad():
        decoded = model.decode(z)
        assert torch.equal(decoded, model.decoder(model.post_quant_conv(model.bottleneck.quantize(z))))
        assert torch.equal(decoded, model.decode(model.bottleneck.quantize(z)))
        assert not torch.allclose(decoded, model.decoder(model.post_quant_conv(z)), atol=1e-3)
        x = normal(2, 3, 8, 8, seed=1)
        torch.testing.assert_close(model(x).x, model.decode(model.encode(x).mode()), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.codes(z), model.bottleneck.codes(z))


# ---------------------------------------------------------------------------------------------------------------------
# VQ: the codebook follows the latents
# ---------------------------------------------------------------------------------------------------------------------


def follow(values: np.ndarray, batches: list[np.ndarray], decay: float) -> np.ndarray:
    """The codes after a step with each batch (N,C): average sums over average counts, by loops in float64."""
    used, sums = np.zeros(len(values)), np.zeros_like(values)
    for batch in batches:
        used, sums = decay * used, decay * sums
        for z, code in zip(batch, [np.argmin([np.sum((z - value) ** 2) for value in values]) for z in batch], strict=True):
            used[code] += 1 - decay
            sums[code] += (1 - decay) * z
        values = np.array([sums[k] / used[k] if used[k] else values[k] for k in range(len(values))])
    return values


def test_the_codebook_is_the_average_of_its_latents() -> None:
    vq, batches = codebook(decay=0.7, restart=0.0), [normal(2, 3, 3, 4, seed=seed) for seed in range(6)]
    wanted = follow(vq.values.double().numpy(), [rows(z).double().numpy() for z in batches], 0.7)
    for batch in batches:
        step(vq, batch)
    torch.testing.assert_close(vq.values.double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


def test_without_restarts_a_code_that_falls_out_of_use_stays_where_it_was() -> None:
    vq = codebook(channels=1, num_codes=2, decay=0.5, restart=0.0)
    vq.values.copy_(torch.tensor([[-1.0], [1.0]]))
    step(vq, torch.tensor([-3.0, 2.0]).view(1, 1, 1, 2))
    for _ in range(60):
        step(vq, torch.tensor([2.0, 2.0]).view(1, 1, 1, 2))
    torch.testing.assert_close(vq.values.flatten(), torch.tensor([-3.0, 2.0]), rtol=1e-5, atol=0)


def test_two_batches_of_one_step_count_as_their_union() -> None:
    halves = normal(2, 3, 3, 4), normal(1, 3, 5, 4, seed=1)
    parts, whole = codebook(restart=0.0), codebook(restart=0.0)
    step(parts, *halves)
    step(whole, torch.cat([rows(z) for z in halves]).T[None, :, :, None])
    assert not torch.equal(whole.values, codebook().values)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def used_share(vq: VQ) -> float:
    return len(vq.codes(normal(8, 2, 16, 16, seed=99)).unique()) / vq.num_codes


@pytest.mark.parametrize("restart", [0.0, 0.03])
def test_a_codebook_far_from_the_data_recovers_by_restarts_alone(restart: float) -> None:
    vq = codebook(channels=2, num_codes=32, restart=restart)
    vq.values *= 100
    for seed in range(30):
        step(vq, normal(4, 2, 8, 8, seed=seed))
    share = used_share(vq)
    assert share > 0.9 if restart else share < 0.1


def test_in_evaluation_nothing_is_observed() -> None:
    vq = codebook().eval()
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    step(vq, normal(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())
    step(vq.train())
    assert torch.equal(vq.values, before["values"]), "a step without a batch"


def test_latents_that_are_not_finite_do_not_spoil_the_codebook() -> None:
    vq, bad = codebook(), normal(2, 3, 4, 4)
    bad[0, 1, 2, 3] = float("nan")
    step(vq, normal(2, 3, 4, 4))
    step(vq, bad)
    assert all(value.isfinite().all() for value in vq.state_dict().values())


def test_what_a_codebook_refuses() -> None:
    for num_codes, decay in ((1, 0.9), (8, 1.1), (8, -0.1)):
        with pytest.raises(ValueError, match=f"{num_codes} codes of 3 channels with decay {decay}"):
            VQ(3, num_codes, decay=decay)


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ldm.autoencoder.bottleneck import VQ

def rank(number, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    for restart in (0.0, 0.5):
        torch.manual_seed(0)
        vq = VQ(3, 16, decay=0.7, restart=restart)
        torch.manual_seed(number + 1)
        for batch in torch.load(f"{folder}/batches.pt"):
            vq(batch[number::2], None, 1)
            vq.after_step()
        torch.save(vq.state_dict(), f"{folder}/{restart}-{number}.pt")
    dist.destroy_process_group()

torch.set_num_threads(1)
mp.start_processes(rank, (sys.argv[1],), 2, start_method="fork")
"""


def test_two_processes_with_half_the_batch_keep_the_codebook_of_one(tmp_path: Path) -> None:
    batches = [normal(4, 3, 3, 4, seed=seed) for seed in range(5)]
    torch.save(batches, tmp_path / "batches.pt")
    result = subprocess.run([sys.executable, "-c", TWO_RANKS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    states = {path.stem: torch.load(path) for path in tmp_path.glob("*-*.pt")}
    one = codebook(decay=0.7, restart=0.0)
    for batch in batches:
        step(one, batch)
    for name, value in one.state_dict().items():
        assert torch.equal(states["0.0-0"][name], states["0.0-1"][name])
        assert torch.equal(states["0.5-0"][name], states["0.5-1"][name])
        torch.testing.assert_close(states["0.0-0"][name], value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(states["0.5-0"]["values"], states["0.0-0"]["values"]), "nothing was restarted"


# ---------------------------------------------------------------------------------------------------------------------
# FSQ
# ---------------------------------------------------------------------------------------------------------------------

some_levels = st.lists(st.integers(2, 6), min_size=1, max_size=3)


def grid(levels: list[int]) -> Tensor:
    """(prod(levels), C, 1, 1): every point, from -1 to 1 in equal steps."""
    return torch.tensor(list(itertools.product(*(torch.linspace(-1, 1, n).tolist() for n in levels))))[:, :, None, None]


@quick
@given(levels=some_levels)
def test_codes_are_a_bijection_between_the_grid_and_their_numbers(levels: list[int]) -> None:
    fsq, points = FSQ(levels), grid(levels)
    assert fsq.num_codes == len(points)
    assert sorted(fsq.codes(points).flatten().tolist()) == list(range(fsq.num_codes))
    torch.testing.assert_close(fsq.quantize(points), points, rtol=0, atol=1e-6)


@quick
@given(levels=some_levels, seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 100.0]))
def test_every_latent_is_put_on_the_nearest_point_of_the_grid(levels: list[int], seed: int, scale: float) -> None:
    fsq, moments = FSQ(levels), scale * normal(2, len(levels), 3, 3, seed=seed)
    z = fsq.posterior(moments).mode()
    assert torch.equal(z, torch.tanh(moments))
    snapped, points = fsq.quantize(z), grid(levels).flatten(1)
    differences = (rows(z)[:, None] - points).abs()
    torch.testing.assert_close((rows(z) - rows(snapped)).abs(), differences.amin(1), rtol=0, atol=1e-6)
    assert float((rows(snapped)[:, None] - points).abs().sum(2).amin(1).max()) < 1e-6
    assert torch.equal(fsq.quantize(snapped), snapped)
    assert torch.equal(fsq.codes(snapped), fsq.codes(z))
    assert torch.equal(fsq.quantize(torch.full_like(z, 5)), torch.ones_like(z)), "beyond the grid"
    latent = fsq(moments, no_noise, 1)
    torch.testing.assert_close(latent.z, snapped, rtol=0, atol=1e-6)
    assert torch.equal(latent.penalty, torch.zeros(2))


def test_the_gradient_of_fsq_is_that_of_tanh() -> None:
    moments, probe = normal(2, 2, 3, 3).requires_grad_(), normal(2, 2, 3, 3, seed=1)
    (gradient,) = torch.autograd.grad((FSQ([4, 5])(moments, no_noise, 1).z * probe).sum(), moments)
    torch.testing.assert_close(gradient, probe * (1 - torch.tanh(moments.detach()).square()), rtol=1e-5, atol=1e-7)


def test_what_fsq_refuses() -> None:
    for levels in ([], [1], [5, 1]):
        with pytest.raises(ValueError, match="each channel needs at least 2"):
            FSQ(levels)


def test_compiled_is_the_same_model() -> None:
    """Outputs, all gradients and the one that the adaptive weight takes, names of weights; a copy follows its own weights."""
    plain, x, noise = ConvAutoencoder(KL(4), channels=32, multipliers=(1, 2), num_blocks=1), normal(2, 3, 16, 16), normal(2, 4, 8, 8)
    compiled = copy.deepcopy(plain)
    for part in compiled.parts_to_compile():
        part.compile(backend="aot_eager")
    gradients = []
    for model in (plain, compiled):
        loss = model(x, lambda like: noise).x.square().mean()
        (at_last,) = torch.autograd.grad(loss, model.last_layer, retain_graph=True)
        gradients.append([loss.detach(), at_last, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-4)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied.decode(noise).abs().max() == 0
        assert compiled.decode(noise).abs().max() > 0.1
