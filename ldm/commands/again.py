"""ldm again: a picture once more, from the settings that it carries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm import model_folder
from ldm.commands.options import DEVICE, Option, parse, path
from ldm.commands.sample import make
from ldm.errors import UserError
from ldm.interfaces import Condition
from ldm.sampling.inputs import read_images
from ldm.sampling.model import Model, load
from ldm.sampling.pipeline import inputs_of
from ldm.sampling.plan import Plan, as_condition, image_format
from ldm.sampling.request import InputImage, Mix, SamplingConfig
from ldm.sampling.run import OutputConfig
from ldm.sampling.settings import StoredSettings

OPTIONS = [
    Option("picture", "PNG file that `ldm sample` wrote", path),
    Option("model", "the model that made it: folder, checkpoint or name of a shipped model", path),
    Option("--image", "the image that it was made from, if any", path, None, "FILE"),
    Option("--mask", "and the mask", path, None, "FILE"),
    Option("--to-image", "and the second image", path, None, "FILE", old=("--towards",)),
    Option("--guide-model", "and the second model of its guidance, if that is no shipped one", path, None, "MODEL"),
    Option("--out", "folder for the picture; default: again", path, "again", "FOLDER"),
    DEVICE,
]


def main(command: str, arguments: list[str]) -> int:
    values = parse(command, "Make a picture once more; on the same kind of device it has the same pixels.", OPTIONS, arguments)
    stored = StoredSettings.read(Path(values["picture"]))
    model = load(values["model"], values["device"])
    if model.loaded.sha256 != stored.model_sha256:
        digests = [digest[:12] for digest in (stored.model_sha256, model.loaded.sha256)]
        raise UserError(
            f"{values['picture']!r} was made by another model: its sha256 begins with {digests[0]}, that of {values['model']!r} with {digests[1]}"
        )
    config = _with_own_companion(stored.config, values["guide_model"]).resolved(model.network.latents)
    request = replace(stored.request, image=_image(stored, config, model, values))
    condition, classes, inputs = request.condition, model.classes, inputs_of(model.network, config, model.classes)

    def in_words(known: Condition) -> Condition:
        """Of an older version: one word, which is a class or a text."""
        return as_condition(inputs, classes, known["word"]) if set(known) == {"word"} else known  # type: ignore[arg-type]

    mixed = Mix(in_words(condition.a), in_words(condition.b), condition.weight) if isinstance(condition, Mix) else in_words(condition)
    request = replace(request, condition=mixed, negative=None if request.negative is None else in_words(request.negative))
    output = OutputConfig(True, stored.watermark, tile=stored.tile, chunk_size=stored.chunk_size, precision=stored.precision)
    return make(model, Plan([request], config, []), {"out": values["out"], "devices": "1", "num_nodes": 1}, output)


def _with_own_companion(config: SamplingConfig, given: str | None) -> SamplingConfig:
    """The guidance with its second model from where the user says, or a shipped one: a picture's settings open no other path."""
    name = config.guidance.companion
    if name is None or ((model_folder.SHIPPED / name).is_dir() and "/" not in name):
        return config
    if given is None:
        raise UserError(f"the picture was made with the second model {name!r}: give it with --guide-model")
    field = "classifier" if config.guidance.needs_labels else "weaker"
    return replace(config, guidance=replace(config.guidance, **{field: given}))  # type: ignore[type-var]


def _image(stored: StoredSettings, config: SamplingConfig, model: Model, values: dict[str, Any]) -> InputImage | None:
    """The image that the picture was made from; a UserError where another one was given."""
    picture, facts = values["picture"], stored.facts
    if "image" not in facts:
        return None
    if values["image"] is None:
        raise UserError(f"{picture!r} was made from the image {facts['image']}: give it with --image")
    task, takes = config.task, model.network.conditioner.image
    factor = task.downscale if task else takes.downscale if takes else 1
    size = None if config.size is None else (config.size[0] // factor, config.size[1] // factor)
    images, _ = read_images(values["image"], image_format(model.loaded), values["mask"], values["to_image"], stored.shows, size)
    wrong = ["image"]
    for image in images:
        wrong = [name for name in ("image_sha256", "frame", "mask_sha256", "to_image_sha256") if image.facts.get(name) != facts.get(name)]
        if not wrong or wrong[0] not in ("image_sha256", "frame"):
            break
    if wrong:
        what = "image" if wrong[0] == "frame" else wrong[0].removesuffix("_sha256").replace("_", "-")
        raise UserError(f"{picture!r} was made with another file as {what}, or with none: give that")
    return replace(image, weight=stored.weight)
