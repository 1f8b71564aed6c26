"""Model folders, what they refuse, the frozen first stage, generation that does not depend on its neighbours, and the EMA."""

import inspect
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldm import model_folder
from ldm.autoencoder.bottleneck import FSQ, KL, VQ
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.callbacks.ema import CHECKPOINT_KEY as EMA_KEY
from ldm.callbacks.ema import EMA
from ldm.conditioning.label import ClassLabel, Unconditional
from ldm.diffusion.guidance import CFG
from ldm.diffusion.objective import MinSNR, Simple
from ldm.diffusion.samplers import Ancestral, DPMSolverPP2M, Heun
from ldm.diffusion.schedule import CosineSchedule, LDMSchedule, LinearSchedule
from ldm.model_folder import CHECKPOINT_KEY, build, describe, fingerprint, load, save
from ldm.nn.unet import UNet
from ldm.stages.generation import LANES, Recipe, Request, generate
from ldm.stages.latents import LatentSpace
from ldm.stages.model import LatentDiffusion

CLASSES = ["animal/cat", "animal/dog", "food/hot dog"]
CARD = {"stage": "DiffusionStage", "classes": ["😀", "“quoted”", "no"], "size": 16, "steps": 3}


def autoencoder(seed: int = 0, **options: Any) -> ConvAutoencoder:
    torch.manual_seed(seed)
    return ConvAutoencoder(**{"bottleneck": KL(2), "channels": 8, "multipliers": (1, 2), "num_blocks": 1, **options})


def latent_diffusion(seed: int = 0, conditional: bool = True) -> LatentDiffusion:
    """A measured model whose layers all do something."""
    torch.manual_seed(seed)
    network = UNet(2, 16, (1, 2), 1, (1,), head_channels=8, vector_dim=6 if conditional else 0)
    conditioner = ClassLabel(3, 6) if conditional else Unconditional()
    model = LatentDiffusion(autoencoder(seed), network, conditioner, LDMSchedule(50), "v")
    randomise(model, seed, 0.05)
    model.latents.measure(torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0]), 7, (8, 8))
    return model.eval()


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
    assert spec["class_path"] == "ldm.stages.model.LatentDiffusion"
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
    requests, recipe = [Request(0, 0, "cat"), Request(1, 0, None)], Recipe(steps=2)
    assert torch.equal(generate(loaded.model, requests, recipe, CLASSES), generate(model.eval(), requests, recipe, CLASSES))


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
    "ldm.stages.latents.LatentSpace",
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


# ---------------------------------------------------------------------------------------------------------------------
# LatentDiffusion and LatentSpace
# ---------------------------------------------------------------------------------------------------------------------


def test_channels_have_to_match() -> None:
    for first, second in ((2, 3), (4, 1)):
        parts = (autoencoder(bottleneck=KL(first)), UNet(second, 4, (1,), 1, ()), Unconditional(), LDMSchedule(5))
        with pytest.raises(ValueError, match=rf"takes {second} latent channels, the first stage makes {first}:.*in_channels to {first} "):
            LatentDiffusion(*parts)
    LatentDiffusion(autoencoder(bottleneck=KL(3)), UNet(3, 4, (1,), 1, ()), Unconditional(), LDMSchedule(5))


def test_the_first_stage_stays_frozen() -> None:
    model = latent_diffusion()
    for _ in range(2):
        model.train()
        assert model.denoiser.network.training
        assert model.conditioner.training
        assert not any(module.training for module in model.latents.modules())
    model.latents.train(True)
    assert not any(module.training for module in model.latents.modules())
    assert not any(p.requires_grad for p in model.latents.parameters())
    assert all(p.requires_grad for part in (model.denoiser, model.conditioner) for p in part.parameters())
    x = normal(1, 3, 16, 16).requires_grad_()
    z = model.latents.to_latents(x)
    assert not z.requires_grad
    assert not model.latents.to_images(z.requires_grad_()).requires_grad
    assert not model.latents.moments(x).requires_grad


