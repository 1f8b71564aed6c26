"""Commands of ldm on a pretended GPU: python cases.py GROUP FOLDER, which gets results.json.

Of each command: its exit status or error, the waits of a training step that are not its log's, and those of a sampling run, by line.
"""

import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / "tools"), str(Path(__file__).parent)]
import pretend  # noqa: E402  before torch
import torch  # noqa: E402
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop  # noqa: E402
from prove_equal import DIGITS, assets, kinds, runs  # noqa: E402

from ldm.cli import main  # noqa: E402
from ldm.sampling import pipeline  # noqa: E402

STEPS, MEASURED = 5, slice(2, 4)  # the first ones make tables, the last one saves
FIT = ["fit", "-c", "trainer/cpu.yaml", "-c", "trainer/gpu.yaml", "-c", "trainer/csv.yaml", "--overwrite"]
SHORT = [f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}", "--trainer.limit_val_batches=1", "--data.batch_size=16"]
SHORT += ["--trainer.log_every_n_steps=1000", "--trainer.enable_model_summary=false", "--data.num_workers=0"]
HALF = "--trainer.precision=16-mixed"
FIRST = ["-c", "data/digits.yaml", "-c", "autoencoder/digits.yaml", "--model.autoencoder.channels=16"]

steps: list[Counter] = []  # waits of each training step
chunks: list[Counter] = []  # of each chunk of pictures


