"""import: weights of other projects as a model folder."""

from pathlib import Path

from ldm import model_folder
from ldm.console.options import Option, parse, path, switch
from ldm.interop import diffusers

OPTIONS = [
    Option("source", "folder with config.json and diffusion_pytorch_model.safetensors (AutoencoderKL or VQModel)", path),
    Option("out", "model folder to write", path),
    Option("--overwrite", "replace a model that is there", switch, False),
]


def import_autoencoder(source: str, out: str, overwrite: bool = False) -> int:
    """Make a model folder of an autoencoder of diffusers, for `--model.init` or as the first stage of stage 2."""
    model_folder.require_free(Path(out), overwrite)
    model = diffusers.load_autoencoder(source)
    model_folder.save(model, out, {"stage": "AutoencoderStage", "classes": [], "imported": Path(source).name})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"written to {out}: f = {model.factor}, {model.channels} latent channels, {size:.1f}M parameters")
    return 0


def main(command: str, arguments: list[str]) -> int:
    return import_autoencoder(**parse(command, "Make a model folder of an autoencoder of diffusers.", OPTIONS, arguments))