def test_there_and_back_is_the_decoded_mode() -> None:
    space = LatentSpace(randomise(autoencoder()).double()).double()
    x, noise = normal(3, 3, 16, 8).double(), normal(3, 2, 8, 4, seed=1).double()
    plain = space.autoencoder.decode(space.autoencoder.encode(x).mode())
    torch.testing.assert_close(space.to_images(space.to_latents(x)), plain, rtol=1e-12, atol=1e-12)
    space.measure(torch.tensor([0.3, -20.0]), torch.tensor([0.01, 5.0]), 3, (8, 4))
    torch.testing.assert_close(space.to_images(space.to_latents(x)), plain, rtol=1e-9, atol=1e-9)
    posterior = space.autoencoder.encode(x)
    assert torch.equal(space.to_latents(posterior), space.to_latents(x))
    sampled = space.to_images(space.to_latents(x, noise))
    torch.testing.assert_close(sampled, space.autoencoder.decode(posterior.sample(noise)), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sampled, plain)
    assert torch.equal(space.moments(x), space.autoencoder.moments(x))


def test_measured_latents_have_mean_zero_and_deviation_one() -> None:
    space = LatentSpace(randomise(autoencoder()).double()).double()
    x = 3 * normal(20, 3, 8, 8).double()
    raw = space.autoencoder.encode(x).mode().detach()
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3), unbiased=False)
    assert not torch.allclose(mean, torch.zeros(2).double(), atol=1e-2)
    space.measure(mean, std, 20, (4, 4))
    z = space.to_latents(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(z.std((0, 2, 3), unbiased=False), torch.ones(2).double(), rtol=0, atol=1e-10)
    assert (int(space.count), space.size.tolist()) == (20, [4, 4])


def test_nothing_starts_before_the_latents_are_measured() -> None:
    model = LatentDiffusion(autoencoder(), UNet(2, 4, (1,), 1, ()), Unconditional(), LDMSchedule(5))
    assert not model.latents.measured
    with pytest.raises(ValueError, match=r"no latent statistics.*ldm fit"):
        model.latents.require_measured()
    with pytest.raises(ValueError, match="no latent statistics"):
        generate(model, [Request(0)], Recipe(steps=1))
    good = (torch.zeros(2), torch.ones(2), 1)
    for bad in ({0: torch.tensor([0.0, torch.nan])}, {1: torch.tensor([1.0, 0.0])}, {1: torch.tensor([torch.nan, 1.0])}, {2: 0}):
        mean, std, number = (bad.get(i, value) for i, value in enumerate(good))
        with pytest.raises(ValueError, match="train it again"):
            model.latents.measure(mean, std, number, (8, 8))
        assert not model.latents.measured
    model.latents.measure(*good, (8, 8))
    model.latents.require_measured()
    assert generate(model, [Request(0)], Recipe(steps=1)).shape == (1, 3, 16, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(index=st.integers(0, 2**40), seed=st.integers(0, 2**40), draws=st.integers(1, 3))
def test_the_noise_of_a_request(index: int, seed: int, draws: int) -> None:
    one, two = (Request(index, seed).noise((2, 3, 4)) for _ in range(2))
    other_index, other_seed = Request(index + 1, seed).noise((2, 3, 4)), Request(index, seed + 1).noise((2, 3, 4))
    generator, seen = np.random.default_rng([seed, index]), []
    for _ in range(draws):
        noise = one()
        assert (noise.shape, noise.dtype) == ((2, 3, 4), torch.float32)
        assert torch.equal(noise, two())
        assert np.array_equal(noise.numpy(), generator.standard_normal((2, 3, 4), dtype=np.float32))
        seen += [noise, other_index(), other_seed()]
    assert len({tuple(noise.flatten().tolist()) for noise in seen}) == 3 * draws
    assert not torch.equal(Request(seed, index).noise((9,))(), Request(index, seed).noise((9,))()) or seed == index


def test_noise_is_standard_normal() -> None:
    noise = torch.cat([Request(i, 3).noise((1000,))() for i in range(100)])
    assert abs(float(noise.mean())) < 4 / 100_000**0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / 100_000) ** 0.5


def wanted(indices: list[int], seed: int = 0) -> list[Request]:
    return [Request(i, seed, [*CLASSES, None][i % 4]) for i in indices]


@pytest.mark.parametrize(
    "recipe",
    [Recipe(Ancestral(1.0), CFG(2.0), 3), Recipe(DPMSolverPP2M(), CFG(1.0), 3), Recipe(Heun(), CFG(0.0), 2, "leading")],
    ids=["ancestral", "dpm", "heun"],
)
def test_a_picture_does_not_depend_on_the_others(recipe: Recipe) -> None:
    model = latent_diffusion()
    everything = generate(model, wanted(list(range(16))), recipe, CLASSES)
    assert everything.shape == (16, 3, 16, 16)
    assert float((everything.abs() == 1).float().mean()) < 0.5, "not all clamped, which would compare nothing"
    pictures = {tuple(picture.flatten().tolist()) for picture in everything}
    assert len(pictures) == 16
    groups = [[i] for i in (0, 3, 7, 8, 15)]  # alone
    groups += [[*range(7)], [*range(9, 16)], [*range(15, -1, -1)], [5, 5, 5], [12, 3, 9, 0, 15, 7, 1, 11, 4]]
    for indices in groups:
        some = generate(model, wanted(indices), recipe, CLASSES)
        assert len(some) == len(indices)
        for index, picture in zip(indices, some, strict=True):
            assert torch.equal(picture, everything[index]), f"picture {index} among {indices}"
    again = generate(model, wanted(list(range(16)), seed=1), recipe, CLASSES)
    assert not any(torch.equal(a, b) for a, b in zip(again, everything, strict=True))


def test_random_state_and_gradients_are_left_alone() -> None:
    model, state = latent_diffusion(), torch.get_rng_state()
    first = generate(model, wanted([0]), Recipe(Ancestral(1.0), steps=3), CLASSES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(generate(model, wanted([0]), Recipe(Ancestral(1.0), steps=3), CLASSES), first)
    assert not first.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_classes_guidance_and_progress() -> None:
    model, calls = latent_diffusion(), []
    plain = Recipe(DPMSolverPP2M(), CFG(1.0), 3)
    requests = [Request(0, 0, condition) for condition in ("cat", "dog", 0, None)]
    cat, dog, zero, nothing = generate(model, requests, plain, CLASSES, progress=lambda: calls.append(1))
    assert len(calls) == 3, "once after each step, the four being one group"
    assert not torch.equal(cat, dog)
    assert torch.equal(cat, zero), "class 0 by number"
    guided = generate(model, requests, Recipe(DPMSolverPP2M(), CFG(3.0), 3), CLASSES)
    assert not torch.equal(guided[0], cat)
    torch.testing.assert_close(guided[3], nothing, rtol=1e-4, atol=1e-4)
    null = generate(model, requests, Recipe(DPMSolverPP2M(), CFG(0.0), 3), CLASSES)
    assert all(torch.equal(picture, nothing) for picture in null)
    calls.clear()
    generate(model, wanted(list(range(LANES + 1))), plain, CLASSES, progress=lambda: calls.append(1))
    assert len(calls) == 2 * 3
    with pytest.raises(ValueError, match="51 sampling steps"):
        generate(model, requests, Recipe(steps=51), CLASSES)


def test_pictures_lie_between_minus_one_and_one() -> None:
    model = randomise(latent_diffusion(), scale=0.5)
    pictures = generate(model, wanted([0, 1]), Recipe(steps=2), CLASSES)
    assert (float(pictures.min()), float(pictures.max())) == (-1.0, 1.0)


def test_an_unconditional_model_takes_no_class() -> None:
    model = latent_diffusion(conditional=False)
    assert generate(model, [Request(0), Request(1)], Recipe(steps=2)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"takes no condition, 'cat' was asked for: leave --classes out"):
        generate(model, [Request(0, 0, "cat")], Recipe(steps=2))


NAMES = ["animal/cat", "animal/dog", "food/hot dog", "Face/Smiling", "symbol/cat"]


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        (None, 5), ("animal/cat", 0), ("ANIMAL/CAT", 0), ("symbol/cat", 4), ("dog", 1), ("Dog", 1), ("hot dog", 2), ("smiling", 3),
        ("smil", 3), ("hot", 2), ("food", 2), (0, 0), (4, 4), ("3", 3),
    ],
)  # fmt: skip
def test_a_class_by_name_number_or_part(asked: str | int | None, label: int) -> None:
    assert ClassLabel(5, 2).request(asked, NAMES) == {"label": label}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("cat", "class 'cat' is ambiguous; allowed: animal/cat, symbol/cat"),
        ("animal", "class 'animal' is ambiguous; allowed: animal/cat, animal/dog"),
        ("horse", f"class 'horse' is unknown; allowed: {', '.join(NAMES)}"),
        ("5", f"class '5' is unknown; allowed: {', '.join(NAMES)}"),
        (5, f"class 5 is unknown; allowed: {', '.join(NAMES)}"),
        (-1, f"class -1 is unknown; allowed: {', '.join(NAMES)}"),
    ],
)
def test_a_class_that_is_ambiguous_or_unknown(asked: str | int, message: str) -> None:
    with pytest.raises(ValueError, match=r"^class ") as error:
        ClassLabel(5, 2).request(asked, NAMES)
    assert str(error.value) == message