def noted(into: list[Counter], function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose waits are noted."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = pretend.waits.copy()
        found = function(*args, **kwargs)
        into.append(pretend.waits - before)
        return found

    return call


def objective(name: str, **arguments: Any) -> list[str]:
    """Options of an objective around Simple."""
    inner = {"objective": {"class_path": "Simple"}, **arguments}
    return ["--model.objective", json.dumps({"class_path": name, "init_args": inner})]


def random_lpips(folder: Path) -> str:
    """LPIPS with random weights, as those of its networks cannot be had here."""
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.save(squeezenet1_1(weights=None).state_dict(), folder / "squeeze.pth")
    return json.dumps([{"class_path": "LPIPS", "init_args": {"net": "squeeze", "weights": str(folder / "squeeze.pth")}}])


def adversary(**arguments: Any) -> list[str]:
    """Options of a PatchGAN that begins at once."""
    inner = {"discriminator": {"class_path": "PatchDiscriminator", "init_args": {"channels": 16, "layers": 1}}, "start": 0, **arguments}
    return ["--model.adversary", json.dumps({"class_path": "PatchGAN", "init_args": inner})]


def first_stage(folder: Path, files: dict[str, str], place: str) -> dict[str, list[str]]:
    lpips = ["--model.losses", random_lpips(folder)]
    vq = ["--model.autoencoder.bottleneck", '{"class_path": "VQ", "init_args": {"channels": 3, "num_codes": 64}}']
    fsq = ["--model.autoencoder.bottleneck", '{"class_path": "FSQ", "init_args": {"levels": [8, 5]}}']
    fit = [*FIT, *FIRST, *SHORT, "--run"]
    metrics = [{"class_path": "FeatureDistance", "init_args": {"features": {"class_path": "MobileNetV2"}}}]
    test = ["test", *(part for part in fit[1:] if part != "--overwrite")]
    return {
        "KL": [*fit, place],
        "ldm test": [*test, place, "--model.metrics", json.dumps(metrics), "--ckpt_path=last"],
        "KL at 16-mixed": [*fit, place, HALF],
        "Lite0 and PatchGAN": [*fit, place, "--model.losses", '[{"class_path": "Lite0"}]', *adversary()],
        "LPIPS, PatchGAN, learned variance": [*fit, place, *lpips, *adversary(), "--model.learn_variance=true"],
        "R1 at 16-mixed": [*fit, place, *adversary(gradient_penalty=10.0, adaptive=False), HALF],
        "VQ and PatchGAN": [*fit, f"{place}/vq", *vq, *adversary(alone=2)],
        "FSQ": [*fit, f"{place}/fsq", *fsq],
    }


def objectives(folder: Path, files: dict[str, str], place: str) -> dict[str, list[str]]:
    whole = [*FIT, *DIGITS, *SHORT, "--run", place]
    fit = [*whole[:-2], "--trainer.limit_val_batches=0", *whole[-2:]]  # pictures are made in some cases only
    teacher = json.dumps({"class_path": "ProgressiveDistillation", "init_args": {
        "objective": {"class_path": "MinSNR"}, "teacher": f"{place}/diffusion/model", "steps": 2, "substeps": 2,
        "guidance": {"class_path": "CFG", "init_args": {"scale": 2.0, "low": 0.1, "high": 10.0}}}})  # fmt: skip
    named = {name: ["--model.objective", json.dumps({"class_path": name})] for name in ("MinSNR", "P2", "EDM")}
    simple = {
        "class_path": "Simple",
        "init_args": {"huber": 0.1, "offset": 0.1, "stratified": True, "times": {"class_path": "LogitNormal"}},
    }
    return {
        "first stage": [*FIT, *FIRST, *SHORT, "--run", place],
        "Simple": whole,
        "ProgressiveDistillation": [
            *fit[:-1], f"{place}/student", f"--model.first_stage={place}/autoencoder/model", "--model.objective", teacher,
        ],
        "Simple at 16-mixed": [*fit, HALF],
        "resumed": [*fit[:1], *(part for part in fit[1:] if part != "--overwrite"), "--trainer.max_steps=10", "--ckpt_path=last"],
        "no cache": [*fit, "--data.cache=null"],
        "cache on the device": [*fit, "--data.cache_on=device"],
        "worker processes": [*fit, "--data.num_workers=1"],
        "accumulated": [*fit, "--trainer.accumulate_grad_batches=2", f"--trainer.max_steps={STEPS}"],
        **{name: [*fit, *options] for name, options in named.items()},
        "Huber, offset, stratified, LogitNormal, flow": [
            *fit, "--model.objective", json.dumps(simple), "--model.schedule=FlowSchedule", "--model.prediction=flow",
        ],
        "Karras": [*fit, "--model.schedule=KarrasSchedule", *named["EDM"]],
        "Shifted": [*fit, "--model.schedule=Shifted", "--model.schedule.schedule=LDMSchedule"],
        "ZeroTerminalSNR": [*fit, "--model.schedule=ZeroTerminalSNR", "--model.schedule.schedule=LDMSchedule", "--model.prediction=v"],
        "LearnedUncertainty": [*fit, *objective("LearnedUncertainty")],
        "Importance": [*fit, *objective("Importance", bins=4, memory=1)],
        "LearnedVariance": [*whole, "-c", "objective/learned-variance.yaml"],
        "DiT": [*fit, "--model.network", json.dumps({"class_path": "DiT", "init_args": {"dim": 32, "depth": 2, "heads": 2, "patch": 2}})],
        "PowerEMA": [*fit, "-c", "trainer/power-ema.yaml"],
    }  # fmt: skip


def conditioners(folder: Path, files: dict[str, str], place: str) -> dict[str, list[str]]:
    found = {name: [*FIT, *arguments, *SHORT, "--run", str(Path(place, name).parent) if "/" in name else place]
             for name, arguments in runs(place, files).items()}  # fmt: skip
    first = f"--model.first_stage={place}/autoencoder/model"
    digits = [*FIT, *DIGITS, *SHORT, "--run"]
    embedding = {"class_path": "ImageEmbedding", "init_args": {"features": {"class_path": "MobileNetV2"}}}
    composite = {"class_path": "CompositeConditioner", "init_args": {"parts": [{"class_path": "ClassLabel"}, embedding]}}
    tasks = ("colourisation", "denoising", "restoration", "super-resolution", "super-resolution-bsr")
    return {
        **found,
        "class and image": [*digits, f"{place}/composite", first, "--model.conditioner", json.dumps(composite)],
        **{task: [*digits, f"{place}/{task}", "-c", f"task/{task}.yaml", first, f"--model.init={place}/diffusion/model",
                  "--model.conditioner.channels=2", "--model.network.concat_channels=2"] for task in tasks},
    }  # fmt: skip


def sampling(folder: Path, files: dict[str, str], place: str) -> dict[str, list[str]]:
    emoji = ["sample", "emoji", "--steps=3", "--n=2", "--overwrite", "--device=cuda", "--out", str(folder / "pictures")]
    samplers = ["Ancestral", "DDIM", "DDPM", "LCM", "Euler", "Heun", "DPMSolverPP2S", "DPMSolverPP2M", "DPMSolverPP3M"]
    samplers += ["UniPC", "LMS", "DEIS", "PLMS", "RePaint"]
    names = ("class", "image", "inpaint", "outpaint", "edit", "denoise", "style", "to-image", "to-seed", "to-class", "upscale", "deblur")
    names += ("colourise", "wide", "negative", "tiles")
    picked = {name: kinds(place, files)[name] for name in names}
    return {
        **{f"sampler {name}": [*emoji, f"--sampler={name}"] for name in samplers},
        "churn": [*emoji, "--sampler=Heun", "--sampler.churn=2"],
        "16-mixed": [*emoji, "--precision=16-mixed"],
        "32-true": [*emoji, "--precision=32-true"],
        "APG, rescaled": [*emoji, "--guidance=APG", "--guidance.scale=3", "--guidance.rescale=0.5", "--class=face-smiling"],
        "an interval": [*emoji, "--guidance=CFG", "--guidance.scale=3", "--guidance.low=0.5", "--guidance.high=3", "--class=face-smiling"],
        "autoguidance, trajectory": [
            *emoji, "--guidance=CFG", "--guidance.weaker=emoji", "--guidance.scale=2", "--trajectory=2",
        ],
        **{f"task {name}": [*arguments, *emoji[3:]] for name, arguments in picked.items()},
    }  # fmt: skip


def commands(folder: Path, files: dict[str, str], place: str) -> dict[str, list[str]]:
    sample = ["--steps=3", "--n=2", "--overwrite", "--device=cuda", "--out", str(folder / "pictures")]
    classifier = ["--guidance=ClassifierGuidance", f"--guidance.classifier={place}/classifier/model"]
    trained = {name: [*FIT, *runs(place, files)[name], *SHORT, "--run", place] for name in ("autoencoder", "diffusion", "classifier")}
    model = f"{place}/diffusion/model"
    likelihood = ["likelihood", model, "--images=digits", "--n=2", "--steps=3", "--ode-steps=1", "--device=cuda"]
    return {
        **trained,
        "classifier guidance": ["sample", model, *sample, *classifier],
        "sample for evaluate": ["sample", "emoji", *sample[:1], "--n=8", *sample[2:]],
        "evaluate": ["evaluate", "--images", str(folder / "pictures"), "--reference", files["numbers"], "--device=cuda", "--size=32"],
        "likelihood": likelihood,
        "again": ["again", str(folder / "pictures" / "0.png"), "emoji", "--device=cuda", "--out", str(folder / "again")],
        "encode": ["encode", "-c", "trainer/cpu.yaml", "-c", "trainer/gpu.yaml", *DIGITS, "--run", place, "--overwrite"],
    }


GROUPS = {one.__name__: one for one in (first_stage, objectives, conditioners, sampling, commands)}


def ran(arguments: list[str]) -> dict[str, Any]:
    """A command's result."""
    steps.clear()
    chunks.clear()
    began = time.monotonic()
    error = ""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except Exception:
        status, error = -1, traceback.format_exc()[-3000:]

    def lines(found: list[Counter]) -> list[dict[str, int]]:
        return [{" ".join(key): number for key, number in one.items()} for one in found]

    took = time.monotonic() - began
    return {"status": status, "error": error, "seconds": took, "steps": lines(steps[MEASURED]), "chunks": lines(chunks)}


if __name__ == "__main__":
    group, folder, only = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    files = assets(folder / "assets")
    _TrainingEpochLoop.advance = noted(steps, _TrainingEpochLoop.advance)  # type: ignore[method-assign]
    pipeline._Chunk.generate = noted(chunks, pipeline._Chunk.generate)  # type: ignore[method-assign]
    results = {}
    with pretend.pretended_gpu():
        for name, arguments in GROUPS[group](folder, files, str(folder / "runs")).items():
            if not only or name in only:
                results[name] = ran(arguments)
                (folder / "results.json").write_text(json.dumps(results, indent=1))
