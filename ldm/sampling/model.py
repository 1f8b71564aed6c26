"""The Python API: a trained model, ready to sample.  The command line does nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Unpack

from ldm import model_folder, registry
from ldm.conditioning.values import condition_of
from ldm.data.modes import as_tensor
from ldm.data.records import Record
from ldm.data.transforms import as_image, grid
from ldm.degradations import Downscale
from ldm.devices import computing, sampling_precision
from ldm.diffusion.samplers import RePaint
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError, nearest
from ldm.interfaces import Condition, Denoiser, Guidance, Sampler
from ldm.latents.model import LatentDiffusion
from ldm.ranges import ValueRange
from ldm.sampling.inputs import ImageLike, read_images
from ldm.sampling.pipeline import default_chunk_size, each_chunk, generate, require_finite
from ldm.sampling.plan import Plan, SampleOptions, image_format, plan
from ldm.sampling.request import SampleRequest
from ldm.sampling.run import BAR, advance
from ldm.sampling.settings import settings_of
from ldm.sampling.tasks import Between, ImageToImage, Inpaint, Outpaint, Restore
from ldm.sampling.writer import png

Callback: TypeAlias = Callable[[float, Tensor], Any]


class SampleArguments(TypedDict, total=False):
    """What every method of Model that makes pictures takes besides its own arguments; what is left out is the model's choice.

    classes, prompt: what the pictures show, taken in turn.  numbers: attributes by name.  negative: a class or prompt that guidance leads
    away from.  n: how many pictures.  seed: picture i depends on (seed, i) and its settings alone.  sampler: an object or its name.
    guidance: an object or the scale of the model's own.  size: (width, height) in px.  progress: show a bar.
    callback(done, images): after every step, how many pictures' worth of work is done, and the pictures in work, (B,3,H,W) in 0..1.
    """

    classes: Sequence[str | int] | str
    prompt: Sequence[str] | str
    numbers: dict[str, float]
    negative: str | int
    unconditional: bool
    n: int
    per_class: int
    seed: int
    first: int
    steps: int | list[float]
    sampler: Sampler | str
    guidance: Guidance | float
    spacing: Spacing
    size: tuple[int, int]
    windows: bool
    chunk_size: int
    precision: str
    progress: bool
    callback: Callback


class Picture:
    """One picture: `pil`, `tensor` (C,H,W) in 0..1, `pixels` uint8 (C,H,W), or uint16 of models of more than 8 bits, `values` in the
    units of the data, and the `settings` that made it; a notebook shows it."""

    def __init__(self, x: Tensor, settings: dict[str, Any], values: ValueRange = ValueRange()) -> None:  # noqa: B008  frozen
        self._x, self._range, self.settings = x.clamp(-1, 1).cpu(), values, settings
        self.pixels = values.to_pixels(self._x)

    @property
    def values(self) -> np.ndarray:
        return self._range.to_values(self._x)

    @property
    def shown(self) -> Tensor:
        """uint8 (C,H,W), whatever the model's values are."""
        return self._range.to_shown(self.pixels)

    @property
    def pil(self) -> Image.Image:
        return as_image(self.pixels)

    @property
    def tensor(self) -> Tensor:
        if self.pixels.dtype == torch.uint8:
            return self.pixels.float() / 255
        return (self._x.float() + 1) / 2

    def save(self, path: str | Path) -> None:
        """A PNG file with the settings inside, of which `ldm again` makes the same picture."""
        Path(path).write_bytes(png(self.pixels, self.settings))

    def _repr_png_(self) -> bytes:
        return png(self.pixels)

    def __repr__(self) -> str:
        return f"Picture({self.pixels.shape[2]}x{self.pixels.shape[1]} px, {self.settings.get('condition') or 'no condition'})"


class Pictures(Sequence[Picture]):
    """Several pictures; `tensor` (N,3,H,W) in 0..1 where they are of one size; a notebook shows them as a grid."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._pictures = list(pictures)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> "Pictures": ...
    def __getitem__(self, index: int | slice) -> "Picture | Pictures":
        return Pictures(self._pictures[index]) if isinstance(index, slice) else self._pictures[index]

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def tensor(self) -> Tensor:
        return torch.stack([picture.tensor for picture in self])

    @property
    def pil(self) -> list[Image.Image]:
        return [picture.pil for picture in self]

    def grid(self, columns: int = 0) -> Image.Image:
        """All in one image, about square without `columns`."""
        return as_image(grid(torch.stack([picture.shown for picture in self]), columns or max(1, round(len(self) ** 0.5))))

    def save(self, folder: str | Path) -> None:
        """<index>.png for each."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for picture in self:
            picture.save(Path(folder) / f"{picture.settings['index']}.png")

    def _repr_png_(self) -> bytes:
        return png(as_tensor(self.grid()))

    def __repr__(self) -> str:
        return f"Pictures({len(self)} of {self[0]!r})" if self._pictures else "Pictures(none)"