def test_names_that_are_numbers_and_no_names_at_all() -> None:
    conditioner = ClassLabel(3, 2)
    names = ["10", "2", "30"]
    assert [conditioner.request(asked, names)["label"] for asked in ("2", 2, "10", "30", "0", 1)] == [1, 1, 0, 2, 0, 1]
    assert conditioner.request(2, []) == {"label": 2}
    with pytest.raises(ValueError, match=r"^class 'cat' is unknown; allowed: 0 to 2$"):
        conditioner.request("cat", [])
    with pytest.raises(ValueError, match="num_classes is 0"):
        ClassLabel(0)


@pytest.mark.parametrize("names", [["A", "B", "a", "b"], ["animal/cat", "cat"]])
def test_every_class_can_be_asked_for_by_its_whole_name(names: list[str]) -> None:
    """DiffusionStage.pictures and `ldm predict` without --classes ask for all names."""
    assert [ClassLabel(len(names), 2).request(name, names)["label"] for name in names] == list(range(len(names)))


def test_class_label_vectors() -> None:
    conditioner = ClassLabel(3, 4)
    batch = {"label": torch.tensor([2, 0, 3, -1])}
    table = conditioner.embedding.weight
    assert table.shape == (4, 4)
    cond, null = conditioner.encode(batch, lambda x: x), conditioner.null(batch)
    assert cond.vector is not None
    assert null.vector is not None
    assert torch.equal(cond.vector, table[[2, 0, 3, 3]]), "-1 is an image without a class"
    assert torch.equal(null.vector, table[[3, 3, 3, 3]])


