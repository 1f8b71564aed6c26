"""The KL-regularised convolutional autoencoder of stage 1."""

from collections.abc import Sequence

from torch import Tensor, nn

from ldm.autoencoder.bottleneck import DiagonalGaussian
from ldm.autoencoder.coder import Decoder, Encoder
from ldm.interfaces import Autoencoder, Posterior


class KLAutoencoder(Autoencoder):
    """f = patch * 2^(levels - 1).  With patch 1, parameter for parameter LDM's AutoencoderKL (SD: channels 128, (1,2,4,4), 4 latent).

    attention_levels: levels with attention besides the middle (LDM's f16 model has it at its last level).
    """

    def __init__(
        self,
        latent_channels: int = 4,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        attention_levels: Sequence[int] = (),
        patch: int = 1,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if bad := [level for level in attention_levels if not 0 <= level < len(multipliers)]:
            raise ValueError(f"attention_levels has {bad[0]}; this autoencoder's levels are 0 to {len(multipliers) - 1}")
        self.factor, self.channels = patch * 2 ** (len(multipliers) - 1), latent_channels
        shape = (channels, multipliers, num_blocks, attention_levels, patch)
        self.encoder = Encoder(image_channels, 2 * latent_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, image_channels, *shape)

    def moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def posterior(self, moments: Tensor) -> Posterior:
        return DiagonalGaussian.of(moments)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
