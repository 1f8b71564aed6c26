"""ldm sample: pictures from a trained model, on one device or many.  `ldm predict` is the same command under Lightning's name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from ldm.console.options import (
    DEVICE,
    Option,
    named_numbers,
    number,
    number_or_name,
    one_of,
    parse,
    path,
    prompts,
    sides,
    size,
    steps,
    switch,
    warn,
    whole,
    words,
)  # fmt: skip
from ldm.console.shorten import at_most, limit
from ldm.degradations import Downscale, GaussianBlur, Grayscale
from ldm.diffusion.samplers import RePaint
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.interfaces import Guidance, Sampler, Task
from ldm.latents.model import LatentDiffusion
from ldm.sampling.model import Model, load
from ldm.sampling.pipeline import CHUNK_SIZE
from ldm.sampling.plan import Plan, SampleOptions
from ldm.sampling.request import PRECISIONS, SamplingConfig
from ldm.sampling.run import Job, OutputConfig, run, tiled, write_animation
from ldm.sampling.tasks import Between, Edit, ImageToImage, Inpaint, Outpaint, RemoveNoise, Restore, Style

SHOWN, HOW, IMAGE, WAY, OUTPUT, MACHINE = (
    "what the pictures show", "how they are sampled", "from an image (with --image; alone: pictures like it, or what the model is for)",
    "from one to another (the n pictures go from the first to the second)", "what is written", "machine",
)  # fmt: skip


OPTIONS = [
    Option("model", "model folder, run, checkpoint, or a shipped model: emoji", path, group=SHOWN),
    Option("--class", "class names or numbers, separated by commas, in turn; default: all, evenly spread", words, [], "NAMES", SHOWN),
    Option("--prompt", "what is to be seen, in words, for a model of texts", prompts, [], "TEXT", SHOWN),
    Option("--numbers", "numeric attributes, such as 'age=30, dose=1'", named_numbers, {}, "N=V,...", SHOWN),
    Option("--negative", "class or prompt that guidance leads away from", str, None, "NAME", SHOWN),
    Option("--unconditional", "no condition at all", switch, False, None, SHOWN),
    Option("--n", "number of pictures; default: 4, of a film one for each frame", whole(1), None, "N", SHOWN),
    Option("--per-class", "this many of each class, instead of --n", whole(0), 0, "N", SHOWN),
    Option("--seed", "picture i depends on (seed, i) and its settings alone; default: 0", whole(0), 0, "N", SHOWN),
    Option("--first", "index of the first picture; default: 0", whole(0), 0, "N", SHOWN),
    Option("--steps", "how many sampling steps, or which, such as 999,500,1; default: the model's", steps, None, "N", HOW),
    Option("--guidance", "scale, or CFG, APG, ClassifierGuidance; also --guidance.low 1", number_or_name, None, "SCALE", HOW, Guidance),
    Option("--sampler", "DDIM, DDPM, DPMSolverPP2M, UniPC, Heun, ...; also --sampler.eta 1 and the like", str, None, "NAME", HOW, Sampler),
    Option("--spacing", "of the noise levels: trailing, leading, linspace, karras, log", one_of(*get_args(Spacing)), None, "NAME", HOW),
    Option("--size", "px of the pictures, if not the training's; an image is resized to it first", size, None, "WxH", HOW),
    Option("--windows", "larger pictures of overlapping windows (--no-windows: in one piece)", switch, None, None, HOW),
    Option("--image", "file, folder of frames, or film (GIF, WebP, MP4): frame by frame with one noise", path, None, "FILE", IMAGE),
    Option("--strength", "how much is made anew, 0 (nothing) to 1 (all); default: 0.6", number, None, "S", IMAGE),
    Option("--mask", "inpaint: its white part is made anew, the rest stays", path, None, "FILE", IMAGE),
    Option("--repaint", "do each step so many times, so that what is made anew fits better (5 to 10)", whole(1), None, "N", IMAGE),
    Option("--outpaint", "px to add on the left, right, top and bottom", sides, None, "L,R,T,B", IMAGE),
    Option("--source-class", "edit: what the image shows; it is turned into --class or --prompt", str, None, "NAME", IMAGE),
    Option("--upscale", "picture so many times larger, of which the image is a small version", whole(-(2**31)), None, "N", IMAGE),
    Option("--deblur", "picture of which the image is a version with Gaussian blur of so many px", number, None, "PX", IMAGE),
    Option("--colourise", "picture of which the image is a grey version", switch, False, None, IMAGE),
    Option("--denoise", "take away noise of so many standard deviations of latents", number, None, "LEVEL", IMAGE),
    Option("--style", "new pictures in the colours of the image", switch, False, None, IMAGE),
    Option("--task", "one of these by its class; also --task.strength 0.8 and the like", str, None, "NAME", IMAGE, Task),
    Option("--to-image", "another image (best with --guidance 1)", path, None, "FILE", WAY),
    Option("--to-seed", "another seed, whose noise is mixed in", whole(0), None, "N", WAY),
    Option("--to-class", "another class or prompt", str, None, "NAME", WAY),
    Option("--out", "folder for <index>.png, grid.png, manifest.jsonl; default: samples", path, "samples", "FOLDER", OUTPUT),
    Option("--overwrite", "make pictures anew that other settings made", switch, False, None, OUTPUT),
    Option("--watermark", "hide a mark that `ldm watermark check` finds; the default (--no-watermark: none)", switch, True, None, OUTPUT),
    Option("--trajectory", "also <index>.gif and <index>-steps.png: so many images of how it comes about", whole(0), 0, "N", OUTPUT),
    Option("--preview", "write preview.png after every step: the pictures in work", switch, False, None, OUTPUT),
    Option("--columns", "pictures per row of grid.png; default: about square", whole(0), 0, "N", OUTPUT),
    Option("--tile", "encode and decode large images in tiles of so many px: little memory", whole(0), 0, "PX", OUTPUT),
    DEVICE,
    Option("--devices", "how many of them (or which: 0,2)", str, "1", "N", MACHINE),
    Option("--num-nodes", "how many machines with as many devices each", whole(1), 1, "N", MACHINE),
    Option("--strategy", "of Lightning, for several devices: auto, ddp", str, "auto", "NAME", MACHINE),
    Option("--precision", "32-true, bf16-mixed (default on GPUs), 16-mixed", one_of(*PRECISIONS), None, "P", MACHINE),
    Option("--chunk-size", f"pictures per network call; default: 1 on a CPU, else {CHUNK_SIZE}", whole(1), None, "N", MACHINE),
    Option("--batch-size", "", str, None, "N", MACHINE),
    Option("--trusted", "packages beside ldm whose classes the model may name", words, [], "NAMES", MACHINE),
]  # fmt: skip
OLD_SPELLINGS = {
    "--trainer.accelerator": "--device",
    "--classes": "--class", "--num": "--n", "--per_class": "--per-class", "--edit": "--source-class", "--shows": "--source-class",
    "--colorize": "--colourise", "--towards": "--to-image", "--between": "--to-seed", "--mix": "--to-class",
    "--frames": "--trajectory", "--trainer.devices": "--devices", "--trainer.num_nodes": "--num-nodes",
    "--trainer.strategy": "--strategy", "--trainer.precision": "--precision", "--lanes": "--chunk-size",
}  # fmt: skip


# option -> the task that it asks for, made of the option's value and of --strength where that was given
TASKS: dict[str, Callable[[Any, dict[str, float]], Task]] = {
    "task": lambda task, strength: task,
    "to_image": lambda _, strength: Between(),
    "mask": lambda _, strength: Inpaint(**strength),
    "outpaint": lambda px, strength: Outpaint(**strength, left=px[0], right=px[1], top=px[2], bottom=px[3]),
    "source_class": lambda _, strength: Edit(**strength),
    "upscale": lambda factor, _: Restore(Downscale(factor)),
    "deblur": lambda px, _: Restore(GaussianBlur(px)),
    "colourise": lambda *_: Restore(Grayscale()),
    "denoise": lambda level, _: RemoveNoise(level),
    "style": lambda *_: Style(),
    "image": lambda _, strength: ImageToImage(**strength),
}
STRONG = ("image", "mask", "outpaint", "source_class")  # to which --strength means something
WITH = {"to_image": ("source_class",), "task": ("mask", "to_image", "source_class")}  # what does not ask for a task beside another


def task_of(values: dict[str, Any], model: LatentDiffusion) -> Task | None:
    """What the options ask for; with an image alone, what the model was trained to make of images, or pictures like it."""
    strength = {} if values["strength"] is None else {"strength": values["strength"]}
    asked = [name for name in TASKS if name != "image" and values[name] is not None and values[name] is not False]
    if values["image"] is None:
        if asked or strength:
            raise UserError(f"--{(asked[0] if asked else 'strength').replace('_', '-')} needs an image: give --image FILE")
        return None
    takes = model.conditioner.image
    if takes is not None and not takes.takes_mask and not strength and not asked:
        return None
    name = asked[0] if asked else "image"
    if rest := [other for other in asked[1:] if other not in WITH.get(name, ())]:
        raise UserError(f"--{name.replace('_', '-')} and --{rest[0].replace('_', '-')} were given together: choose one task")
    if strength and name not in STRONG:
        raise UserError(f"--strength means nothing to --{name.replace('_', '-')}: leave it out")
    return TASKS[name](values[name], strength)


def options_of(values: dict[str, Any], model: LatentDiffusion) -> SampleOptions:
    """What the command line asks for, in the words of the Python API."""
    task, sampler = task_of(values, model), values["sampler"]
    if values["repaint"] is not None:
        if values["mask"] is None and values["outpaint"] is None:
            raise UserError("--repaint means nothing without --mask or --outpaint: leave it out")
        sampler = RePaint(times=values["repaint"]) if sampler is None else RePaint(sampler, values["repaint"])
    asked, numeric = values["prompt"], values["numbers"]
    if asked and not model.conditioner.takes_text and model.conditioner.numbers and "=" in asked[0]:
        warn("--prompt with numbers is the old spelling: write --numbers")
        asked, numeric = [], named_numbers(asked[0])
    names = (
        "negative",
        "unconditional",
        "n",
        "per_class",
        "first",
        "seed",
        "steps",
        "guidance",
        "spacing",
        "size",
        "windows",
        "image",
        "mask",
    )
    return SampleOptions(
        **{name: values[name] for name in names}, classes=values["class"], prompts=asked, numbers=numeric, sampler=sampler, task=task,
        to_image=values["to_image"], to_seed=values["to_seed"], to_condition=values["to_class"], shows=values["source_class"],
    )  # fmt: skip


def output_of(values: dict[str, Any]) -> OutputConfig:
    """How the pictures are stored."""
    names = ("overwrite", "watermark", "trajectory", "preview", "tile", "chunk_size", "precision")
    return OutputConfig(**{name: values[name] for name in names}, columns=values["columns"] or values["per_class"])


def make(model: Model, plan: Plan, values: dict[str, Any], output: OutputConfig) -> int:
    """The pictures that are not in the folder yet; then manifest, grid, and of a film the film."""
    if output.tile:
        tiled(model.network, output.tile)
    job = Job(model.loaded, plan, Path(values["out"]), output)
    for note in job.notes:
        warn(note)
    if values["devices"] != "1" or values["num_nodes"] > 1:
        from ldm.commands.devices import run_on_devices

        if not run_on_devices(job, values):
            return 0
    elif job.pending:
        run(job)
    job.finish()
    if values.get("image") is not None:
        for note in write_animation(job, values["image"]):
            warn(note)
    print(job.summary())
    return 0


EXAMPLE = """examples: ldm sample emoji --class face-smiling --n 9
          ldm sample emoji --image PICTURE --mask MASK --repaint 5"""


def main(command: str, arguments: list[str]) -> int:
    values = parse(command, "Sample pictures, or do something with an image.", OPTIONS, arguments, OLD_SPELLINGS, EXAMPLE)
    if values["batch_size"] is not None:
        warn("--batch-size is ignored: each picture is written as soon as it is made")
    model = load(values["model"], values["device"], values["trusted"])
    if limit() is not None:
        values["n"] = at_most(values["n"] or (None if values["image"] or values["per_class"] else 4))
        values["per_class"] = at_most(values["per_class"])
        values["steps"] = at_most(values["steps"] or SamplingConfig.of(model.loaded.card).steps)
    return make(model, model.plan(options_of(values, model.network)), values, output_of(values))
