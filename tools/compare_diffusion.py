"""Which prediction, which sampler, how many steps, how much guidance: measured on emoji.

python tools/compare_diffusion.py [--steps 2500] [--num 256] [--out runs/compare-diffusion] [--only predictions]

predictions  one model per prediction type, the same network, steps and first stage (that of the carried model)
samplers     --model (default: the carried one) with each sampler, number of network calls and guidance scale (some samplers with one)
guidance     --model with its sampler and other guidance
models       only if asked for (--only models --model A B): trained models, each with its own sampler and three guidance scales

Every set of pictures has the classes of as many real emoji, evenly chosen; distances are to all 1,911.  Writes a table (.md) of each,
results.json, predictions.png (the same seeds and classes, a row per prediction) and samplers.png (curves).
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot
from torch import Tensor
from tqdm import tqdm

from ldm import model_folder
from ldm.data.images import EmojiImages
from ldm.data.transforms import as_image, grid
from ldm.diffusion.guidance import APG, CFG
from ldm.diffusion.multistep import DEIS, LMS, PLMS, UniPC
from ldm.diffusion.samplers import Ancestral, DPMSolverPP2M, DPMSolverPP2S, DPMSolverPP3M, Heun
from ldm.metrics.distances import Statistics, frechet_distance, kernel_distance
from ldm.metrics.features import MobileNetV2, measured
from ldm.ranges import to_uint8
from ldm.sampling.pipeline import CHUNK_SIZE, generate
from ldm.sampling.request import SampleRequest, SamplingConfig, SeedNoise

FLOW = ["--model.schedule=FlowSchedule", "--model.objective=Simple", "--model.objective.times=LogitNormal"]
PREDICTIONS = {"eps": [], "v": [], "x0": [], "flow": FLOW}  # the others with the emoji config's LDM schedule and min-SNR
SAMPLERS = {
    "DDIM": Ancestral(0.0),
    "DDPM": Ancestral(1.0),
    "Heun": Heun(),
    "DPM-Solver++ 2M": DPMSolverPP2M(),
    "DPM-Solver++ 2M SDE": DPMSolverPP2M(1.0),
    "UniPC-2": UniPC(),
    "DPM-Solver++ 2S": DPMSolverPP2S(),
    "DPM-Solver++ 3M": DPMSolverPP3M(),
    "DEIS-3": DEIS(),
    "LMS-4": LMS(),
    "PLMS": PLMS(),
}
CALLS, SCALES, SCALE = (5, 9, 25), (1.0, 2.0, 3.0), 2.0
CROSSED = 6  # samplers with every scale; the others have SCALE
TWO_CALLS = (Heun, DPMSolverPP2S)  # per step, one in the last
GUIDANCE = {
    "CFG 2": CFG(2.0),
    "CFG 3": CFG(3.0),
    "CFG 3, rescale 0.7": CFG(3.0, rescale=0.7),
    "APG 3": APG(3.0),
    "CFG 2, sigma 0.3 to 5": CFG(2.0, low=0.3, high=5.0),
    "CFG 3, sigma 0.3 to 5": CFG(3.0, low=0.3, high=5.0),
    "CFG 4, sigma 0.3 to 5": CFG(4.0, low=0.3, high=5.0),
}


class Judge:
    """Distances of sets of pictures to the emoji."""

    def __init__(self, num: int) -> None:
        self.network, self.images = MobileNetV2(), EmojiImages()
        chosen = torch.linspace(0, len(self.images) - 1, num).round().long().tolist()
        self.conditions = [self.images.records[i].label for i in chosen]
        self.features = measured(self.network, self.images, 64, torch.device("cpu"))[0]
        self.reference = Statistics.of(self.features)
        self.floor = self._distances(self.features[torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[:num]])

    def _distances(self, features: Tensor) -> dict[str, float]:
        distance = frechet_distance(Statistics.of(features), self.reference)
        return {"FD-mnv2": float(distance), "KID-mnv2": float(kernel_distance(features, self.features))}

    def __call__(self, loaded: model_folder.Loaded, name: str, **changes: Any) -> dict[str, float]:
        config, count = replace(SamplingConfig.of(loaded.card), **changes), 4 * CHUNK_SIZE
        requests = [SampleRequest(i, SeedNoise(0, i), {"class": name}) for i, name in enumerate(self.conditions)]
        with tqdm(total=len(requests) * config.num_steps, desc=name, unit="img", unit_scale=1 / config.num_steps) as bar:
            pictures = generate(loaded.model, requests, config, loaded.card["classes"], count, lambda: bar.update(count))
        return self._distances(torch.cat([self.network(part) for part in to_uint8(pictures).split(64)]))


def predictions(judge: Judge, out: Path, steps: int) -> dict[str, dict[str, float]]:
    results, rows = {}, []
    for prediction, options in PREDICTIONS.items():
        run = out / prediction
        command = [sys.executable, "-m", "ldm", "fit"]
        for name in ("trainer/cpu", "trainer/csv", "data/emoji", "diffusion/emoji"):
            command += ["-c", f"configs/{name}.yaml"]
        command += ["--run", str(run), "--model.first_stage=emoji", f"--model.prediction={prediction}", *options]
        command += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--trainer.enable_model_summary=false"]
        if not (run / "diffusion" / "model").is_dir():
            print("\n$ " + " ".join(command[2:]), flush=True)
            subprocess.run(command, check=True)
        loaded = model_folder.load(run / "diffusion" / "model")
        results[prediction] = judge(loaded, prediction, guidance=CFG(SCALE))
        shown = judge.conditions[:: len(judge.conditions) // 16][:16]
        requests = [SampleRequest(i, SeedNoise(0, i), {"class": name}) for i, name in enumerate(shown)]
        config = replace(SamplingConfig.of(loaded.card), guidance=CFG(SCALE))
        rows.append(generate(loaded.model, requests, config, loaded.card["classes"]))
    as_image(grid(to_uint8(torch.cat(rows)), 16)).save(out / "predictions.png")
    lines = ["| prediction | FD-mnv2 | KID-mnv2 |", "|---|---|---|"]
    lines += [f"| {name} | {row['FD-mnv2']:.1f} | {row['KID-mnv2']:.4f} |" for name, row in results.items()]
    finish(out / "predictions.md", lines)
    return results


def samplers(judge: Judge, out: Path, model: str) -> list[dict[str, Any]]:
    loaded, results = model_folder.load(model), []
    for number, (name, sampler) in enumerate(SAMPLERS.items()):
        for calls in CALLS:
            for scale in SCALES if number < CROSSED else (SCALE,):
                steps = (calls + 1) // 2 if isinstance(sampler, TWO_CALLS) else calls
                if isinstance(sampler, PLMS):
                    steps = calls - 1  # its first step has two
                found = judge(loaded, f"{name}, {calls} calls, scale {scale}", sampler=sampler, steps=steps, guidance=CFG(scale))
                results.append({"sampler": name, "calls": calls, "scale": scale, **found})
                print({key: round(value, 4) for key, value in found.items()}, flush=True)
    table = {(r["sampler"], r["calls"], r["scale"]): r["FD-mnv2"] for r in results}
    lines = ["FD-mnv2 by network calls and guidance scale", ""]
    lines += ["| sampler | " + " | ".join(f"{calls}, {scale:g}" for calls in CALLS for scale in SCALES) + " |"]
    lines += ["|---" * (1 + len(CALLS) * len(SCALES)) + "|"]
    for name in SAMPLERS:
        cells = [table.get((name, calls, scale)) for calls in CALLS for scale in SCALES]
        lines.append(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.1f}" for cell in cells) + " |")
    best = min(results, key=lambda r: r["FD-mnv2"])
    lines += ["", f"least: {best['sampler']}, {best['calls']} calls, scale {best['scale']:g}: {best['FD-mnv2']:.1f}"]
    lines += [f"as many real emoji: {judge.floor['FD-mnv2']:.1f}"]
    finish(out / "samplers.md", lines)
    curves(table, judge.floor["FD-mnv2"], out / "samplers.png")
    return results


def guidance(judge: Judge, out: Path, model: str) -> dict[str, dict[str, float]]:
    loaded = model_folder.load(model)
    results = {name: judge(loaded, name, guidance=made) for name, made in GUIDANCE.items()}
    lines = ["| guidance | FD-mnv2 | KID-mnv2 |", "|---|---|---|"]
    lines += [f"| {name} | {row['FD-mnv2']:.1f} | {row['KID-mnv2']:.4f} |" for name, row in results.items()]
    finish(out / "guidance.md", lines)
    return results


def models(judge: Judge, out: Path, names: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    loaded = {name: model_folder.load(name) for name in names}
    results = {name: {f"{s:g}": judge(model, f"{name}, scale {s:g}", guidance=CFG(s)) for s in SCALES} for name, model in loaded.items()}
    lines = [f"FD-mnv2 of {len(judge.conditions)} pictures by guidance scale", ""]
    lines += ["| model | " + " | ".join(f"{s:g}" for s in SCALES) + " |", "|---" * (1 + len(SCALES)) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{found['FD-mnv2']:.1f}" for found in row.values()) + " |" for name, row in results.items()]
    finish(out / "models.md", lines)
    return results


def curves(table: dict[tuple[str, int, float], float], floor: float, path: Path) -> None:
    mpl.use("Agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, name in enumerate(SAMPLERS):
        style = {"marker": "o", "label": name, "linestyle": "-" if number < CROSSED else ":", "color": f"C{number % 10}"}
        axes[0].plot(CALLS, [table[name, calls, SCALE] for calls in CALLS], **style)
        if number < CROSSED:
            axes[1].plot(SCALES, [table[name, CALLS[-1], scale] for scale in SCALES], **style)
    axes[0].set(xlabel="network calls", ylabel=f"FD-mnv2 at guidance scale {SCALE:g}", xscale="log")
    axes[0].set_xticks(CALLS, [str(calls) for calls in CALLS])
    axes[0].set_ylim(top=1.5 * min(table.values()))  # PLMS needs more calls than these
    axes[0].minorticks_off()
    axes[1].set(xlabel="guidance scale", ylabel=f"FD-mnv2 at {CALLS[-1]} network calls", xticks=SCALES)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, title=f"as many real emoji: {floor:.1f}", title_fontsize=8)
    figure.savefig(path, dpi=110)


def finish(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + f"\n\nwritten to {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help="of training, per prediction")
    parser.add_argument("--num", type=int, default=256, help="pictures per set")
    parser.add_argument("--model", nargs="+", default=["emoji"], help="models; samplers and guidance take the first")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-diffusion"))
    parser.add_argument("--only", choices=["predictions", "samplers", "guidance", "models"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    judge, target = Judge(args.num), args.out / "results.json"
    results = json.loads(target.read_text()) if target.is_file() else {}
    results |= {"steps": args.steps, "num": args.num, "floor": judge.floor}
    if args.only in (None, "predictions"):
        results["predictions"] = predictions(judge, args.out, args.steps)
    if args.only in (None, "samplers"):
        results["samplers"] = samplers(judge, args.out, args.model[0])
    if args.only in (None, "guidance"):
        results["guidance"] = guidance(judge, args.out, args.model[0])
    if args.only == "models":
        results["models"] = models(judge, args.out, args.model)
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
