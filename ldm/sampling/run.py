"""A plan becomes pictures in a folder: chunk by chunk, each written as soon as it is made."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.autoencoder.tiling import Tiled
from ldm.data.film_writer import write_film
from ldm.data.films import VIDEO, timing_of
from ldm.data.sources.trees import MANIFEST
from ldm.data.transforms import grid
from ldm.devices import computing, sampling_precision
from ldm.errors import Stopped, UserError
from ldm.files import write_atomically
from ldm.frames import side_by_side
from ldm.latents.model import LatentDiffusion
from ldm.model_folder import Loaded
from ldm.ranges import ValueRange, to_uint8
from ldm.sampling.job import GRID, OutputFolder
from ldm.sampling.pipeline import default_chunk_size, each_chunk, generate, require_finite
from ldm.sampling.plan import Plan, picture_size
from ldm.sampling.request import PRECISIONS, SampleRequest
from ldm.sampling.settings import settings_of
from ldm.sampling.tasks import Inpaint
from ldm.sampling.watermark import SMALLEST, mark
from ldm.sampling.writer import frames_in, picture_path, png, write_trajectory
from ldm.signals import Interrupted, Signals

PREVIEWED = 16  # pictures in preview.png
WRITERS = 4  # threads that write pictures beside a GPU
BAR = "{l_bar}{bar}| {n:.4g}/{total} [{elapsed}<{remaining}, {rate_fmt}]"  # n is a fraction while pictures are in work


@dataclass(frozen=True)
class OutputConfig:
    """How pictures are made and stored, without a change to what they show (chunk_size, precision: their last bits; tile: hardly).

    trajectory: so many images of how each picture comes about.  tile: px of the tiles in which large images are encoded and decoded.
    columns: of grid.png.  preview: write preview.png after every step.  chunk_size: pictures per network call, precision: None: as the
    device likes.
    """

    overwrite: bool = False
    watermark: bool = True
    trajectory: int = 0
    preview: bool = False
    columns: int = 0
    tile: int = 0
    chunk_size: int | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("trajectory", 0), ("columns", 0), ("tile", 0), ("chunk_size", 1)):
            if (getattr(self, name) or least) < least:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; allowed is {least} or more")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision}; allowed are {', '.join(PRECISIONS)}")


class Job:
    """The pictures of a plan that are not in a folder yet."""

    def __init__(self, loaded: Loaded, plan: Plan, folder: Path, output: OutputConfig) -> None:
        self.loaded, self.plan, self.output, self.model = loaded, plan, output, loaded.model
        self.frames, self.values = self.model.denoiser.network.frames, ValueRange.of(loaded.card)
        self.device = self.model.latents.shift.device
        self.images = output.chunk_size or default_chunk_size(self.device)  # per network call
        self.precision = output.precision or sampling_precision(self.device)
        # watermark and PNG are made while a GPU is at work on the next pictures; on a CPU threads make pictures already
        self._pool = ThreadPoolExecutor(WRITERS) if self.device.type == "cuda" else None
        self._writing = list[Future[None]]()
        self.chunk_size = max(1, self.images // self.frames)
        self._marks: dict[torch.Size | None, bool] = {}  # whether pictures get a watermark, by the shape of their image
        self.folder = OutputFolder(folder, self.settings, output.overwrite)
        beside = ["preview.png"] if output.preview else []
        beside += ["*-steps.png", "*.gif"] if output.trajectory else []
        beside += ["*.npy"] if self.values.is_array else []
        beside += ["*.webp"] if self.frames > 1 else []
        beside += ["animation.webp", "animation.mp4"] if any(request.image is not None for request in plan.requests[1:]) else []
        self.pending = self.folder.pending(plan.requests, beside)
        self.notes = list(plan.notes)
        if output.watermark and self.values.is_deep:
            self.notes.append("pictures of 16 bits get no watermark, which is one of 8 bits")
        elif output.watermark and not all(self._gets_mark(request) for request in plan.requests[:1]):
            self.notes.append(f"pictures of less than {SMALLEST} px are too small for a watermark: they get none")
        self.done = 0
        self._shown: dict[int, Tensor] = {}  # what preview.png shows, by the picture's index
        self._lock = threading.Lock()  # pictures may be made by several threads

    def settings(self, request: SampleRequest) -> dict[str, Any]:
        """What the picture of a request says of itself."""
        output = self.output
        extra: dict[str, Any] = {"watermark": self._gets_mark(request), "chunk_size": self.images}
        extra |= {"tile": output.tile} if output.tile else {}
        extra |= {} if self.values.is_default else {"values": self.values.as_card()}
        extra |= {"precision": self.precision} if self.precision != "32-true" else {}
        return settings_of(request, self.plan.config, self.loaded.sha256, extra)

    def make(self, some: list[SampleRequest], on_step: Callable[[float], Any]) -> None:
        """Make and write these pictures, one chunk; on_step gets how many pictures each step is worth."""
        denoised = list[Tensor]()

        def watch(z0: Tensor) -> None:
            if self.output.trajectory:
                denoised.append(z0[: len(some)])
            if self.output.preview:
                self._preview(some, z0)

        step, classes = partial(on_step, len(some) / self.plan.config.num_steps), self.loaded.card["classes"]
        with computing(self.device, self.precision):
            pictures = generate(self.model, some, self.plan.config, classes, self.chunk_size, step, watch)
        require_finite(some, pictures)
        shown = [self._trajectory([z0[i] for z0 in denoised]) for i in range(len(some))] if denoised else [None] * len(some)
        writes = [partial(self._write, *each) for each in zip(some, self.values.to_pixels(pictures).cpu(), pictures, shown, strict=True)]
        if self._pool is None:
            for write in writes:
                write()
        else:
            self.settle()  # at most one chunk waits in memory
            self._writing = [self._pool.submit(write) for write in writes]

    def settle(self) -> None:
        """Wait until all pictures that are made are written."""
        writing, self._writing = self._writing, []
        for future in writing:
            future.result()

    def finish(self) -> None:
        """Manifest and grid."""
        self.folder.finish(self.plan.requests, self.output.columns)

    def summary(self) -> str:
        """What was made and what was there, in one line."""
        made, folder = len(self.pending), self.folder.folder
        there = len(self.plan.requests) - made
        return f"{made} picture{'s' * (made != 1)} made, {there} were there: {folder / GRID}, {folder / MANIFEST}"

    def _trajectory(self, denoised: list[Tensor]) -> Tensor:
        """uint8 (K,C,H,W) of how a picture came about."""
        places = torch.linspace(0, len(denoised) - 1, self.output.trajectory).round().long().tolist()
        return to_uint8(self.model.latents.to_images(torch.stack([denoised[place] for place in places])).clamp(-1, 1)).cpu()

    def _write(self, request: SampleRequest, pixels: Tensor, picture: Tensor, trajectory: Tensor | None) -> None:
        frames = list(pixels.unflatten(0, (self.frames, -1)))
        if self._gets_mark(request):
            anew = self._made_anew(request)
            frames = [mark(frame, anew) for frame in frames]
        if trajectory is not None:
            write_trajectory(picture_path(self.folder.folder, request.index), trajectory, self.frames)
        self.folder.write(request, frames, self.values.to_values(picture) if self.values.is_array else None)
        with self._lock:
            self.done += 1

    def _gets_mark(self, request: SampleRequest) -> bool:
        shape = None if request.image is None else request.image.pixels.shape
        if shape not in self._marks:  # asked several times for every picture
            large = min(picture_size(self.model, self.plan.config, request.image)) >= SMALLEST
            self._marks[shape] = self.output.watermark and large and not self.values.is_deep
        return self._marks[shape]

    def _made_anew(self, request: SampleRequest) -> Tensor | None:
        """(H,W), True where the picture is not the given image's; None: everywhere."""
        task, image = self.plan.config.task, request.image
        if image is None or not isinstance(task, Inpaint):
            return None
        given = torch.ones_like(image.pixels[:1]) if image.mask is None else image.mask
        return task.canvas(image.pixels[None], given[None])[1][0, 0] > 0

    def _preview(self, some: list[SampleRequest], z0: Tensor) -> None:
        """preview.png of the newest pictures, in the order of their indices."""
        images = side_by_side(to_uint8(self.model.latents.to_images(z0[: len(some)]).clamp(-1, 1)).cpu(), self.frames)
        with self._lock:
            for request, image in zip(some, images, strict=True):
                self._shown[request.index] = image
            newest = sorted(self._shown)[-PREVIEWED:]
            self._shown = {index: self._shown[index] for index in newest if self._shown[index].shape == images[0].shape}
            data = png(grid(torch.stack(list(self._shown.values())), 1 if self.frames > 1 else 4), {"preview": True})
            write_atomically(self.folder.folder / "preview.png", data)


