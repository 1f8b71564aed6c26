"""Latent diffusion models: train an autoencoder, train a diffusion model in its latents, sample pictures.

`ldm.train("pictures")`, `ldm.load("runs/pictures").sample(n=4)`.  Importing this costs nothing: what is used is imported then.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.commands.auto import train
    from ldm.data.inspect import inspect
    from ldm.sampling.model import Model, Picture, Pictures, load

__version__ = "0.2.0"
__all__ = ["Model", "Picture", "Pictures", "inspect", "load", "train"]


def __getattr__(name: str) -> Any:
    if name == "inspect":
        from ldm.data.inspect import inspect

        return inspect
    if name == "train":
        from ldm.commands.auto import train

        return train
    if name in __all__:
        from ldm.sampling import model

        return getattr(model, name)
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
