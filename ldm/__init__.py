"""Latent diffusion models: train an autoencoder, train a diffusion model in its latents, sample pictures.

`ldm.load("emoji").sample(classes=["cat-face"], n=4)`.  Importing this costs nothing: what is used is imported then.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.data.inspect import inspect
    from ldm.sampling.model import Model, Picture, Pictures, load

__version__ = "0.2.0"
__all__ = ["Model", "Picture", "Pictures", "inspect", "load"]


def __getattr__(name: str) -> Any:
    if name == "inspect":
        from ldm.data.inspect import inspect

        return inspect
    if name in __all__:
        from ldm.sampling import model

        return getattr(model, name)
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
