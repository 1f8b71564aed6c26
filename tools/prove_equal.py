"""Prove that a refactor changes nothing: 20 pictures of every kind of sampling, and the losses of 20 steps of every stage, as hashes.

    python tools/prove_equal.py --out before          # on the code as it was
    python tools/prove_equal.py --out after --compare before   # on the code as it is: exit status 1 where a byte differs

Models are trained in the folder `--out` (toy sizes, 20 steps, about 2 minutes on a core), pictures are made by the command line, with
its old spellings, which every version understands.  Pixels are compared, not files: the settings in a PNG may be told in other words.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm import registry
from ldm.cli import main
from ldm.data.images import DigitImages, EmojiImages
from ldm.data.transforms import as_image
from ldm.interfaces import Autoencoder, Classifier, Conditioner, Discriminator, Network

N, STEPS = 20, 20
FIT = ["fit", "-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml"]
SHORT = [f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}", "--trainer.log_every_n_steps=1", "--data.batch_size=8"]
SHORT += ["--trainer.enable_model_summary=false"]
SMALL = ["--model.network.channels=16", "--model.sampling_steps=2"]
DIGITS = ["-c", "data/digits.yaml", "-c", "diffusion/digits.yaml", *SMALL]


def assets(folder: Path) -> dict[str, str]:
    """The pictures, films and folders that runs and tasks need."""
    digits, emoji = DigitImages(32), EmojiImages()
    for name in ("numbers", "texts", "film", "films"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows, words = ["file_name,label,weight"], []
    for i in range(40):
        as_image(digits.pixels(i)).save(folder / "numbers" / f"{i}.png")
        as_image(digits.pixels(i)).save(folder / "texts" / f"{i}.png")
        rows.append(f"{i}.png,{'even' if i % 2 else 'odd'},{i / 4}")
        words.append(json.dumps({"file_name": f"{i}.png", "text": digits.records[i].text}))
    (folder / "numbers" / "metadata.csv").write_text("\n".join(rows))
    (folder / "texts" / "metadata.jsonl").write_text("\n".join(words))
    for i in range(12):
        turned = [as_image(digits.pixels(i)).rotate(15 * k) for k in range(4)]
        turned[0].save(folder / "films" / f"{i}.gif", save_all=True, append_images=turned[1:])
    for i in range(N):
        as_image(emoji.pixels(40)).rotate(3 * i, fillcolor="white").save(folder / "film" / f"{i:02d}.png")
    for name, index in (("face", 40), ("other", 900)):
        as_image(emoji.pixels(index)).save(folder / f"{name}.png")
    as_image(EmojiImages(16).pixels(40)).save(folder / "small.png")
    as_image(digits.pixels(3)).save(folder / "three.png")
    for name, size in (("mask", 64), ("mask32", 32)):
        mask = np.zeros((size, size), dtype=np.uint8)
        mask[:, size // 2 :] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    return {path.stem: str(path) for path in sorted(folder.iterdir())}


def runs(run: str, files: dict[str, str]) -> dict[str, list[str]]:
    """Trainings by the folder that they write, in order."""
    first, init = f"--model.first_stage={run}/autoencoder/model", f"--model.init={run}/diffusion/model"
    folder, model = ["-c", "data/folder.yaml", "--data.size=32"], ["-c", "diffusion/digits.yaml", *SMALL]
    numbers = ["--model.conditioner=Numbers", '--model.conditioner.ranges={"weight": [0, 10]}', "--model.network.vector_dim=64"]
    clips = ["-c", "data/clips.yaml", f"--data.path={files['films']}", "--data.size=32", "--data.frames=2"]
    inpainting = ["-c", "task/inpainting.yaml", "--model.network.concat_channels=3", "--model.conditioner.channels=2"]
    text = ["-c", "diffusion/emoji-text.yaml", *SMALL, "--model.network.in_channels=2"]
    return {
        "autoencoder": ["-c", "data/digits.yaml", "-c", "autoencoder/digits.yaml", "--model.autoencoder.channels=16"],
        "diffusion": DIGITS,
        "variance/diffusion": [*DIGITS, "-c", "objective/learned-variance.yaml", first],
        "classifier": ["-c", "data/digits.yaml", "-c", "classifier/digits.yaml", "--model.network.channels=16"],
        "inpainting": [*DIGITS, *inpainting, first, init],
        "numbers/diffusion": [*folder, f"--data.path={files['numbers']}", *model, *numbers, first],
        "text/diffusion": [*folder, f"--data.path={files['texts']}", *text, first],
        "clips/video": [*clips, *model, "-c", "finetune/video.yaml", first, init, "--model.network.frames=2"],
    }


def kinds(run: str, files: dict[str, str]) -> dict[str, list[str]]:
    """Commands by kind of sampling, without the options that all have."""
    image, digit, few = ["--image", files["face"]], f"{run}/diffusion/model", ["--steps=3"]
    emoji = ["sample", "emoji", *few]
    classifier = ["--guidance=ClassifierGuidance", f"--guidance.classifier={run}/classifier/model"]
    predict = ["predict", *few, "--trainer.accelerator=cpu"]
    return {
        "class": [*emoji, "--class=face-smiling,cat-face"],
        "text": ["sample", f"{run}/text/diffusion/model", "--prompt=the digit 3", *few],
        "numbers": ["sample", f"{run}/numbers/diffusion/model", "--prompt=weight=3", *few],
        "image": [*emoji, *image, "--strength=0.6"],
        "inpaint": [*emoji, *image, "--mask", files["mask"], "--class=face-smiling", "--repaint=2"],
        "outpaint": [*emoji, *image, "--outpaint=[16,0,0,16]"],
        "edit": [*emoji, *image, "--edit=face-smiling", "--class=cat-face"],
        "denoise": [*emoji, *image, "--denoise=0.3"],
        "style": [*emoji, *image, "--style=true"],
        "to-image": [*emoji, *image, "--towards", files["other"], "--guidance=1"],
        "to-seed": [*emoji, "--between=7"],
        "to-class": [*emoji, "--class=cat-face", "--mix=country-flag"],
        "upscale": [*emoji, "--image", files["small"], "--upscale=4"],
        "deblur": [*emoji, *image, "--deblur=2"],
        "colourise": [*emoji, *image, "--colourise=true"],
        "film": [*emoji, "--image", files["film"], "--strength=0.3"],
        "clip": ["sample", f"{run}/clips/video/model", *few],
        "wide": [*emoji, "--size=96x64"],
        "negative": [*emoji, "--class=face-smiling", "--negative=cat-face"],
        "autoguidance": [*predict, "--model=emoji", "--guidance=CFG", "--guidance.weaker=emoji", "--guidance.scale=2", "--num=20"],
        "classifier": [*predict, f"--model={digit}", *classifier, "--num=20"],
        "learned variance": [*predict, f"--model={run}/variance/diffusion/model", "--sampler=Ancestral", "--sampler.eta=1", "--num=20"],
        "tiles": [*emoji, "--size=96x64", "--tile=32"],
        "trained task": ["sample", f"{run}/inpainting/model", "--image", files["three"], "--mask", files["mask32"], *few],
    }  # fmt: skip


def losses(folder: Path) -> list[str]:
    """train/loss of every step, all digits."""
    with next((folder / "logs").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return [row[name] for row in rows for name in ("train/loss", "train/rec_loss") if row.get(name)]


def digest(folder: Path) -> str:
    """One hash of the pixels of all pictures in a folder, in order."""
    found = hashlib.sha256()
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    if len(paths) not in (1, N):  # tasks that draw no noise make one
        raise SystemExit(f"{folder} has {len(paths)} pictures, {N} were asked for")
    for path in paths:
        with Image.open(path) as image:
            found.update(f"{image.size}".encode() + np.asarray(image.convert("RGB")).tobytes())
    return found.hexdigest()


def same_weights() -> None:
    """Let every part begin with the weights of one seed, whatever was built before it."""
    for base in (Autoencoder, Classifier, Conditioner, Discriminator, Network):
        for cls in registry.parts(base).values():  # type: ignore[type-abstract]
            if "__init__" in vars(cls):
                cls.__init__ = _seeded(cls.__init__)


def _seeded(init: Any) -> Any:
    @wraps(init)
    def seeded(self: Any, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(0)
        init(self, *args, **kwargs)

    return seeded


def run(arguments: list[str]) -> None:
    if status := main(arguments):
        raise SystemExit(f"ldm {' '.join(arguments)}: status {status}")


def prove(out: Path, only: list[str], options: list[str]) -> dict[str, str | list[str]]:
    """Hashes of pictures and losses by kind; trainings that are there already are not made again."""
    files, place, results = assets(out / "assets"), str(out / "runs"), {}
    for name, arguments in runs(place, files).items():
        folder = out / "runs" / name
        root = str(folder.parent) if "/" in name else place
        if not (folder / "model").is_dir():
            run([*FIT, *arguments, *SHORT, "--run", root])
        results[f"losses of {name}"] = losses(folder)
    for name, arguments in kinds(place, files).items():
        if only and name not in only:
            continue
        target = out / "pictures" / name.replace(" ", "-")
        count = [] if name == "film" or arguments[0] == "predict" else [f"--n={N}"]
        run([*arguments, *count, "--watermark=false", "--out", str(target), "--overwrite=true", *options])
        results[name] = digest(target)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compare", type=Path, help="folder of another run of this tool")
    parser.add_argument("--only", nargs="*", default=[], help="kinds of sampling")
    parser.add_argument("--options", nargs="*", default=[], help="for every command that makes pictures")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    same_weights()
    results = prove(chosen.out, chosen.only, chosen.options)
    (chosen.out / "proof.json").write_text(json.dumps(results, indent=1))
    before = json.loads((chosen.compare / "proof.json").read_text()) if chosen.compare else {}
    different = [name for name in results if before and results[name] != before.get(name)]
    for name, found in results.items():
        shown = found if isinstance(found, str) else f"{len(found)} losses, the last {found[-1]}"
        print(f"{name:<28} {'DIFFERS' if name in different else 'equal' if before else ''} {shown[:40]}")
    sys.exit(1 if different else 0)
