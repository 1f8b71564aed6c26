"""The convolutional autoencoder of stage 1."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.autoencoder.coder import Decoder, Encoder
from ldm.errors import UserError, require_at_least
from ldm.interfaces import Autoencoder, Bottleneck, Posterior, Reconstruction


class ConvAutoencoder(Autoencoder):
    """f = patch * 2^(levels - 1).  With patch 1, parameter for parameter LDM's (SD: KL of 4 channels, channels 128, (1,2,4,4)).

    attention_levels: levels with attention besides the middle (LDM's f16 model has it at its last level).  quant_conv: the 1x1
    convolutions around the bottleneck; SD3's and FLUX's 16-channel autoencoders have none.  image_channels: AutoencoderStage fills it
    in; otherwise 3.
    """

    def __init__(
        self,
        bottleneck: Bottleneck,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        attention_levels: Sequence[int] = (),
        patch: int = 1,
        image_channels: int | None = None,
        quant_conv: bool = True,
    ) -> None:
        super().__init__()
        image_channels = image_channels or 3
        require_at_least(1, channels=channels, multipliers=min(multipliers, default=0), patch=patch, num_blocks=num_blocks)
        if bad := [level for level in attention_levels if not 0 <= level < len(multipliers)]:
            raise UserError(f"attention_levels has {bad[0]}; this autoencoder's levels are 0 to {len(multipliers) - 1}")
        self.factor, self.channels, self.image_channels = patch * 2 ** (len(multipliers) - 1), bottleneck.channels, image_channels
        self.num_codes = bottleneck.num_codes
        shape, moments = (channels, multipliers, num_blocks, attention_levels, patch), bottleneck.moment_channels
        self.bottleneck = bottleneck
        self.encoder = Encoder(image_channels, moments, *shape)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(self.channels, self.channels, 1) if quant_conv else nn.Identity()
        self.decoder = Decoder(self.channels, image_channels, *shape)

    def moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def posterior(self, moments: Tensor) -> Posterior:
        return self.bottleneck.posterior(moments)

    def decode(self, z: Tensor) -> Tensor:
        return self._pixels(self.bottleneck.quantize(z))

    def _pixels(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Reconstruction:
        self.require_divisible(x)
        latent = self.bottleneck(self.moments(x), noise, x[0].numel())
        return Reconstruction(self._pixels(latent.z), latent)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.head.conv.weight

    def codes(self, z: Tensor) -> Tensor:
        return self.bottleneck.codes(z)

    def parts_to_compile(self) -> list[nn.Module]:
        return [self.encoder, self.decoder.body()]

    def after_step(self) -> None:
        self.bottleneck.after_step()
