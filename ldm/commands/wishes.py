"""What users want to see, in words and files, as requests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.commands.sources import read_sources
from ldm.data.datasets import Record
from ldm.interfaces import Conditioner
from ldm.model_folder import Loaded
from ldm.stages.generation import Recipe, Request, Source


@dataclass(frozen=True)
class Wish:
    """The pictures that a command is to make; its fields are the options of `sample` and `predict`.

    num: None where the user gave none.  classes: None for all that the model knows, evenly spread (of an image: no condition), an empty
    list for no condition.
    """

    num: int | None
    seed: int = 0
    first: int = 0
    prompts: Sequence[str] = ()
    classes: Sequence[str] | None = None
    per_class: int = 0
    negative: str | int | None = None
    image: str | None = None
    mask: str | None = None
    shows: str | int | None = None
    towards: str | None = None
    between: int | None = None
    mix: str | None = None

    def requests(self, loaded: Loaded, recipe: Recipe, num: int) -> list[Request]:
        """num: how many pictures if the user does not say."""
        for name, seed in (("seed", self.seed), ("between", self.between or 0), ("first", self.first)):
            if seed < 0:
                raise ValueError(f"{name} is {seed}; allowed is 0 or more")
        files: dict[str, Any] = {"mask": self.mask, "shows": self.shows, "towards": self.towards}
        for name, given in files.items():
            if given is not None and self.image is None:
                raise ValueError(f"--{name} needs an image: give --image FILE")
        sources: list[Source] = [] if self.image is None else list(read_sources(loaded, recipe, self.image, **files))
        film = len(sources) > 1
        if film and (self.num is not None or self.per_class):
            given = self.per_class or self.num
            raise ValueError(f"{self.image!r} has {len(sources)} frames, each of which becomes a picture: leave the number {given} out")
        classes = [] if self.classes is None and not self.prompts and sources else self.classes
        count = len(sources) if film else num if self.num is None else self.num
        wanted = conditions(loaded, self.prompts, classes, count, self.per_class)
        going = self.between is not None or self.mix is not None or self.towards is not None
        if (film or going) and len(set(wanted)) > 1 and (self.prompts or classes):
            what = "the frames of a film" if film else "pictures that go from one to another"
            raise ValueError(f"{what} have one class or prompt, {len(set(wanted))} were given: choose one")
        requests = [
            Request(self.first + i, self.seed, condition, self.negative, sources[i % len(sources)] if sources else None)
            for i, condition in enumerate(wanted)
        ]
        if not film and not going:
            return requests
        # one condition, and one noise for all but images that are gone between
        noise = self.between if self.between is not None else self.seed if film or self.mix is not None else None
        requests = [replace(request, condition=wanted[0], towards=noise, mixed=self.mix) for request in requests]
        if self.towards is not None:  # the noise that makes an image under a condition is found under that
            requests = [replace(r, source=r.source and r.source._replace(shows=self.shows or wanted[0])) for r in requests]
        return [replace(r, share=share_of(i, len(requests))) for i, r in enumerate(requests)] if going else requests


def share_of(i: int, n: int) -> float:
    """The share of the second of two ends in picture i of n."""
    return 0.5 if n == 1 else i / (n - 1)


def conditions(loaded: Loaded, prompts: Sequence[str], classes: Sequence[str] | None, num: int, per_class: int = 0) -> list[str | None]:
    """What each picture shows; classes: None for all that the model knows, none for no condition."""
    conditioner, names = loaded.model.conditioner, loaded.card["classes"]
    asked = conditioner.asked()
    words = [part for part in asked if not part.num_classes]
    if prompts and not words:
        raise ValueError(
            f"a prompt was given ({prompts[0]!r}), but this model takes no text: use classes, or a model with the conditioner Text"
        )
    if classes and words and len(words) == len(asked):
        raise ValueError("classes were given, but this model takes text or numbers: use a prompt")
    if classes is None:
        labels = classes_of(names if conditioner.num_classes and not prompts else [], [], num, per_class)
    else:
        labels = classes_of(names, classes, num, per_class) if classes else [None] * num
    if not words:
        return labels
    spoken = [prompts[i % len(prompts)] if prompts else None for i in range(len(labels))]
    if len(asked) == 1:
        return spoken
    return [together(asked, label, said) if label or said else None for label, said in zip(labels, spoken, strict=True)]


def together(asked: Sequence[Conditioner], label: str | None, prompt: str | None) -> str:
    """The condition of a model with several parts, in their order: 'CLASS | PROMPT'.  The prompt has a piece for each that takes none of
    the classes, divided in the same way."""
    words = sum(not part.num_classes for part in asked)
    pieces = [""] * words if prompt is None else [piece.strip() for piece in prompt.split("|")]
    if len(pieces) != words:
        raise ValueError(f"the prompt {prompt!r} has {len(pieces)} parts divided by '|', this model takes {words}")
    rest = iter(pieces)
    return " | ".join((label or "") if part.num_classes else next(rest) for part in asked)


def said_of(loaded: Loaded, record: Record) -> str | None:
    """What to ask the model for, to get what an image of a data set shows; the class only if the model knows it."""
    label = record.label if record.label in loaded.card["classes"] else None
    return loaded.model.conditioner.ask(label, record.text, record.numbers)


def classes_of(names: Sequence[str], wanted: Sequence[str], num: int, per_class: int) -> list[str | None]:
    """One class per picture.  A wanted name that is the first part of several ("a" of "a/x", "a/y") stands for them in turn."""
    groups = [[name for name in names if name.startswith(f"{w}/")] or [w] for w in wanted] if wanted else [[name] for name in names]
    if not groups:
        return [None] * num
    if per_class:
        return [group[i % len(group)] for group in groups for i in range(per_class)]
    if not wanted:
        return [names[i * len(names) // num] for i in range(num)]
    return [groups[i % len(groups)][i // len(groups) % len(groups[i % len(groups)])] for i in range(num)]
