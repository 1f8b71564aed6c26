"""The single way to pictures (ldm/sampling/pipeline.py, request.py): a picture is made of its own noise and condition alone."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import CLASSES, latent_diffusion

from ldm.diffusion.guidance import CFG
from ldm.diffusion.samplers import Ancestral, DPMSolverPP2M, Heun
from ldm.interfaces import Denoise, TaskInput
from ldm.model_folder import describe
from ldm.sampling.pipeline import chunks, generate
from ldm.sampling.request import InputImage, Mix, SampleRequest, SamplingConfig, SeedNoise, Slerp
from ldm.sampling.tasks import Inpaint
from ldm.sampling.wrappers import slerp

PLAIN = SamplingConfig(DPMSolverPP2M(), CFG(1.0), 3)
CONDITIONS: list[dict[str, Any]] = [*({"class": name} for name in CLASSES), {}]


def wanted(indices: list[int], seed: int = 0) -> list[SampleRequest]:
    """Requests of all classes, and of none, in turn."""
    return [SampleRequest(i, SeedNoise(seed, i), CONDITIONS[i % 4]) for i in indices]


def of(*conditions: Any, **options: Any) -> list[SampleRequest]:
    """Requests with the same noise."""
    return [SampleRequest(i, SeedNoise(), condition, **options) for i, condition in enumerate(conditions)]


# ---------------------------------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------------------------------


words = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1), st.integers(2**32, 2**53))


@settings(deadline=None, max_examples=40)
@given(index=words, seed=words, draws=st.integers(1, 3))
def test_the_noise_of_a_picture(index: int, seed: int, draws: int) -> None:
    one, two = (SeedNoise(seed, index).draws((2, 3, 4)) for _ in range(2))
    other_index, other_seed = SeedNoise(seed, index + 1).draws((2, 3, 4)), SeedNoise(seed + 1, index).draws((2, 3, 4))
    generator, seen = np.random.default_rng([seed, index]), []
    for _ in range(draws):
        noise = one()
        assert (noise.shape, noise.dtype) == ((2, 3, 4), torch.float32)
        assert torch.equal(noise, two())
        if max(seed, index) < 2**32:
            assert np.array_equal(noise.numpy(), generator.standard_normal((2, 3, 4), dtype=np.float32)), "as in all versions"
        seen += [noise, other_index(), other_seed()]
    assert len({tuple(noise.flatten().tolist()) for noise in seen}) == 3 * draws
    assert not torch.equal(SeedNoise(index, seed).draws((9,))(), SeedNoise(seed, index).draws((9,))()) or seed == index


def test_noise_is_standard_normal() -> None:
    noise = torch.cat([SeedNoise(3, i).draws((1000,))() for i in range(100)])
    assert abs(float(noise.mean())) < 4 / 100_000**0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / 100_000) ** 0.5


def test_noise_between_two_seeds() -> None:
    a, b, middle = SeedNoise(1, 0), SeedNoise(2, 0), Slerp(SeedNoise(1, 0), SeedNoise(2, 0), 0.3).draws((2, 4, 4))
    one, other = a.draws((2, 4, 4)), b.draws((2, 4, 4))
    for _ in range(3):
        assert torch.equal(middle(), slerp(one(), other(), 0.3))
    for weight, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(Slerp(a, b, weight).draws((5,))(), end.draws((5,))(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_do_not_exist(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed is {seed}; allowed is 0 to 2\^64 - 1$"):
        SeedNoise(seed)
    assert SeedNoise(2**64 - 1).draws((1,))().shape == (1,)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "chunk_size"),
    [
        (SamplingConfig(Ancestral(1.0), CFG(2.0), 3), 8),
        (PLAIN, 8),
        (SamplingConfig(Heun(), CFG(0.0), 2, "leading"), 8),
        (PLAIN, 5),
        (PLAIN, 1),
    ],
    ids=["ancestral", "dpm", "heun", "five in a chunk", "one by one"],
)
def test_a_picture_does_not_depend_on_the_others(config: SamplingConfig, chunk_size: int) -> None:
    model = latent_diffusion()
    everything = generate(model, wanted(list(range(16))), config, CLASSES, chunk_size)
    assert everything.shape == (16, 3, 16, 16)
    assert float((everything.abs() == 1).float().mean()) < 0.5, "not all clamped, which would compare nothing"
    pictures = {tuple(picture.flatten().tolist()) for picture in everything}
    assert len(pictures) == 16
    groups = [[i] for i in (0, 3, 7, 8, 15)]  # alone
    groups += [[*range(7)], [*range(9, 16)], [*range(15, -1, -1)], [5, 5, 5], [12, 3, 9, 0, 15, 7, 1, 11, 4]]
    for indices in groups:
        some = generate(model, wanted(indices), config, CLASSES, chunk_size)
        assert len(some) == len(indices)
        for index, picture in zip(indices, some, strict=True):
            assert torch.equal(picture, everything[index]), f"picture {index} among {indices}"
    again = generate(model, wanted(list(range(16)), seed=1), config, CLASSES, chunk_size)
    assert not any(torch.equal(a, b) for a, b in zip(again, everything, strict=True))


def test_random_state_and_gradients_are_left_alone() -> None:
    model, state, config = latent_diffusion(), torch.get_rng_state(), SamplingConfig(Ancestral(1.0), steps=3)
    first = generate(model, wanted([0]), config, CLASSES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(generate(model, wanted([0]), config, CLASSES), first)
    assert not first.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_classes_guidance_and_progress() -> None:
    model, steps, seen = latent_diffusion(), [], list[Tensor]()
    requests = of({"class": "cat"}, {"class": "dog"}, {"class": 0}, {})
    pictures = generate(model, requests, PLAIN, CLASSES, 8, lambda: steps.append(1), seen.append)
    cat, dog, zero, nothing = pictures
    assert len(steps) == 2 * 3, "once after each step; what has a condition is one chunk, what has none another"
    assert [z0.shape for z0 in seen] == [(8, 2, 8, 8)] * 6, "a chunk is always full"
    last = torch.cat([model.latents.to_images(z0).clamp(-1, 1)[:count] for z0, count in ((seen[2], 3), (seen[5], 1))])
    assert torch.equal(last, pictures), "the last D is the picture"
    assert not torch.equal(cat, dog)
    assert torch.equal(cat, zero), "class 0 by number"
    guided = generate(model, requests, replace(PLAIN, guidance=CFG(3.0)), CLASSES)
    assert not torch.equal(guided[0], cat)
    torch.testing.assert_close(guided[3], nothing, rtol=1e-4, atol=1e-4)
    null = generate(model, requests, replace(PLAIN, guidance=CFG(0.0)), CLASSES, 8)
    assert all(torch.equal(picture, nothing) for picture in null)
    steps.clear()
    generate(model, of(*[{"class": "cat"}] * 9), PLAIN, CLASSES, 8, lambda: steps.append(1))
    assert len(steps) == 2 * 3, "nine are two chunks"
    with pytest.raises(ValueError, match="51 sampling steps"):
        generate(model, requests, SamplingConfig(steps=51), CLASSES)


def test_a_mixture_of_conditions_ends_in_both() -> None:
    model, (cat, dog) = latent_diffusion(), ({"class": "cat"}, {"class": "dog"})
    one, other = generate(model, of(cat, dog), PLAIN, CLASSES, 4)
    left, middle, right, plain = generate(model, of(*(Mix(cat, dog, weight) for weight in (0.0, 0.5, 1.0)), cat), PLAIN, CLASSES, 4)
    assert torch.equal(left, one)
    assert torch.equal(right, other)
    assert torch.equal(plain, one), "a plain condition among mixtures"
    assert not torch.equal(middle, one)
    assert not torch.equal(middle, other)


def test_away_from_a_negative_condition() -> None:
    model, cat, guided = latent_diffusion(), {"class": "cat"}, replace(PLAIN, guidance=CFG(3.0))
    (plain,) = generate(model, of(cat), PLAIN, CLASSES, 1)
    (itself,) = generate(model, of(cat, negative=cat), guided, CLASSES, 1)
    torch.testing.assert_close(itself, plain, rtol=1e-4, atol=1e-4)
    (away,), (none,) = (generate(model, of(cat, negative=negative), guided, CLASSES, 1) for negative in ({"class": "dog"}, None))
    assert not torch.equal(away, none)
    mixed = [*of(cat, negative={"class": "dog"}), *of(cat)]
    torch.testing.assert_close(generate(model, mixed, guided, CLASSES, 2), torch.stack([away, none]), rtol=1e-4, atol=1e-4)


def test_pictures_lie_between_minus_one_and_one() -> None:
    model = randomise(latent_diffusion(), scale=0.5)
    pictures = generate(model, wanted([0, 1]), SamplingConfig(steps=2), CLASSES)
    assert (float(pictures.min()), float(pictures.max())) == (-1.0, 1.0)


def test_an_unconditional_model_takes_no_class() -> None:
    model = latent_diffusion(conditional=False)
    assert generate(model, of({}, {}), SamplingConfig(steps=2)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"^this model takes no class, 'cat' was given: it takes no condition$"):
        generate(model, of({"class": "cat"}), SamplingConfig(steps=2))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (18, 21), (5, 40)])
def test_pictures_have_the_size_that_was_asked_for(size: tuple[int, int], windows: bool) -> None:
    pictures = generate(latent_diffusion(), wanted([0, 1]), replace(PLAIN, size=size, windows=windows), CLASSES)
    assert pictures.shape == (2, 3, *size)


def test_windows_are_for_larger_pictures_alone() -> None:
    model = latent_diffusion()
    for size, same in (((16, 16), True), ((32, 16), False)):
        whole, parts = (generate(model, wanted([0]), replace(PLAIN, size=size, windows=windows), CLASSES) for windows in (False, True))
        assert torch.equal(whole, parts) == same


@dataclass(frozen=True)
class Watching(Inpaint):
    """Keeps what it was given."""

    found: ClassVar[list[TaskInput]] = []

    def wrap(self, denoise: Denoise, given: TaskInput) -> Denoise:
        self.found.append(given)
        return super().wrap(denoise, given)


def test_what_a_task_is_given() -> None:
    model, x, mask = latent_diffusion(), normal(3, 13, 16).clamp(-1, 1), torch.zeros(1, 13, 16)
    mask[0, 0, 5] = 1
    mask[0, 12, 2] = 1
    Watching.found.clear()
    requests = [SampleRequest(0, SeedNoise(), {"class": "cat"}, image=InputImage(x, mask, shows={"class": "dog"}))]
    (picture,) = generate(model, requests, replace(PLAIN, task=Watching()), CLASSES, 1)
    (given,) = Watching.found
    assert torch.equal(given.measurement, x[None])
    assert torch.equal(given.image, x[None])
    assert torch.equal(given.mask, mask[None])
    padded = torch.cat([x, x[:, -1:].expand(3, 3, 16)], dim=1)[None]
    assert torch.equal(given.latents, model.latents.to_latents(padded)), "its last row repeated: the network takes multiples of 4 px"
    wanted = torch.zeros(1, 1, 8, 8)
    wanted[..., 0, 2] = 1
    wanted[..., 6:, 1] = 1
    assert torch.equal(given.latent_mask, wanted), "a latent is made anew where any of its pixels is"
    sigma = torch.tensor(1.5, dtype=torch.float64)
    shown = model.conditioner.encode({"label": torch.tensor([1])}, model.latents.to_latents)
    torch.testing.assert_close(given.source_denoise(given.latents, sigma), model.denoiser.predict(given.latents, sigma, shown))
    assert torch.equal(given.decode(given.latents), model.latents.to_images(given.latents)[..., :13, :])
    assert torch.equal(torch.where(mask == 0, picture, 0), torch.where(mask == 0, x, 0))
    with pytest.raises(ValueError, match="works on an image: give --image FILE"):
        generate(model, of({"class": "cat"}), replace(PLAIN, task=Watching()), CLASSES)


def test_a_chunk_has_conditions_or_none() -> None:
    """Guidance asks the model twice for the former, in one call of twice the batch, which rounds differently."""
    cat = {"class": "cat"}
    requests = [*of(cat, cat, {}, {}), *of({}, negative=cat), *of(Mix({}, cat, 0.5), cat)]
    assert [len(some) for some in chunks(requests, 8)] == [2, 2, 3]
    assert [len(some) for some in chunks(requests, 2)] == [2, 2, 2, 1]


def test_a_chunk_has_images_of_one_size() -> None:
    small, large = (InputImage(torch.zeros(3, side, 16)) for side in (8, 16))
    requests = [SampleRequest(i, SeedNoise(), image=image) for i, image in enumerate([small] * 3 + [large] * 3 + [small])]
    assert [[request.index for request in some] for some in chunks(requests, 2)] == [[0, 1], [2], [3, 4], [5], [6]]


# ---------------------------------------------------------------------------------------------------------------------
# How pictures are sampled, as a card stores it
# ---------------------------------------------------------------------------------------------------------------------


def test_a_card_brings_its_sampling_configuration_back() -> None:
    config = SamplingConfig(Ancestral(0.5), CFG(2.0, low=0.1), [999, 500, 1], "karras")
    card = {"sampling": config.described()}
    assert SamplingConfig.of(card) == config
    assert config.num_steps == 3
    old = {
        "recipe": {
            **describe({"sampler": config.sampler, "guidance": config.guidance}),
            "steps": 7,
            "spacing": "trailing",
            "windows": False,
        }
    }
    assert SamplingConfig.of(old) == SamplingConfig(config.sampler, config.guidance, 7), "cards of earlier versions"