class Model:
    """A trained latent diffusion model on a device.

    loaded: what model_folder.load gives.  device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.
    """

    def __init__(self, loaded: model_folder.Loaded, device: str = "auto") -> None:
        if not isinstance(loaded.model, LatentDiffusion):
            raise UserError(
                f"this is a {type(loaded.model).__name__}, which makes no pictures: give a model of stage 2, such as RUN/diffusion/model"
            )
        self.loaded, self.device = loaded, device_of(device)
        self.network: LatentDiffusion = loaded.model.to(self.device).eval()
        self.classes: list[str] = list(loaded.card["classes"])
        self.values = ValueRange.of(loaded.card)

    @property
    def denoiser(self) -> Denoiser:
        """D(x, sigma) with its schedule and network: x (B,C,h,w) normalised latents with noise of deviation sigma -> E[z0 | x]."""
        return self.network.denoiser

    def __repr__(self) -> str:
        size, takes = self.loaded.card["size"], ", ".join(self.network.conditioner.inputs) or "no condition"
        return f"Model({size}x{size} px, takes {takes}, {len(self.classes)} classes, on {self.device})"

    def condition_of(self, record: Record) -> Condition:
        """What to ask for, to get what an image of a data set shows; its class only if the model knows it."""
        label = record.label if record.label in self.classes else None
        return condition_of(self.network.conditioner, label, record.text, record.numbers)

    def plan(self, options: SampleOptions, default_n: int = 4) -> Plan:
        """Requests for what is asked, with the model's choices filled in and the guidance's second model loaded."""
        made = plan(self.loaded, options, default_n)
        return replace(made, config=made.config.resolved(self.network.latents))

    def sample(self, **arguments: Unpack[SampleArguments]) -> Pictures:
        """New pictures."""
        return self._make({}, arguments)

    def image_to_image(self, image: ImageLike, strength: float = 0.6, **arguments: Unpack[SampleArguments]) -> Pictures:
        """Pictures like an image; strength 0 is the image, 1 nothing of it (SDEdit, arXiv:2108.01073)."""
        return self._make({"task": ImageToImage(strength), "image": image}, arguments)

    def inpaint(
        self, image: ImageLike, mask: ImageLike, strength: float = 1.0, repaint: int = 1, **arguments: Unpack[SampleArguments]
    ) -> Pictures:
        """The mask's white part of an image made anew, the rest bit for bit as it was; repaint: each step so many times (RePaint)."""
        sampler = {"sampler": RePaint(times=repaint)} if repaint > 1 else {}
        return self._make({"task": Inpaint(strength), "image": image, "mask": mask, **sampler}, arguments)

    def outpaint(
        self, image: ImageLike, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, **arguments: Unpack[SampleArguments]
    ) -> Pictures:
        """The image with so many px added on its sides."""
        return self._make({"task": Outpaint(left=left, right=right, top=top, bottom=bottom), "image": image}, arguments)

    def upscale(self, image: ImageLike, factor: int = 4, **arguments: Unpack[SampleArguments]) -> Pictures:
        """Pictures `factor` times larger of which the image is a small version."""
        own = self.network.conditioner.image
        task = {} if own is not None and own.downscale == factor else {"task": Restore(Downscale(factor))}
        return self._make({**task, "image": image}, arguments)

    def interpolate(
        self, *, seeds: tuple[int, int] | None = None, images: tuple[ImageLike, ImageLike] | None = None,
        conditions: tuple[str | int, str | int] | None = None, **arguments: Unpack[SampleArguments],
    ) -> Pictures:  # fmt: skip
        """n pictures from one to another: two seeds, two images (best with guidance 1) or two classes or prompts."""
        if sum(pair is not None for pair in (seeds, images, conditions)) != 1:
            raise UserError("interpolate goes between two seeds, two images or two conditions: give one of these pairs")
        if seeds is not None:
            return self._make({"seed": seeds[0], "to_seed": seeds[1]}, arguments)
        if images is not None:
            return self._make({"task": Between(), "image": images[0], "to_image": images[1]}, arguments)
        assert conditions is not None
        kind = "classes" if self.network.conditioner.num_classes else "prompts"
        return self._make({kind: [conditions[0]], "to_condition": conditions[1]}, arguments)

    @torch.no_grad()
    def encode(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Normalised latents (N,C,h,w) of images of one size whose sides are multiples of the autoencoder's factor."""
        several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        pixels = [known.pixels for image in several for known in read_images(image, image_format(self.loaded))[0]]
        return self.network.latents.to_latents(torch.stack(pixels).to(self.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Pictures:
        """Pictures of normalised latents (N,C,h,w)."""
        images = self.network.latents.to_images(latents.to(self.device))
        return Pictures([Picture(x, {"index": i}, self.values) for i, x in enumerate(images)])

    def _make(self, chosen: dict[str, Any], arguments: SampleArguments) -> Pictures:
        known = {**arguments}
        progress, callback = known.pop("progress", True), known.pop("callback", None)
        chunk_size: Any = known.pop("chunk_size", None) or default_chunk_size(self.device)
        precision: Any = known.pop("precision", None) or sampling_precision(self.device)
        made = self.plan(options_of({**chosen, **known}))
        return Pictures(self._pictures(made, chunk_size, precision, bool(progress), callback))  # type: ignore[arg-type]

    def _pictures(self, made: Plan, chunk_size: int, precision: str, progress: bool, callback: Callback | None) -> list[Picture]:
        extra: dict[str, Any] = {"chunk_size": chunk_size}
        extra |= {"precision": precision} if precision != "32-true" else {}
        extra |= {} if self.values.is_default else {"values": self.values.as_card()}
        chunk_size = max(1, chunk_size // self.network.denoiser.network.frames)
        with tqdm(total=len(made.requests), desc="Sampling", unit="img", bar_format=BAR, disable=not progress) as bar:

            def make(some: list[SampleRequest]) -> list[Picture]:
                def watch(z0: Tensor) -> None:
                    if callback is not None:
                        callback(bar.n, (self.network.latents.to_images(z0[: len(some)]).clamp(-1, 1) + 1) / 2)

                step = partial(advance, bar, len(some) / made.config.num_steps)
                with computing(self.device, precision):
                    pictures = generate(self.network, some, made.config, self.classes, chunk_size, step, watch)
                require_finite(some, pictures)
                settings = [settings_of(request, made.config, self.loaded.sha256, extra) for request in some]
                return [Picture(*both, self.values) for both in zip(pictures, settings, strict=True)]

            return [picture for part in each_chunk(self.network, made.requests, chunk_size, make) for picture in part]


def load(model: str | Path, device: str = "auto", trusted: Sequence[str] = ()) -> Model:
    """A trained model: a model folder, a run, a checkpoint, or the name of a shipped model (`emoji`).

    trusted: packages beside ldm whose classes the model may name.
    """
    return Model(model_folder.load(model, trusted), device)


def options_of(arguments: dict[str, Any]) -> SampleOptions:
    """SampleOptions of the Python API's arguments, in which one value stands for a list of one and a name for a sampler."""
    known = dict(arguments)
    if "prompt" in known:
        known["prompts"] = known.pop("prompt")
    for name in ("classes", "prompts"):
        if isinstance(known.get(name), str):
            known[name] = [known[name]]
    if isinstance(known.get("sampler"), str):
        known["sampler"] = registry.find(Sampler, known["sampler"], "sampler", ("diffusion",))()  # type: ignore[type-abstract]
    if known.get("size") is not None:
        known["size"] = (known["size"][1], known["size"][0])
    allowed = [one.name for one in fields(SampleOptions)]
    if unknown := [name for name in known if name not in allowed]:
        raise UserError(f"there is no argument {unknown[0]!r}; allowed are {nearest(unknown[0], allowed, 30)}")
    return SampleOptions(**known)


def device_of(name: str) -> torch.device:
    """A device by the user's word; a UserError where it is not there."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = {"auto": best, "gpu": "cuda"}.get(name, name)
    if kind.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"device is {name!r}; allowed are auto, cpu, cuda, mps")
    device = torch.device(kind)
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= there:
        raise UserError(f"device is {name!r}, which this machine does not have: choose auto or cpu")
    return device
