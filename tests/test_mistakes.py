"""A table of mistakes on the command line: each ends with one sentence with a remedy, a status other than 0 and no traceback."""

import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli import main
from ldm.console.check import check
from ldm.console.configs import find_configs
from ldm.console.signatures import sources
from ldm.errors import UserError
from ldm.registry import parts

TABLE = Path(__file__).parent / "mistakes.txt"
COMMON = "-c trainer/csv.yaml --trainer.max_steps=1 --trainer.limit_val_batches=1 --run {tmp}/run"
STAGES = {
    "S1": f"-c data/digits.yaml -c autoencoder/digits.yaml {COMMON}",
    "S2": f"-c data/emoji.yaml -c diffusion/emoji.yaml --model.first_stage emoji {COMMON}",
}
ROWS = [tuple(line.partition(" => ")[::2]) for line in TABLE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
PARTS = 8  # of the table, so that processes share it


def things(folder: Path) -> None:
    """What the rows name."""
    (folder / "empty").mkdir()
    (folder / "file").write_text("in the way")
    (folder / "broken.yaml").write_text("model: [\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "number.yaml").write_text("run: 007\n")
    (folder / "flat.yaml").write_text("data:\n  path: x\n")
    (folder / "typo.yaml").write_text("modle:\n  class_path: AutoencoderStage\n")
    (folder / "tag.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{folder}/executed']\n")
    letters = "abcdefghi"
    rows = [f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]" for before, name in pairwise(letters)]
    (folder / "bomb.yaml").write_text("\n".join(["a: &a [1]", *rows]))
    for i in range(8):
        path = folder / "pictures" / ("cats", "dogs")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("part", range(PARTS))
def test_each_mistake_is_one_sentence(
    part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    things(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for row, wanted in ROWS[part::PARTS]:
        known = {"tmp": tmp_path, "pictures": tmp_path / "pictures"}
        arguments = shlex.split(row.format(**{name: text.format(tmp=tmp_path) for name, text in STAGES.items()}, **known))
        status = main(arguments)
        said = capsys.readouterr().err.strip()
        assert status in (1, 2), f"{row}: {said}"
        last = said.splitlines()[-1]
        assert wanted.format(**known) in last, f"{row}: {last}"
        assert last.startswith("ldm"), last
        assert not any(word in said for word in ("Traceback", "<class '", "Namespace(", "fault of ldm")), said
    left = [path for path in tmp_path.rglob("*") if path not in before and path.is_file() and path.name != ".ldm.lock"]
    assert not left, "a refused command has written something"


def test_the_table_is_long_and_of_all_commands() -> None:
    assert len(ROWS) >= 150
    assert len({row.split()[0] for row, _ in ROWS}) > 12
    assert len({row for row, _ in ROWS}) == len(ROWS)


def test_classes_read_from_the_sources_are_those_that_are_imported() -> None:
    from ldm.interfaces import Autoencoder, Bottleneck, Conditioner, Guidance, Network, Objective, Sampler

    for base in (Autoencoder, Bottleneck, Conditioner, Guidance, Network, Objective, Sampler):
        imported = {name for name, cls in parts(base).items() if cls.__module__.split(".")[1] != "latents"}
        assert set(sources().parts(base.__name__)) == imported, base


def test_what_is_right_passes(tmp_path: Path) -> None:
    right = [
        "-c trainer/gpu.yaml -c data/digits.yaml -c autoencoder/digits.yaml --trainer.devices=[0,1] --trainer.strategy ddp_spawn",
        "-c autoencoder/digits.yaml -c data/digits.yaml -c trainer/csv.yaml --data.mirror true --model.optimizer.lr 1e-3",
        "-c data/digits.yaml -c autoencoder/digits.yaml --model.losses+=LPIPS --trainer.callbacks+=LearningRateMonitor",
        "-c data/emoji.yaml -c diffusion/emoji.yaml --model.first_stage emoji --model.network DiT --model.network.depth 3",
        "-c data/emoji.yaml -c diffusion/emoji.yaml --model.first_stage emoji --model.schedule Shifted --model.schedule.factor 2.5",
        "-c data/emoji.yaml -c diffusion/emoji.yaml --model.first_stage emoji --model.objective my.own.Objective --model.objective.x 3",
        "-c data/digits.yaml -c autoencoder/digits.yaml --trainer.max_time 00:00:10:00 --trainer.logger false --overwrite --run ~/x",
        "-c data/digits.yaml -c autoencoder/digits.yaml --print_config --data.augment+=torchvision.transforms.v2.RandomGrayscale",
    ]
    for line in right:
        check(find_configs(shlex.split(line)))


def test_configs_of_the_package_come_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    def contents(names: list[str]) -> list[str]:
        return [Path(path).read_text() for path in find_configs([part for name in names for part in ("-c", name)])[1::2]]

    names = ["trainer/cpu.yaml", "trainer/gpu.yaml", "data/folder.yaml", "autoencoder/kl-f8.yaml", "losses/ldm.yaml"]
    assert contents(names[::-1]) == contents(names)
    assert capsys.readouterr().err == ""
    assert contents(names[:0:-1]) == contents(names)
    assert "with trainer/cpu.yaml, on which the other files of trainer/ build" in capsys.readouterr().err


def test_a_file_of_the_user_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 3}\n")
    mine = str(tmp_path / "mine.yaml")
    found = find_configs(["-c", "autoencoder/digits.yaml", "-c", mine, "-c", "trainer/cpu.yaml", "-c", "data/digits.yaml"])
    assert Path(found[1]).parent.name == "trainer"
    assert found[3] == mine


def test_a_setting_that_is_not_there_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {init_args: {optimizer: {init_args: {lrr: 1}}}}\n")
    with pytest.raises(UserError, match=r"model.optimizer.lrr is unknown: AdamW takes lr, .*mine.yaml"):
        check(find_configs(["-c", "data/digits.yaml", "-c", "autoencoder/digits.yaml", "-c", str(tmp_path / "mine.yaml")]))


@pytest.mark.parametrize(
    "content", ["trainer: 3\n", "trainer: [1]\n", "model: []\n", "data: 5\n", "model: {class_path: 3}\n", "3\n", "{1: 2}\n"]
)
def test_a_config_of_another_shape_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError, match=r"mine.yaml\)"):
        check(find_configs(["-c", "data/digits.yaml", "-c", "autoencoder/digits.yaml", "-c", str(tmp_path / "mine.yaml")]))


@pytest.mark.parametrize("command", ["fit", "encode", "configs"])
def test_help_of_training_lists_configs_and_imports_nothing_heavy(command: str) -> None:
    code = f"import sys; from ldm.cli import main; main(['{command}', '--help']); print({{'torch', 'lightning'}} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "diffusion/unet-f8.yaml" in said
    assert said.strip().endswith("set()")
    if command == "fit":
        assert (
            said.index("ldm fit -c data/folder.yaml") < said.index("--overwrite") < said.index("--model.network") < said.index("trainer:")
        )


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_options_and_configs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("sample", "--data.batch_size", "autoencoder/kl-f8.yaml", "--upscale"):
        assert word in script