# ---------------------------------------------------------------------------------------------------------------------
# EMA
# ---------------------------------------------------------------------------------------------------------------------


def stage(*values: float) -> Any:
    """A stage whose model has one trained and one frozen weight."""
    model = nn.Module()
    model.register_parameter("trained", nn.Parameter(torch.tensor(values, dtype=torch.float64)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False))
    return SimpleNamespace(model=model)


def trainer_at(step: int) -> Any:
    return SimpleNamespace(global_step=step)


def run(ema: EMA, module: Any, weights: list[float], first: int = 1, accumulate: int = 1) -> None:
    """One optimizer step per entry of `weights`, each seen by `accumulate` batches of which only the last moves the weight."""
    for step, weight in enumerate(weights, start=first):
        for batch in range(accumulate):
            done = batch == accumulate - 1
            if done:
                module.model.trained.data.fill_(weight)
            ema.on_train_batch_end(trainer_at(step if done else step - 1), module, None, None, batch)


def closed_form(start: float, weights: list[float], decay: float) -> float:
    """w_0 prod d_k + sum_k (1 - d_k) w_k prod_{j > k} d_j with d_k = min(decay, (1 + k) / (10 + k))."""
    decays = [min(decay, (1 + k) / (10 + k)) for k in range(1, len(weights) + 1)]
    total = start * float(np.prod(decays))
    return total + sum((1 - d) * w * float(np.prod(decays[k + 1 :])) for k, (d, w) in enumerate(zip(decays, weights, strict=True)))


