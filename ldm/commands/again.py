"""ldm again: a picture once more, from the settings that it carries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.commands.sample import make
from ldm.conditioning.values import checked
from ldm.console.options import DEVICE, Option, parse, path, switch, warn
from ldm.errors import UserError
from ldm.interfaces import Condition
from ldm.sampling.inputs import read_images
from ldm.sampling.model import Model, load
from ldm.sampling.pipeline import inputs_of
from ldm.sampling.plan import Plan, as_condition, image_format, image_size
from ldm.sampling.request import InputImage, Mix, SamplingConfig
from ldm.sampling.run import OutputConfig
from ldm.sampling.settings import StoredSettings

OPTIONS = [
    Option("picture", "PNG file that `ldm sample` wrote", path),
    Option("model", "the model that made it: folder, checkpoint or name of a shipped model", path),
    Option("--image", "the image that it was made from, if any", path, None, "FILE"),
    Option("--mask", "and the mask", path, None, "FILE"),
    Option("--to-image", "and the second image", path, None, "FILE"),
    Option("--guide-model", "and the second model of its guidance, if that is no shipped one", path, None, "MODEL"),
    Option("--out", "folder for the picture; default: again", path, "again", "FOLDER"),
    Option("--overwrite", "replace another picture of that name there", switch, False),
    DEVICE,
]


def main(command: str, arguments: list[str]) -> int:
    about = "Make a picture once more; on the same kind of device it has the same pixels."
    values = parse(command, about, OPTIONS, arguments, {"--towards": "--to-image"})
    picture = Path(values["picture"])
    stored, model = StoredSettings.read(picture), load(values["model"], values["device"])
    if model.loaded.sha256 != stored.model_sha256:
        theirs, ours = stored.model_sha256[:12], model.loaded.sha256[:12]
        raise UserError(f"{picture} was made by another model: its sha256 begins with {theirs}, that of {values['model']!r} with {ours}")
    config = stored.with_companion(values["guide_model"]).resolved(model.network.latents)
    if stored.old and (config.task is not None or stored.watermark):
        warn("an older version of ldm made this picture: strength, restoration and watermark were others, it will not be quite the same")
    request, classes, inputs = stored.request, model.classes, inputs_of(model.network, config, model.classes)

    def in_words(known: Condition) -> Condition:
        """Of an older version: one word, which is a class or a text."""
        return as_condition(inputs, classes, known["word"]) if set(known) == {"word"} else checked(inputs, known, classes)  # type: ignore[arg-type]

    condition = request.condition
    mixed = Mix(in_words(condition.a), in_words(condition.b), condition.weight) if isinstance(condition, Mix) else in_words(condition)
    negative = None if request.negative is None else in_words(request.negative)
    request = replace(request, condition=mixed, negative=negative, image=_image(stored, config, model, values))
    output = OutputConfig(values["overwrite"], stored.watermark, tile=stored.tile, chunk_size=stored.chunk_size, precision=stored.precision)
    return make(model, Plan([request], config, []), {"out": values["out"], "devices": "1", "num_nodes": 1}, output)


def _image(stored: StoredSettings, config: SamplingConfig, model: Model, values: dict[str, Any]) -> InputImage | None:
    """The image that the picture was made from."""
    if "image" not in stored.facts:
        return None
    if values["image"] is None:
        raise UserError(f"{values['picture']} was made from the image {stored.facts['image']}: give it with --image")
    trained = (model.loaded.card["size"], model.loaded.card["size"]) if stored.old else None
    size = image_size(model.loaded, config, stored.size or trained)
    images, _ = read_images(values["image"], image_format(model.loaded), values["mask"], values["to_image"], stored.shows, size)
    return replace(stored.matching(images), weight=stored.weight)