def tiled(model: LatentDiffusion, tile: int) -> LatentDiffusion:
    """The model with an autoencoder that works tile by tile, where tile (px) is not 0."""
    if tile:
        latents = model.latents
        factor = latents.autoencoder.factor
        latents.autoencoder = Tiled(latents.autoencoder, tile, max(1, tile // 4 // factor) * factor)
    return model


def advance(bar: Any, share: float) -> None:
    """Move a bar of tqdm by a fraction of a picture, not past its end, which rounding may bring."""
    bar.update(min(share, bar.total - bar.n))


def run(job: Job) -> None:
    """All pending pictures on the model's device, with a progress bar; a signal ends it at the next step, and what is made is kept."""
    with Signals() as signals, tqdm(total=len(job.pending), desc="Sampling", unit="img", bar_format=BAR) as bar:

        def on_step(share: float) -> None:
            if signals.number:
                raise Interrupted
            advance(bar, share)

        try:
            for _ in each_chunk(job.model, job.pending, job.chunk_size, lambda some: job.make(some, on_step)):
                bar.n = job.done  # exactly, whatever the steps were worth
                bar.refresh()
        except Interrupted:
            pass
        job.settle()
    if job.done < len(job.pending):
        job.finish()
        there, count = len(job.plan.requests) - len(job.pending) + job.done, len(job.plan.requests)
        where = job.folder.folder
        raise Stopped(signals.number, f"stopped, {there} of {count} pictures are in {where}; the same command makes the rest")


def write_animation(job: Job, source: str) -> list[str]:
    """Where `source`, the image of the plan, is a film: its pictures as one, at its pace; sentences on what was not kept."""
    requests, film = job.plan.requests, Path(source)
    if len({str(request.image and request.image.facts) for request in requests}) < 2:
        return []
    pictures = [frame for request in requests for frame in frames_in(picture_path(job.folder.folder, request.index), job.frames)]
    timing, suffix = timing_of(film), ".mp4" if film.suffix.lower() in VIDEO else ".webp"
    note = write_film(pictures, job.folder.folder / f"animation{suffix}", timing.milliseconds, timing.loop, timing.sound)
    return [] if note is None else [note]
