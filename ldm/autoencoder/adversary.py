"""The adversarial term of stage 1: PatchGAN (arXiv:1611.07004) with VQGAN's adaptive weight (arXiv:2012.09841)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.errors import UserError
from ldm.interfaces import Adversary, Discriminator, Factory, built
from ldm.nn.blocks import group_norm

NORMS = {
    "group": lambda channels: group_norm(channels, 1e-5),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "batch": nn.BatchNorm2d,
    "none": lambda channels: nn.Identity(),
}


class PatchDiscriminator(Discriminator):
    """pix2pix' 4x4 convolutions, `layers` of stride 2: each logit judges a patch, of 70 px for 3 layers.

    norm "batch" is as published, and needs trainer.sync_batchnorm on several devices.
    """

    def __init__(
        self, channels: int = 64, layers: int = 3, norm: Literal["group", "instance", "batch", "none"] = "group",
        image_channels: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        image_channels = image_channels or 3
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for (before, after), stride in zip(pairwise(widths), [2] * (layers - 1) + [1], strict=True):
            parts += [nn.Conv2d(before, after, 4, stride, 1, bias=norm in ("group", "none")), NORMS[norm](after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.image_channels, self.smallest = image_channels, 2**layers * 3  # px, below which no patch is left
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.image_channels:
            raise UserError(
                f"images of {x.shape[1]} channels, a discriminator for {self.image_channels}: leave its image_channels out, which follows"
            )
        if min(x.shape[2:]) < self.smallest:
            raise UserError(
                f"images of {x.shape[3]}x{x.shape[2]} px are too small for this discriminator: {self.smallest} px, or fewer layers"
            )
        return self.layers(x)


# what real and fake logits cost the discriminator, and fake ones the generator
LOSSES = {
    "hinge": (lambda real: F.relu(1 - real), lambda fake: F.relu(1 + fake), lambda fake: -fake),
    "vanilla": (lambda real: F.softplus(-real), F.softplus, lambda fake: -fake),  # VQGAN's
    "non-saturating": (lambda real: F.softplus(-real), F.softplus, lambda fake: F.softplus(-fake)),  # arXiv:1406.2661
}


class PatchGAN(Adversary):
    """A discriminator and how it is used; from optimizer step `start` on, before that it costs nothing.  For `alone` steps
    from there only the discriminator learns: one that knows nothing yet teaches the generator noise.

    weight counts relative to the reconstruction loss: adaptively, the generator's loss is scaled so that its gradient at the
    decoder's last layer is as long as the reconstruction loss' (at most max_scale times; 1 if not adaptive).
    gradient_penalty: gamma of R1, gamma / 2 * |grad D(real)|^2 (arXiv:1801.04406).
    """

    def __init__(
        self,
        discriminator: Factory[Discriminator] | Discriminator,
        loss: Literal["hinge", "vanilla", "non-saturating"] = "hinge",
        weight: float = 0.5,
        start: int = 0,
        alone: int = 0,
        adaptive: bool = True,
        max_scale: float = 1e4,
        gradient_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        self.discriminator = built(discriminator)
        self.real_loss, self.fake_loss, self.generator = LOSSES[loss]
        self.weight, self.start, self.alone, self.adaptive, self.max_scale = weight, start, alone, adaptive, max_scale
        self.gradient_penalty = gradient_penalty

    @torch.no_grad()
    def check(self, x: Tensor) -> None:
        training = self.training
        self.eval().discriminator(x)
        self.train(training)

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return self.generator(functional_call(self.discriminator, fixed, (reconstruction,))).mean()

    def scale(self, reconstruction: Tensor, pulls: Sequence[Tensor], last_layer: Tensor) -> Tensor:
        if not self.adaptive:
            return reconstruction.new_ones(())
        larger = [pull * reconstruction.numel() ** 0.5 for pull in pulls]  # half precision would lose the gradients of means
        found = [torch.autograd.grad(reconstruction, last_layer, pull, retain_graph=True)[0] for pull in larger]
        gradients = torch.stack([gradient.float() for gradient in found])
        if dist.is_initialized():  # of the mean over ranks, so that all have one weight, that of the whole batch
            dist.all_reduce(gradients)
        wanted, own = gradients.flatten(1).norm(dim=1)
        return torch.nan_to_num(wanted / own.clamp(min=1e-12), nan=0.0).clamp(max=self.max_scale)

    def discriminator_loss(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = x.detach().requires_grad_(self.gradient_penalty > 0)
        real, fake = self.discriminator(x), self.discriminator(reconstruction.detach())
        loss = 0.5 * (self.real_loss(real).mean() + self.fake_loss(fake).mean())
        right = (real > 0).float().mean() + (fake < 0).float().mean()
        logs = {"d_loss": loss.detach(), "logits_real": real.detach().mean(), "logits_fake": fake.detach().mean(), "d_accuracy": right / 2}
        if self.gradient_penalty:
            (gradient,) = torch.autograd.grad(real.mean((1, 2, 3)).sum(), x, create_graph=True)
            penalty = gradient.square().flatten(1).sum(1).mean()
            loss, logs["r1"] = loss + self.gradient_penalty / 2 * penalty, penalty.detach()
        return loss, logs
