"""Classes by name: what training starts from, or goes on with, may know others, more or fewer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stage1, stage2
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm import model_folder
from ldm.callbacks.ema import EMA
from ldm.cli import main
from ldm.commands.train import parse
from ldm.console.configs import find_configs
from ldm.stages.vocabulary import by_name, follow, sentence

NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(old=NAMES, new=NAMES)
def test_rows_follow_their_names(old: list[str], new: list[str]) -> None:
    table = torch.arange(2.0 * (len(old) + 1)).view(-1, 2)
    found = by_name(table, old, new, has_null=True)
    assert len(found) == len(new) + 1
    assert torch.equal(found[-1], table[-1]), "no class stays the last row"
    for row, name in zip(found, new, strict=False):
        assert torch.equal(row, table[old.index(name)] if name in old else table[-1])
    assert torch.equal(
        by_name(found, new, old, True)[[old.index(n) for n in old if n in new]], table[[old.index(n) for n in old if n in new]]
    )
    head = by_name(table[:-1], old, new, has_null=False)
    assert all(bool((row == 0).all()) for row, name in zip(head, new, strict=True) if name not in old)
    checkpoint = {"state_dict": {"model.x": table.clone(), "y": table}, "deep": [{"x": table.clone()}]}
    follow(checkpoint, {"x": True}, old, new)
    assert torch.equal(checkpoint["deep"][0]["x"], found)
    assert torch.equal(checkpoint["state_dict"]["model.x"], found)  # type: ignore[call-overload]
    assert checkpoint["state_dict"]["y"] is table  # type: ignore[call-overload]


def test_one_line_says_which() -> None:
    assert sentence(["bird", "cat", "dog"], ["cat", "cow"], True) == (
        'classes: 1 (cat) taken over by name; 1 (cow) new, starting as "no class"; 2 (bird, dog) not used'
    )


def pictures(folder: Path, *classes: str) -> str:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.random.default_rng([number, i]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three classes."""
    run = tmp_path_factory.mktemp("base")
    data = options(pictures(run / "data", "bird", "cat", "dog"))
    assert main(stage1(run, *data[:4], data="folder")) == 0
    assert main(stage2(run, *data, data="folder", steps=3)) == 0
    return run


def options(path: str) -> list[str]:
    return ["--data.path", path, "--data.size=16", "--data.batch_size=2"]


def table(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)["state_dict"]["model.conditioner.embedding.weight"]


@pytest.mark.parametrize("classes", [("ant", "cat", "dog"), ("cat", "dog"), ("bird", "cat", "cow", "dog")])
def test_fine_tuning_with_other_classes(base: Path, classes: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = options(pictures(tmp_path / "data", *classes))
    start = [f"--model.init={base}/diffusion/model", f"--model.first_stage={base}/diffusion/model", "--model.optimizer.lr=0.0"]
    assert main(stage2(tmp_path / "run", *data, *start, data="folder", steps=1)) == 0
    assert "taken over by name" in capsys.readouterr().out
    before = model_folder.load(base / "diffusion" / "model").model.conditioner.embedding.weight
    after = table(tmp_path / "run" / "diffusion" / "checkpoints" / "last.ckpt")
    rows = [["bird", "cat", "dog"].index(name) if name in ("bird", "cat", "dog") else 3 for name in classes]
    assert torch.equal(after, before[[*rows, 3]])


def test_resuming_with_a_class_more(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, running means and averages of known classes go on as if nothing had come."""
    data = options(pictures(tmp_path / "data", "bird", "cat", "cow", "dog"))
    last = base / "diffusion" / "checkpoints" / "last.ckpt"
    first = [f"--model.first_stage={base}/autoencoder/model"]
    cli = parse(find_configs(stage2(tmp_path / "run", *data, *first, data="folder", steps=3)[1:]))
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=last)  # of step 3: nothing is trained
    assert "1 (cow) new" in capsys.readouterr().out
    old, name, rows = torch.load(last, weights_only=True), "conditioner.embedding.weight", [0, 1, 3, 2, 3]
    table = cli.model.model.conditioner.embedding.weight
    assert torch.equal(table, old["state_dict"][f"model.{name}"][rows])
    averaged = next(callback.averaged for callback in cli.trainer.callbacks if isinstance(callback, EMA))
    assert torch.equal(averaged[name], old["ldm"]["averaged"][name][rows])
    before = next(state["exp_avg"] for state in old["optimizer_states"][0]["state"].values() if state["exp_avg"].shape == (4, 64))
    after = cli.trainer.optimizers[0].state[table]["exp_avg"]
    assert torch.equal(after[[0, 1, 3, 4]], before)
    assert (after[2] == 0).all(), "the new class has no history"


def test_the_first_stage_that_is_asked_for_wins(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data.path", str(base / "data"), "--data.size=16", "--data.batch_size=2"]
    decoder = ["--model.init", str(base / "autoencoder" / "model"), "--model.freeze=[encoder,quant_conv]"]
    assert main(stage1(tmp_path / "decoder", *data, *decoder, data="folder")) == 0
    assert main(stage1(tmp_path / "other", *data, "--model.init_args.seed=5", data="folder")) == 0
    start = [*options(str(base / "data")), f"--model.init={base}/diffusion/model"]
    mine = tmp_path / "decoder" / "autoencoder" / "model"
    capsys.readouterr()
    assert main(stage2(tmp_path / "run", *start, f"--model.first_stage={mine}", data="folder")) == 0
    assert "the decoder is that of first_stage" in capsys.readouterr().out
    found = model_folder.load(tmp_path / "run" / "diffusion" / "model").model.latents.autoencoder
    assert model_folder.fingerprint(found) == model_folder.fingerprint(model_folder.load(mine).model)
    other = tmp_path / "other" / "autoencoder" / "model"
    assert main(stage2(tmp_path / "x", *start, f"--model.first_stage={other}", data="folder")) == 0
    assert "its latents are measured anew" in capsys.readouterr().out
    latents = model_folder.load(tmp_path / "x" / "diffusion" / "model").model.latents
    assert model_folder.fingerprint(latents.autoencoder) == model_folder.fingerprint(model_folder.load(other).model)
    assert not torch.equal(latents.shift, model_folder.load(base / "diffusion" / "model").model.latents.shift)
    emoji = ["--data.path", str(base / "data"), "--data.size=16", "--model.init=emoji", "--model.network.channels=60"]
    assert main(stage2(tmp_path / "y", *emoji, f"--model.first_stage={other}", data="folder")) == 1
    assert "the first stage makes 2 latent channels, the network of init, emoji, works on 4" in capsys.readouterr().err
