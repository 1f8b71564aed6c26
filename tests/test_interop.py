"""Weights of diffusers, here: the same numbers out of the same numbers in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import normal, randomise

from ldm.cli import main
from ldm.interop.diffusers import WEIGHTS, load_autoencoder
from ldm.model_folder import load

autoencoders = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl")
LAYOUTS: dict[str, dict[str, Any]] = {
    "kl-f4": {"multipliers": (1, 2, 4), "latent_channels": 3},
    "kl-f8, SD and SDXL": {"multipliers": (1, 2, 4, 4), "latent_channels": 4},
    "kl-f16": {"multipliers": (1, 1, 2, 2, 4), "latent_channels": 16, "attended": (4,)},
    "kl-f32": {"multipliers": (1, 1, 2, 2, 4, 4), "latent_channels": 64, "attended": (4, 5)},
    "16 channels, SD3": {"multipliers": (1, 2, 4, 4), "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "vq-f4": {"multipliers": (1, 2, 4), "latent_channels": 3, "num_vq_embeddings": 64},
    "vq-f8": {"multipliers": (1, 2, 2, 4), "latent_channels": 4, "num_vq_embeddings": 64, "attended": (3,)},
    "vq-f16": {"multipliers": (1, 1, 2, 2, 4), "latent_channels": 8, "num_vq_embeddings": 64, "attended": (4,)},
}


def theirs_of(multipliers: tuple[int, ...], attended: tuple[int, ...] = (), **options: Any) -> Any:
    from diffusers import AutoencoderKL, VQModel

    levels = range(len(multipliers))
    down = ["AttnDownEncoderBlock2D" if level in attended else "DownEncoderBlock2D" for level in levels]
    up = ["AttnUpDecoderBlock2D" if level in attended else "UpDecoderBlock2D" for level in reversed(levels)]
    cls = VQModel if "num_vq_embeddings" in options else AutoencoderKL
    widths = [32 * m for m in multipliers]
    model = cls(down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2, **options)
    randomise(model.eval(), scale=0.02)
    with torch.no_grad():  # outputs of the size that they have in trained models: about [-1, 1]
        for part, x in ((model.encoder, normal(1, 3, 64, 64)), (model.decoder, normal(1, options["latent_channels"], 4, 4))):
            size = 2 * part(x).abs().max()
            for parameter in part.conv_out.parameters():
                parameter /= size
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_imported_autoencoder_computes_the_same(layout: str, tmp_path: Path) -> None:
    theirs = theirs_of(**LAYOUTS[layout])
    theirs.save_pretrained(tmp_path / "theirs")
    assert main(["import", "--source", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    ours = load(tmp_path / "ours").model
    x = normal(2, 3, 64, 32)
    with torch.no_grad():
        encoded = theirs.encode(x)
        wanted = encoded.latents if layout.startswith("vq") else encoded.latent_dist.parameters
        z = wanted[:, : ours.channels]
        pictures = theirs.decode(z).sample
        assert float(wanted.std()) > 1e-2
        assert float(pictures.std()) > 1e-2
        torch.testing.assert_close(ours.moments(x), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(z), pictures, atol=1e-5, rtol=0)


def test_old_names_of_attention_layers_are_known(tmp_path: Path) -> None:
    theirs = theirs_of((1, 2), latent_channels=4)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, name in old.items():
        state = {key.replace(new, name): tensor for key, tensor in state.items()}
    safetensors.torch.save_file(state, path)
    x = normal(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_autoencoder(tmp_path).moments(x), theirs.encode(x).latent_dist.parameters, atol=1e-5, rtol=0)


def test_what_cannot_be_imported_is_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--source", str(tmp_path), "--out", str(tmp_path / "ours")]) == 1
    assert "has no config.json" in capsys.readouterr().err
    theirs_of((1, 2), latent_channels=4, norm_num_groups=16).save_pretrained(tmp_path)
    assert main(["import", "--source", str(tmp_path), "--out", str(tmp_path / "ours")]) == 1
    assert "norm_num_groups = 16; only 32 can be imported" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / WEIGHTS
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: configure(f, lambda c: c.update(latent_channels=8)), "has encoder.conv_out.weight of shape [8, 64, 3, 3], but its"),
        (lambda f: configure(f, lambda c: c.update(block_out_channels=[64, 128])), "config.json asks for [64, 3, 3, 3]"),
        (lambda f: configure(f, lambda c: c.update(layers_per_block=1)), "has decoder.up_blocks.0.resnets.2.conv1.bias, of which the"),
        (lambda f: configure(f, lambda c: c.update(layers_per_block=3)), "has no encoder.down_blocks.0.resnets.2"),
        (lambda f: configure(f, lambda c: c.pop("latent_channels")), "it has no latent_channels"),
        (lambda f: configure(f, lambda c: c.pop("_class_name")), "it has no _class_name"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / WEIGHTS).write_bytes(b"12345678 no weights"), f"{WEIGHTS} is damaged"),
        (lambda f: rewrite(f, lambda s: s.pop("quant_conv.bias")), "has no quant_conv.bias: it does not fit"),
        (lambda f: rewrite(f, lambda s: s.update(extra=torch.zeros(1))), "has extra, of which the config.json beside it does not speak"),
    ],
)
def test_weights_of_another_layout(spoil: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs_of((1, 2), latent_channels=4).save_pretrained(tmp_path / "theirs")
    spoil(tmp_path / "theirs")
    assert main(["import", "--source", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "ours").exists()


def test_the_codes_of_an_imported_vq_model_outlive_the_first_steps(tmp_path: Path) -> None:
    theirs = theirs_of((1, 2), latent_channels=4, num_vq_embeddings=64)
    with torch.no_grad():
        latents = theirs.encode(normal(2, 3, 32, 32, seed=100)).latents.movedim(1, -1).flatten(0, -2)
        theirs.quantize.embedding.weight.copy_(latents[:: len(latents) // 64][:64])
    theirs.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path).train()
    before = ours.bottleneck.values.clone()
    for step in range(10):
        ours(normal(2, 3, 32, 32, seed=step))
        ours.after_step()
    moved = (ours.bottleneck.values - before).norm(dim=1) / before.norm(dim=1).mean()
    assert 0 < moved.max() < 0.1
