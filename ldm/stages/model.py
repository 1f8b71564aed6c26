"""A whole latent diffusion model as one module: what stage 2 trains, a model folder stores and `predict` loads."""

from typing import Any

from torch import nn

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.interfaces import Autoencoder, Buildable, Conditioner, Network, NoiseSchedule
from ldm.stages.latents import LatentSpace


class LatentDiffusion(Buildable, nn.Module):
    """Frozen autoencoder + noise predictor in its latents + what conditions it."""

    def __init__(
        self, autoencoder: Autoencoder, network: Network, conditioner: Conditioner, schedule: NoiseSchedule, prediction: Prediction = "eps"
    ) -> None:
        super().__init__()
        if network.in_channels != autoencoder.channels:
            raise ValueError(
                f"the network takes {network.in_channels} latent channels, the first stage makes {autoencoder.channels}: "
                f"set the network's in_channels to {autoencoder.channels} or train another first stage"
            )
        if network.vector_dim != conditioner.vector_dim:
            raise ValueError(
                f"the network takes condition vectors of {network.vector_dim} values, the conditioner makes {conditioner.vector_dim}: "
                f"set the network's vector_dim to {conditioner.vector_dim}"
            )
        self.latents = LatentSpace(autoencoder)
        self.denoiser = Denoiser(network, schedule, prediction)
        self.conditioner = conditioner

    def compile(self, *args: Any, **options: Any) -> None:
        """The part that is trained."""
        self.denoiser.network.compile(*args, **options)