@settings(deadline=None, max_examples=40)
@given(
    start=st.floats(-10, 10),
    weights=st.lists(st.floats(-10, 10), min_size=1, max_size=12),
    decay=st.sampled_from([0.0, 0.2, 0.5, 0.999]),
    accumulate=st.integers(1, 4),
)
def test_ema_closed_form(start: float, weights: list[float], decay: float, accumulate: int) -> None:
    ema, module = EMA(decay), stage(start, start)
    ema.on_fit_start(trainer_at(0), module)
    assert list(ema.averaged) == ["trained"], "frozen weights are not averaged"
    assert ema.averaged["trained"].data_ptr() != module.model.trained.data_ptr()
    run(ema, module, weights, accumulate=accumulate)
    expected = closed_form(start, weights, decay)
    torch.testing.assert_close(ema.averaged["trained"], torch.full((2,), expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert torch.equal(module.model.trained.data, torch.full((2,), weights[-1], dtype=torch.float64)), "the raw weights are not touched"


def test_ema_waits_while_gradients_accumulate() -> None:
    ema, module = EMA(0.5), stage(1.0)
    ema.on_fit_start(trainer_at(0), module)
    module.model.trained.data.fill_(3.0)
    for _ in range(3):
        ema.on_train_batch_end(trainer_at(0), module, None, None, 0)
        assert ema.averaged["trained"].item() == 1.0
    ema.on_train_batch_end(trainer_at(1), module, None, None, 3)
    once = ema.averaged["trained"].item()
    assert once == pytest.approx(1.0 * 2 / 11 + 3.0 * 9 / 11, abs=1e-15)
    for _ in range(3):
        ema.on_train_batch_end(trainer_at(1), module, None, None, 0)
        assert ema.averaged["trained"].item() == once


@pytest.mark.parametrize("loop", ["validation", "test"])
def test_validation_sees_the_average_and_gives_the_weights_back(loop: str) -> None:
    ema, model = EMA(0.9), latent_diffusion()
    module = SimpleNamespace(model=model)
    ema.on_fit_start(trainer_at(0), module)
    randomise(model.denoiser, seed=1)
    ema.on_train_batch_end(trainer_at(1), module, None, None, 0)
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in ema.averaged.items()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert set(averaged) == {name for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        getattr(ema, f"on_{loop}_start")(trainer_at(1), module)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averaged.get(name, raw[name])), name
        assert any(not torch.equal(averaged[name], raw[name]) for name in averaged)
        with pytest.raises(AssertionError, match="averaged weights as raw ones"):
            ema.on_save_checkpoint(trainer_at(1), module, {})
        getattr(ema, f"on_{loop}_end")(trainer_at(1), module)
        assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in ema.averaged.items())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers, "the optimizer's tensors stay the model's"


def test_an_exception_in_validation_gives_the_weights_back() -> None:
    ema, module = EMA(0.5), stage(1.0)
    ema.on_validation_start(trainer_at(0), module)
    ema.on_validation_end(trainer_at(0), module)
    assert module.model.trained.item() == 1.0, "before training there is no average"
    ema.on_fit_start(trainer_at(0), module)
    run(ema, module, [3.0])
    average = ema.averaged["trained"].item()
    ema.on_exception(trainer_at(1), module, ValueError())
    assert module.model.trained.item() == 3.0
    ema.on_validation_start(trainer_at(1), module)
    assert module.model.trained.item() == average
    ema.on_exception(trainer_at(1), module, ValueError())
    assert (module.model.trained.item(), ema.averaged["trained"].item()) == (3.0, average)


def test_a_resumed_average_is_the_same(tmp_path: Path) -> None:
    weights = [2.0, -1.0, 0.5, 4.0]
    whole, module = EMA(0.9), stage(1.0)
    whole.on_fit_start(trainer_at(0), module)
    run(whole, module, weights)

    first, module = EMA(0.9), stage(1.0)
    first.on_fit_start(trainer_at(0), module)
    run(first, module, weights[:2])
    content: dict[str, Any] = {"global_step": 2, CHECKPOINT_KEY: {"card": CARD}}
    first.on_save_checkpoint(trainer_at(2), module, content)
    assert content[CHECKPOINT_KEY]["card"] == CARD
    run(first, module, [100.0], first=3)  # must not reach into what is about to be written
    torch.save(content, tmp_path / "x.ckpt")

    second, module = EMA(0.9), stage(weights[1])
    second.on_load_checkpoint(trainer_at(0), module, torch.load(tmp_path / "x.ckpt", weights_only=True))
    second.on_fit_start(trainer_at(2), module)
    run(second, module, weights[2:], first=3)
    assert torch.equal(second.averaged["trained"], whole.averaged["trained"])


def test_the_model_folder_takes_the_average(tmp_path: Path) -> None:
    ema, model = EMA(0.9), latent_diffusion()
    module = SimpleNamespace(model=model)
    ema.on_fit_start(trainer_at(0), module)
    randomise(model.denoiser, seed=1)
    ema.on_train_batch_end(trainer_at(1), module, None, None, 0)
    save(model, tmp_path, CARD, ema.averaged)
    state = load(tmp_path).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], ema.averaged.get(name, tensor)), name


def test_decays_that_cannot_be() -> None:
    for decay in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"decay is {decay}"):
            EMA(decay)
    assert EMA(0.0).decay == 0.0


def test_the_average_is_kept_where_model_folder_looks_for_it() -> None:
    assert EMA_KEY == CHECKPOINT_KEY
