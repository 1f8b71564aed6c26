"""Model folders and checkpoints: parts as plain data and back, weights bit for bit, and what is refused."""

import inspect
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import CLASSES, autoencoder, latent_diffusion

from ldm import model_folder
from ldm.autoencoder.bottleneck import FSQ, KL, VQ
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.conditioning.label import ClassLabel, Unconditional
from ldm.diffusion.guidance import CFG
from ldm.diffusion.objective import MinSNR, Simple
from ldm.diffusion.samplers import Ancestral, DPMSolverPP2M, Heun
from ldm.diffusion.schedule import CosineSchedule, LDMSchedule, LinearSchedule
from ldm.model_folder import CHECKPOINT_KEY, build, describe, fingerprint, load, save
from ldm.nn.unet import UNet
from ldm.sampling.pipeline import generate
from ldm.sampling.request import SampleRequest, SamplingConfig, SeedNoise

CARD = {"stage": "DiffusionStage", "classes": ["😀", "“quoted”", "no"], "size": 16, "steps": 3}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


# ---------------------------------------------------------------------------------------------------------------------
# describe and build
# ---------------------------------------------------------------------------------------------------------------------

number = st.floats(allow_nan=False, allow_infinity=False)
multipliers = st.lists(st.integers(1, 2), min_size=1, max_size=2)
bottlenecks = st.one_of(
    st.builds(KL, channels=st.integers(1, 3)),
    st.builds(VQ, channels=st.integers(1, 3), num_codes=st.integers(2, 9), normalise=st.booleans()),
    st.builds(FSQ, levels=st.lists(st.integers(2, 5), min_size=1, max_size=3)),
)
PARTS: dict[type, st.SearchStrategy[dict[str, Any]]] = {
    LinearSchedule: st.fixed_dictionaries({"num_steps": st.integers(1, 50), "start": st.floats(1e-6, 1e-3), "end": st.floats(1e-3, 0.9)}),
    LDMSchedule: st.fixed_dictionaries({}, optional={"num_steps": st.integers(1, 50), "start": st.floats(1e-9, 1e-3)}),
    CosineSchedule: st.fixed_dictionaries({"offset": st.floats(1e-4, 0.1)}, optional={"max_beta": st.floats(0.5, 0.999)}),
    CFG: st.fixed_dictionaries({"scale": number}),
    Ancestral: st.fixed_dictionaries({"eta": st.floats(0, 1)}),
    Heun: st.fixed_dictionaries({}),
    DPMSolverPP2M: st.fixed_dictionaries({}),
    Simple: st.fixed_dictionaries({}),
    MinSNR: st.fixed_dictionaries({"gamma": number}),
    Unconditional: st.fixed_dictionaries({}),
    ClassLabel: st.fixed_dictionaries({"num_classes": st.integers(1, 9)}, optional={"dim": st.integers(1, 9)}),
    ConvAutoencoder: st.fixed_dictionaries(
        {"bottleneck": bottlenecks, "channels": st.sampled_from([4, 8]), "multipliers": multipliers, "num_blocks": st.just(1)},
        optional={"quant_conv": st.booleans(), "attention_levels": st.sampled_from([[], [0], (0,)]), "patch": st.integers(1, 2)},
    ),
    UNet: st.fixed_dictionaries(
        {"in_channels": st.integers(1, 3), "channels": st.sampled_from([4, 8]), "multipliers": multipliers, "num_blocks": st.just(1),
         "attention_levels": st.sampled_from([[], [0], (0,)])},
        optional={"vector_dim": st.integers(0, 4), "token_dim": st.integers(0, 4), "scale_shift": st.booleans(),
                  "dropout": st.floats(0, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("cls", list(PARTS))
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_describe_and_build_are_inverse(cls: type, data: st.DataObject) -> None:
    arguments = data.draw(PARTS[cls])
    part = cls(**arguments)
    spec = describe(part)
    assert spec["class_path"] == f"{cls.__module__}.{cls.__qualname__}"
    if cls is not Unconditional:
        assert list(spec["init_args"]) == list(inspect.signature(cls).parameters), "defaults are written down, too"
    for name, value in arguments.items():
        assert spec["init_args"][name] == describe(value)
    rebuilt = build(yaml.safe_load(yaml.safe_dump(spec)))
    assert type(rebuilt) is cls
    assert describe(rebuilt) == spec
    if isinstance(part, nn.Module):
        assert [(k, v.shape) for k, v in rebuilt.state_dict().items()] == [(k, v.shape) for k, v in part.state_dict().items()]
    else:
        assert rebuilt == part


def test_a_whole_model_is_described() -> None:
    model = latent_diffusion()
    spec = describe(model)
    assert spec["class_path"] == "ldm.latents.model.LatentDiffusion"
    assert list(spec["init_args"]) == ["autoencoder", "network", "conditioner", "schedule", "prediction"]
    assert spec["init_args"]["schedule"] == {
        "class_path": "ldm.diffusion.schedule.LDMSchedule",
        "init_args": {"num_steps": 50, "start": 0.0015, "end": 0.0195},
    }
    assert spec["init_args"]["prediction"] == "v"
    rebuilt = build(json.loads(json.dumps(spec)))
    assert describe(rebuilt) == spec
    assert [p.requires_grad for p in rebuilt.parameters()] == [p.requires_grad for p in model.parameters()]


class Derived(ClassLabel):
    def __init__(self, half: int) -> None:
        super().__init__(2 * half, dim=3)


def test_a_part_of_another_package_is_described_by_its_own_arguments() -> None:
    part = Derived(4)
    assert part.init_args == {"half": 4}
    spec = describe(part)
    assert spec == {"class_path": f"{Derived.__module__}.Derived", "init_args": {"half": 4}}
    with pytest.raises(ValueError, match=r"allowed are classes of ldm$"):
        build(spec)
    rebuilt = build(spec, trusted=[Derived.__module__.split(".")[0]])
    assert type(rebuilt) is Derived
    assert rebuilt.num_classes == 8


@pytest.mark.parametrize("value", [torch.zeros(2), len, object(), {1, 2}, b"bytes", 1j])
def test_what_is_not_plain_data_is_not_described(value: Any) -> None:
    part = ClassLabel(2, 2)
    part.init_args["dim"] = value
    with pytest.raises(TypeError, match="is none of them"):
        describe(part)


# ---------------------------------------------------------------------------------------------------------------------
# Save and load
# ---------------------------------------------------------------------------------------------------------------------


def test_weights_survive_bit_for_bit(tmp_path: Path) -> None:
    model = latent_diffusion().train()
    save(model, tmp_path / "a" / "model", CARD)
    loaded = load(tmp_path / "a" / "model")
    assert same_weights(loaded.model, model)
    assert loaded.card == CARD
    assert not any(module.training for module in loaded.model.modules())
    assert describe(loaded.model) == describe(model)
    assert fingerprint(loaded.model.latents.autoencoder) == fingerprint(model.latents.autoencoder)
    assert loaded.model.latents.measured
    save(loaded.model, tmp_path / "b", CARD)
    for name in ("config.yaml", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / "model" / name).read_bytes()
    assert load(str(tmp_path / "b")).sha256 == loaded.sha256
    requests, config = [SampleRequest(0, SeedNoise(), {"class": "cat"}), SampleRequest(1, SeedNoise(0, 1))], SamplingConfig(steps=2)
    assert torch.equal(generate(loaded.model, requests, config, CLASSES), generate(model.eval(), requests, config, CLASSES))


def test_other_weights_are_written_in_place_of_the_models(tmp_path: Path) -> None:
    model = autoencoder()
    other = {"quant_conv.bias": torch.arange(4.0)}
    save(model, tmp_path, {}, other)
    state = load(tmp_path).model.state_dict()
    assert torch.equal(state.pop("quant_conv.bias"), torch.arange(4.0))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert not torch.equal(model.quant_conv.bias, torch.arange(4.0)), "the model itself is not changed"


def data_bytes(folder: Path) -> int:
    raw = (folder / "model.safetensors").read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


def test_half_is_half_as_large(tmp_path: Path) -> None:
    model = randomise(autoencoder()).eval()
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    save(model, tmp_path / "full", {})
    save(model, tmp_path / "half", {}, half=True)
    assert (data_bytes(tmp_path / "full"), data_bytes(tmp_path / "half")) == (4 * numbers, 2 * numbers)
    loaded = load(tmp_path / "half").model
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    z = normal(2, 2, 8, 8)
    with torch.no_grad():
        full, rounded = model.decode(z), loaded.decode(z)
    assert 0 < float((full - rounded).abs().max()) < 0.01 * float(full.abs().max())


def test_half_leaves_whole_numbers_alone(tmp_path: Path) -> None:
    model = latent_diffusion()
    model.latents.count.fill_(1_234_567)
    save(model, tmp_path, {}, half=True)
    latents = load(tmp_path).model.latents
    assert int(latents.count) == 1_234_567
    assert latents.size.tolist() == [8, 8]


def test_a_folder_holds_no_pickle(tmp_path: Path) -> None:
    save(latent_diffusion(), tmp_path, CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model.safetensors"]
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert "!!" not in text, "plain YAML needs no tags"
    assert list(yaml.safe_load(text)) == ["format", "sha256", "card", "model"]
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["latents.shift"] == {"dtype": "F32", "shape": [2], "data_offsets": header["latents.shift"]["data_offsets"]}


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file"
    model_folder.write_atomically(target, b"old")
    assert target.stat().st_mode & 0o777 == 0o644

    def crash(*paths: Any) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="power cut"):
        model_folder.write_atomically(target, b"new")
    assert target.read_bytes() == b"old"


def test_fingerprints() -> None:
    model = autoencoder()
    first = fingerprint(model)
    assert fingerprint(autoencoder()) == first
    assert fingerprint(autoencoder(seed=1)) != first
    with torch.no_grad():
        model.quant_conv.bias[0] += 1e-6
    assert fingerprint(model) != first
    assert fingerprint(autoencoder().double()) != first


def test_fingerprint_of_a_module_with_a_scalar_buffer() -> None:
    """An autoencoder of one's own may have batch norm, whose num_batches_tracked has shape ()."""
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    assert second.num_batches_tracked is not None
    second.num_batches_tracked += 1
    assert fingerprint(first) != fingerprint(second)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    save(autoencoder(), path, {})
    load(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model folder to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("position", [0, 9, 500, -1])
def test_one_flipped_bit_is_noticed(folder: Path, position: int) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[position] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged or was exchanged") as error:
        load(folder)
    assert str(folder / "model.safetensors") in str(error.value)


def test_a_truncated_or_exchanged_file_is_noticed(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    save(autoencoder(seed=1), folder.parent / "other", {})
    for wrong in (data[:-1], b"", (folder.parent / "other" / "model.safetensors").read_bytes()):
        (folder / "model.safetensors").write_bytes(wrong)
        with pytest.raises(ValueError, match="damaged or was exchanged"):
            load(folder)


def test_missing_models(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(ValueError, match="no model at") as error:
            load(path)
        assert repr(str(path)) in str(error.value)
    for name in ("config.yaml", "model.safetensors"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ValueError, match="no model at"):
            load(folder)
        (folder / name).write_bytes(data)
    load(folder)


def test_another_format_and_other_shapes(folder: Path) -> None:
    edit(folder, lambda config: config["model"]["init_args"].update(channels=16))
    with pytest.raises(ValueError, match="do not fit the model: "):
        load(folder)
    edit(folder, lambda config: config.update(format=2))
    with pytest.raises(ValueError, match="not a model description"):
        load(folder)
    for text in ("", "just text", "- a\n- list\n"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match="not a model description"):
            load(folder)


@pytest.mark.parametrize("key", ["sha256", "model", "card"])
def test_a_config_that_lacks_something(folder: Path, key: str) -> None:
    edit(folder, lambda config: config.pop(key))
    with pytest.raises(ValueError, match=key):
        load(folder)


def test_a_config_with_an_argument_that_this_version_does_not_know(folder: Path) -> None:
    edit(folder, lambda config: config["model"]["init_args"].update(from_the_future=1))
    with pytest.raises(ValueError, match="from_the_future"):
        load(folder)


def test_a_config_that_is_not_yaml(folder: Path) -> None:
    (folder / "config.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        load(folder)


def test_yaml_tags_do_not_run_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "config.yaml").write_text(f"format: 1\nmodel: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises((ValueError, yaml.YAMLError)):
        load(folder)
    assert not marker.exists()


FOREIGN = [
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "torch.load",
    "pickle.loads",
    "ldm_evil.Part",
    "ldm",
    "system",
    "",
]
NOT_PARTS = [
    "ldm.cli.main",
    "ldm.model_folder.os.system",
    "ldm.model_folder.Path",
    "ldm.model_folder.load",
    "ldm.model_folder.torch",
    "ldm.interfaces.Any",
    "ldm.latents.space.LatentSpace",
    "ldm.nn.unet.Stage",
    "ldm.nn.unet.Missing",
    "ldm.no_such_module.UNet",
]


@pytest.mark.parametrize("path", FOREIGN + NOT_PARTS)
@pytest.mark.parametrize("nested", [False, True])
def test_classes_that_are_refused(folder: Path, tmp_path: Path, path: str, nested: bool) -> None:
    marker = tmp_path / "ran"
    bad = {"class_path": path, "init_args": {"command": f"touch {marker}", "args": ["touch", str(marker)]}}
    edit(folder, lambda config: config["model"]["init_args"].update(channels=[bad]) if nested else config.update(model=bad))
    with pytest.raises(ValueError, match="the model names") as error:
        load(folder)
    assert repr(path) in str(error.value)
    assert ("allowed are classes of ldm" in str(error.value)) == (path in FOREIGN)
    with pytest.raises(ValueError, match="the model names"):
        build(bad, trusted=["another_package"])
    assert not marker.exists()


def test_the_command_line_is_not_run_by_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["ldm", "--version"])
    monkeypatch.delitem(sys.modules, "ldm.__main__", raising=False)
    with pytest.raises(ValueError, match="the model names"):
        build({"class_path": "ldm.__main__.main", "init_args": {}})
    assert capsys.readouterr().out == ""


def test_foreign_packages_are_built_only_when_trusted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, marker = tmp_path / "site" / "foreign_parts", tmp_path / "imported"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from pathlib import Path\nfrom ldm.autoencoder.bottleneck import KL\nfrom ldm.autoencoder.conv import ConvAutoencoder\n"
        f"Path({str(marker)!r}).touch()\n"
        "class Mine(ConvAutoencoder):\n    def __init__(self, width):\n        super().__init__(KL(2), width, (1, 2), 1)\n"
        "class NotAPart:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    edit(folder, lambda config: config.update(model={"class_path": "foreign_parts.Mine", "init_args": {"width": 8}}))
    with pytest.raises(ValueError, match=r"'foreign_parts\.Mine'; allowed are classes of ldm, other$"):
        load(folder, trusted=["other"])
    assert not marker.exists(), "the package must not even be imported"
    loaded = load(folder, trusted=["foreign_parts"])
    assert type(loaded.model).__name__ == "Mine"
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), autoencoder().parameters(), strict=True))
    with pytest.raises(ValueError, match="not a part"):
        build({"class_path": "foreign_parts.NotAPart"}, trusted=["foreign_parts"])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["text", "empty", "pickle", "zip", "zip in a valid checkpoint", "weights alone"])
def test_files_that_are_not_checkpoints(tmp_path: Path, kind: str) -> None:
    path, marker = tmp_path / "x.ckpt", tmp_path / "ran"
    if kind == "text":
        path.write_text("a text file\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    elif kind == "zip":
        torch.save(Bomb(marker), path)
    elif kind == "zip in a valid checkpoint":
        torch.save({**checkpoint(autoencoder()), "extra": Bomb(marker)}, path)
    else:
        torch.save({"state_dict": autoencoder().state_dict()}, path)
    for name in (path, str(path)):
        with pytest.raises(ValueError, match="is not a checkpoint written by `ldm fit`") as error:
            load(name)
        assert str(path) in str(error.value)
    assert not marker.exists()


def checkpoint(model: nn.Module, **entries: Any) -> dict[str, Any]:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"state_dict": {**state, "loss.weight": torch.ones(1)}, CHECKPOINT_KEY: {"model": describe(model), "card": CARD, **entries}}


def test_a_checkpoint_is_loaded_with_its_averaged_weights(tmp_path: Path) -> None:
    model = latent_diffusion()
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(model), path)
    loaded = load(path)
    assert same_weights(loaded.model, model)
    assert loaded.card == CARD
    assert not loaded.model.training
    averaged = {name: p.detach() + 1 for name, p in model.named_parameters() if p.requires_grad}
    torch.save(checkpoint(model, averaged=averaged), path)
    state = load(path).model.state_dict()
    assert 0 < len(averaged) < len(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], averaged.get(name, tensor)), name


def test_a_checkpoint_is_refused_like_a_folder(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "x.ckpt"
    content = checkpoint(autoencoder())
    content[CHECKPOINT_KEY]["model"] = {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"the model names the class 'os\.system'"):
        load(path)
    assert not marker.exists()
    content = checkpoint(autoencoder())
    content["state_dict"].pop("model.quant_conv.bias")
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"do not fit the model.*quant_conv\.bias"):
        load(path)
