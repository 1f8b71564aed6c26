"""ldm train: from a folder of pictures to a model, with nothing to type."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import torch

from ldm import model_folder
from ldm.auto import report
from ldm.auto.choose import MOST, STEPS, Candidate, Judge, choose, features, reconstructions, samples, with_scale
from ldm.auto.plan import Facts, Machine, Measure, Plan, after_first, described, from_data, plan
from ldm.auto.speed import LEAST_SECONDS, machine, measure
from ldm.commands import fit
from ldm.console.options import Option, number, parse, path, square, switch
from ldm.console.shorten import limit
from ldm.data.batches import Keyed
from ldm.data.images import SourceImages
from ldm.data.report import sentences
from ldm.data.split import evenly
from ldm.data.transforms import as_image, grid
from ldm.errors import Stopped, UserError
from ldm.files import sweep, write_atomically
from ldm.run_folder import RunFolder
from ldm.sampling.model import device_of
from ldm.sampling.request import SamplingConfig
from ldm.signals import waiting

OPTIONS = [
    Option("path", "folder, archive, table of images: whatever --data.path takes", path),
    Option("--hours", "how long it may take; default: a sensible time, which it says first", number, None, "H"),
    Option("--run", "folder to write; default: runs/ and the name of the path", path, None, "FOLDER"),
    Option("--size", "px of the pictures; default: what the images and the time allow", square, None, "PX"),
    Option("--overwrite", "start anew in a folder that holds a run, which is removed", switch, False),
    Option("--text-encoder", "folder or package of a text encoder, where the images have captions", path, None, "FOLDER"),
]
STATE = "train.json"  # of a run: what it does, for the next start of the same command
STAGES = {"autoencoder": "the autoencoder", "diffusion": "the diffusion model"}
LOOKED_AT = 200  # images whose sizes are read
SAMPLES, COLUMNS = 48, 8


def facts_of(source: str) -> Facts:
    """What is known of a path's pictures before any is decoded as a whole."""
    images = SourceImages(source, 64)
    train, held_out = (Keyed(images, part) for part in images.split(0.1, 0))
    sides = [min(images.rule.shape(images.source.read(i), images.name(i))) for i in evenly(len(images), LOOKED_AT)]
    said = tuple(sentences(train, held_out))
    return Facts(source, len(train), len(train.names), images.records.has_texts, images.channels, float(median(sides)), said)


def begin(source: str, run: Path, hours: float | None, size: int | None, text_encoder: str | None) -> Plan:
    """The plan of a run: of an earlier start of the same command, or a new one."""
    state = run / STATE
    if state.is_file():
        found = from_data(json.loads(state.read_text()))
        if found.facts.path != source:
            raise UserError(f"{run} is a training on {found.facts.path!r}: choose another --run, or give --overwrite")
        changed = {
            "--hours": (hours, found.hours),
            "--size": (size, found.shape.size),
            "--text-encoder": (text_encoder, found.text_encoder),
        }
        for name, (given, kept) in changed.items():
            if given is not None and given != kept:
                raise UserError(f"{run} was begun with {name} {kept}: leave {name} out to go on, or choose another --run")
        print(f"goes on in {run}")
        return found
    if any(RunFolder(run / stage).holds for stage in STAGES):
        raise UserError(f"{run} holds a run that `ldm train` did not begin: choose another --run, or give --overwrite")
    facts = facts_of(source)
    print("\n".join(facts.sentences), flush=True)
    if text_encoder is not None and not facts.has_texts:
        raise UserError("--text-encoder was given, but the images have no captions: leave it out")
    where = machine()
    facts = facts if size is None else replace(facts, side=float(size))
    return noted(plan(facts, where, _measured(where), hours, text_encoder), run)


def _measured(where: Machine) -> Measure:
    """How the speed of this machine is measured."""
    return partial(measure, where, least=LEAST_SECONDS if limit() is None else 0.0)


def noted(found: Plan, run: Path) -> Plan:
    """The plan, for the next start of the same command."""
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / STATE, json.dumps(asdict(found), indent=1).encode())
    return found


def done(run: Path, stage: str, steps: int) -> bool:
    """Whether a stage has come to its end."""
    folder = run / stage / "model"
    return (folder / model_folder.CONFIG).is_file() and (limit() is not None or model_folder.read_card(folder)["steps"] >= steps)


def run_stage(arguments: list[str], devices: int) -> int:
    """`ldm fit` with these arguments, from its last checkpoint on if there is one; returns its status."""
    logger = [] if os.environ.get("WANDB_API_KEY") else ["-c", "trainer/csv.yaml"]
    position = arguments.index("trainer/gpu.yaml" if "trainer/gpu.yaml" in arguments else "trainer/cpu.yaml") + 1
    quiet = [*arguments[:position], *logger, *arguments[position:], "--trainer.enable_model_summary", "false", "--ckpt_path", "auto"]
    if devices > 1:  # its ranks are started by the command line anew, which has to be that of `ldm fit`
        return subprocess.run([sys.executable, "-m", "ldm", *quiet]).returncode
    return fit.main("fit", quiet[1:])


