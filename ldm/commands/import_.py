"""import: weights of other projects as a model folder."""

from pathlib import Path

from jsonargparse import ArgumentParser

from ldm import model_folder
from ldm.commands.configs import PARSER, plain_errors
from ldm.interop import diffusers


def import_autoencoder(source: str, out: str) -> None:
    """Make a model folder of an autoencoder of diffusers, for `--model.init` or as the first stage of stage 2.

    Args:
        source: folder with config.json and diffusion_pytorch_model.safetensors (AutoencoderKL or VQModel).
        out: model folder to write.
    """
    model = diffusers.load_autoencoder(source)
    model_folder.save(model, out, {"stage": "AutoencoderStage", "classes": [], "imported": Path(source).name})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"written to {out}: f = {model.factor}, {model.channels} latent channels, {size:.1f}M parameters")


def main(command: str, arguments: list[str]) -> int:
    parser = ArgumentParser(prog=f"ldm {command}", description="Make a model folder of an autoencoder of diffusers.", **PARSER)
    parser.add_function_arguments(import_autoencoder)
    with plain_errors():
        import_autoencoder(**vars(parser.parse_args(arguments)))
    return 0
