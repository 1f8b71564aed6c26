"""From what a user asks for to requests (ldm/sampling/plan.py)."""

from typing import Any

import pytest
import torch
from toys import autoencoder

from ldm.conditioning.composite import CompositeConditioner
from ldm.conditioning.label import ClassLabel, Unconditional
from ldm.conditioning.numbers import Numbers
from ldm.diffusion.guidance import CFG
from ldm.diffusion.samplers import DDIM
from ldm.diffusion.schedule import LDMSchedule
from ldm.errors import UserError
from ldm.interfaces import Conditioner
from ldm.latents.model import LatentDiffusion
from ldm.model_folder import Loaded
from ldm.nn.unet import UNet
from ldm.sampling.plan import Plan, SampleOptions, plan
from ldm.sampling.request import Mix, SamplingConfig, SeedNoise, Slerp


def loaded(conditioner: Conditioner, *names: str) -> Loaded:
    model = LatentDiffusion(autoencoder(), UNet(2, 8, (1,), 1, (), vector_dim=conditioner.vector_dim), conditioner, LDMSchedule(50))
    model.latents.measure(torch.zeros(2), torch.ones(2), 1, (8, 8))
    return Loaded(model, {"classes": list(names), "size": 16, "sampling": SamplingConfig(guidance=CFG(2.0), steps=7).described()}, "0")


def both() -> Loaded:
    """A model of three classes and two numbers."""
    return loaded(CompositeConditioner([ClassLabel(3, 6), Numbers({"age": [0, 100], "dose": [0, 1]}, 8)]), "a", "b", "c/d")


def conditions(model: Loaded, **options: Any) -> list[Any]:
    return [request.condition for request in plan(model, SampleOptions(**options)).requests]


def test_classes_and_numbers_of_each_picture() -> None:
    model = both()
    assert conditions(model, numbers={"age": 3}, classes=["b"], n=2) == [{"class": "b", "age": 3.0}] * 2
    assert conditions(model, classes=["a", "d"], n=3) == [{"class": "a"}, {"class": "c/d"}, {"class": "a"}], "in turn, by their whole names"
    assert conditions(model, numbers={"age": 3}, n=1) == [{"age": 3.0}]
    assert sorted(condition["class"] for condition in conditions(model, n=3)) == ["a", "b", "c/d"], "all classes, if nothing is asked for"
    assert conditions(model, unconditional=True, n=1) == [{}]
    assert conditions(model, classes=["a", 1], per_class=2) == [{"class": "a"}] * 2 + [{"class": "b"}] * 2
    assert conditions(loaded(Unconditional()), n=2) == [{}, {}]
    assert len(conditions(model)) == 4, "four, if nothing is said"
    groups = loaded(ClassLabel(3, 6), "cat/big", "cat/small", "dog")
    assert [condition["class"] for condition in conditions(groups, classes=["cat", "dog"], n=4)] == ["cat/big", "dog", "cat/small", "dog"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["age=3|dose=1"]}, r"^a prompt was given \('age=3\|dose=1'\), but this model takes no text, it takes a class, age"),
        ({"classes": ["e"]}, "^class 'e' is unknown; allowed: a, b, d$"),
        ({"numbers": {"weight": 3}}, "^this model takes no weight, 3 was given: it takes a class, age"),
        ({"classes": ["a"], "unconditional": True}, "together with --unconditional: leave one out$"),
        ({"classes": ["a", "b"], "to_seed": 1}, "have one class or prompt, several were given: choose one$"),
        ({"mask": "x.png"}, "^--mask needs an image: give --image FILE$"),
        ({"steps": 51}, "^51 sampling steps were asked for; this schedule allows 1 to 50$"),
        ({"seed": -1}, "^seed is -1; allowed is 0"),
    ],
)
def test_what_contradicts_itself_or_the_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(both(), SampleOptions(n=2, **options))


def test_models_without_classes_are_not_asked_for_them() -> None:
    numbers = loaded(Numbers({"age": [0, 100]}, 8))
    with pytest.raises(UserError, match=r"^a class was given \('a'\), but this model takes age \(0 to 100\): use --prompt or --numbers"):
        plan(numbers, SampleOptions(classes=["a"]))
    with pytest.raises(UserError, match=r"^per_class is 3, but no classes were given and this model knows none: give --n instead$"):
        plan(numbers, SampleOptions(per_class=3, numbers={"age": 1}))


def test_the_models_own_choice_holds_unless_asked_otherwise() -> None:
    model = both()
    assert plan(model, SampleOptions()).config == SamplingConfig(guidance=CFG(2.0), steps=7)
    chosen = plan(model, SampleOptions(steps=[40, 3], guidance=3.5, sampler=DDIM(), spacing="log", size=(8, 24), windows=False)).config
    assert chosen == SamplingConfig(DDIM(), CFG(3.5), [40, 3], "log", None, (8, 24), False)


def test_noise_and_indices() -> None:
    def noises(made: Plan) -> list[Any]:
        return [request.noise for request in made.requests]

    model = both()
    made = plan(model, SampleOptions(seed=5, first=3, n=2))
    assert [request.index for request in made.requests] == [3, 4]
    assert noises(made) == [SeedNoise(5, 3), SeedNoise(5, 4)]
    made = plan(model, SampleOptions(seed=5, to_seed=6, n=3, classes=["a"]))
    assert noises(made) == [Slerp(SeedNoise(5), SeedNoise(6), weight) for weight in (0, 0.5, 1)]
    made = plan(model, SampleOptions(seed=5, classes=["a"], to_condition="b", n=3))
    assert noises(made) == [SeedNoise(5)] * 3, "one noise on the way from one condition to another"
    assert [request.condition for request in made.requests] == [Mix({"class": "a"}, {"class": "b"}, weight) for weight in (0, 0.5, 1)]
    (request,) = plan(model, SampleOptions(classes=["a"], to_condition="b", n=1)).requests
    assert request.condition == Mix({"class": "a"}, {"class": "b"}, 0.5)
    made = plan(model, SampleOptions(n=2, classes=["a"], negative="b"))
    assert [request.negative for request in made.requests] == [{"class": "b"}] * 2