def finish(found: Plan, run: Path, began: float) -> None:
    """Choose a checkpoint and its guidance, draw samples, write the report."""
    images = SourceImages(found.facts.path, found.shape.size)
    train, held_out = images.split(0.1, 0)
    device, last, best = device_of("auto"), run / "diffusion" / "model", run / "diffusion" / "checkpoints" / "best.ckpt"
    newest = model_folder.load(last)
    paths = [str(last), *([str(best)] if best.is_file() and _step_of(best) != newest.card["steps"] else [])]
    guided, network, candidates = bool(newest.model.conditioner.inputs), features(), list[Candidate]()
    count = 4 if limit() is not None else min(MOST, max(64, len(train)))
    if network is not None:
        print("which checkpoint, and which guidance:")
        judge = Judge(network, images, train.tolist(), device)
        candidates = choose(judge, paths, count, guided)
        chosen = candidates[0]
    else:
        print("no network to compare pictures in is installed (pip install 'ldm[eval]'): the last checkpoint is taken")
        chosen = Candidate(str(last), 2.0 if guided else 1.0, float("nan"))
    loaded = model_folder.load(chosen.path)
    config = with_scale(SamplingConfig.of(loaded.card), chosen.scale)
    model_folder.save(loaded.model, run / "model", {**loaded.card, "sampling": config.described(), "chosen": asdict(chosen)})
    pictures = samples(loaded, images, train.tolist(), device, chosen.scale, 4 if limit() is not None else SAMPLES)
    as_image(grid(pictures, COLUMNS)).save(run / "samples.png")
    shown = reconstructions(loaded, images, held_out.tolist(), device, COLUMNS)
    as_image(grid(shown, len(shown) // 2)).save(run / "reconstructions.png")
    figures: dict[str, Any] = {"images": found.facts.images, "classes": found.facts.classes, "px": found.shape.size}
    figures["minutes of this start"] = (time.monotonic() - began) / 60
    if network is not None:
        figures[f"FD-{network.name} of {count} samples to the training images, {STEPS} steps"] = chosen.distance
    distance = "" if network is None else f"FD-{network.name}"
    below = [replace(one, path=str(Path(one.path).relative_to(run))) for one in candidates]
    _write_report(found, run, figures, below, distance, chosen.scale, loaded.card["steps"])


def _step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def _write_report(
    found: Plan, run: Path, figures: dict[str, Any], candidates: list[Candidate], distance: str, scale: float, steps: int
) -> None:  # fmt: skip
    facts = found.facts
    report.write(
        run / "report.html",
        title=f"A latent diffusion model of {Path(facts.path).name}",
        summary=f"{facts.images:,} images; {steps:,} steps of the diffusion model; made by ldm {version('ldm')}.",
        samples=report.embedded(run / "samples.png"),
        samples_caption=f"Samples with guidance {scale:g}, one per seed, of conditions spread over the training images.",
        reconstructions=report.embedded(run / "reconstructions.png"),
        figures=report.table(figures),
        candidates=candidates,
        distance=distance,
        curves=[curve for stage in STAGES for curve in report.curves(run / stage)],
        data=facts.sentences,
        choices=described(found),
        commands=commands(found, run),
        versions=f"Python {sys.version.split()[0]}, torch {torch.__version__}, {found.machine.device}.",
    )


def commands(found: Plan, run: Path) -> list[str]:
    """The same training and sampling by hand."""
    lines = [f"ldm {' '.join(map(quote, arguments))}" for arguments in found.fit(str(run)).values()]
    return [*lines, f"ldm sample {quote(str(run))} --n 16"]


def train(
    path: str, hours: float | None = None, run: str | None = None, size: int | None = None, text_encoder: str | None = None,
    overwrite: bool = False,
) -> Path:  # fmt: skip
    """Train both stages on the pictures of a path; returns the run's folder, with the model, samples and a report.

    The arguments are the options of `ldm train`.  Where it was stopped, the same call goes on.
    """
    began = time.monotonic()
    source = str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
    folder = Path(run).expanduser() if run else Path("runs") / (Path(source).resolve().name.split(".")[0] or "mine")
    if overwrite:
        for stage in STAGES:
            RunFolder(folder / stage).set_aside()
            RunFolder(folder / stage).clear()
        (folder / STATE).unlink(missing_ok=True)
    sweep(folder)
    found = begin(source, folder, hours, size, text_encoder)
    print("\n".join([*described(found), f"pictures on the way: {folder}/autoencoder/pictures, {folder}/diffusion/pictures"]), flush=True)
    for stage, what in STAGES.items():
        steps = found.first_steps if stage == "autoencoder" else found.second_steps
        if done(folder, stage, steps):
            print(f"{what} is trained already")
            continue
        arguments, whole, started = found.fit(str(folder))[stage], not (folder / stage).exists(), time.monotonic()
        print(f"\n$ ldm {' '.join(map(quote, arguments))}", flush=True)
        status = run_stage(arguments, found.machine.devices)
        status = status or (waiting() and 128 + waiting())  # one that came when the stage was at its end
        if status > 128:
            raise Stopped(status - 128, "stopped; the same command goes on from there")
        if status:
            raise UserError(f"training {what} ended with status {status}; what went wrong is said above")
        if stage == "autoencoder" and whole:
            took, now = time.monotonic() - started, _measured(found.machine)(found.shape)
            found = noted(after_first(found, time.monotonic() - began, took, now), folder)
            minutes = (time.monotonic() - began) / 60
            print(f"after {minutes:.1f} minutes: {found.second_steps:,} steps of the diffusion model fit into the rest")
    finish(found, folder, began)
    print("\n".join(["", "the same by hand:", *commands(found, folder), ""]))
    print(f"{folder / 'samples.png'} shows the model in {folder / 'model'}; {folder / 'report.html'} has all about it")
    return folder


def main(command: str, arguments: list[str]) -> int:
    about = "From pictures to a model: sizes, networks and steps are chosen for them and for this machine."
    train(**parse(command, about, OPTIONS, arguments))
    return 0
