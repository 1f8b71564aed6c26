"""Whole models as one module: what is trained in latents, a model folder stores and `predict` loads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import model_folder
from ldm.devices import each, factor
from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.errors import UserError
from ldm.interfaces import Autoencoder, Batch, Buildable, Classifier, Conditioner, Denoise, Guidance, Network, NoiseSchedule, Predict
from ldm.latents.space import LatentSpace


class LatentDiffusion(Buildable, nn.Module):
    """Frozen autoencoder + noise predictor in its latents + what conditions it."""

    def __init__(
        self, autoencoder: Autoencoder, network: Network, conditioner: Conditioner, schedule: NoiseSchedule, prediction: Prediction = "eps"
    ) -> None:
        super().__init__()
        if network.in_channels != autoencoder.channels:
            raise UserError(
                f"the network takes {network.in_channels} latent channels, the first stage makes {autoencoder.channels}: "
                f"leave the network's in_channels out, or train a first stage for it"
            )
        for size in ("vector_dim", "token_dim", "concat_channels"):
            takes, makes = getattr(network, size), getattr(conditioner, size)
            if takes != makes:
                what = {"vector_dim": "vectors of {} values", "token_dim": "tokens of {} values"}.get(size, "images of {} channels")
                wanted = makes // network.frames if size == "concat_channels" else makes
                raise UserError(
                    f"the network takes condition {what.format(takes)}, the conditioner makes {makes}: "
                    f"leave the network's {size} out, which follows ({wanted})"
                )
        self.latents = LatentSpace(autoencoder)
        self.denoiser = Denoiser(network, schedule, prediction)
        self.conditioner = conditioner

    def parts_to_compile(self) -> list[nn.Module]:
        """What is trained."""
        return [self.denoiser.network]

    def conditional(self, batch: Batch) -> Denoise:
        """D without guidance, for the batch's condition."""
        cond = self.conditioner.encode(batch, self.latents.to_latents)
        return lambda x, sigma: self.denoiser.predict(x, sigma, cond)

    def as_companion(self, batch: Batch) -> Denoise:
        """D as the second model of a guidance (autoguidance)."""
        return self.conditional(batch)

    def guided(
        self, batch: Batch, guidance: Guidance, companion: "LatentModel | None" = None, negative: Batch | None = None,
        predict: Predict | None = None, told: bool = True,
    ) -> Denoise:  # fmt: skip
        """D for the batch's condition, as `guidance` has it.

        companion: the model that the guidance names; negative: conditions to lead away from instead of none; predict: something in the
        denoiser's place; told: whether the batch has a condition, without which there is nothing to guide to.
        """
        cond = self.conditioner.encode(batch, self.latents.to_latents)
        if negative is not None:
            null = self.conditioner.encode(negative, self.latents.to_latents)
        else:
            null = self.conditioner.null(batch) if told else cond
        second = None if companion is None else companion.as_companion(batch)
        return guidance.guide(predict or self.denoiser.predict, cond, null, second)


class NoisyClassifier(Buildable, nn.Module):
    """Tells the class of noisy latents, for classifier guidance (section 4, arXiv:2105.05233)."""

    def __init__(self, autoencoder: Autoencoder, network: Classifier, schedule: NoiseSchedule) -> None:
        super().__init__()
        if network.in_channels != autoencoder.channels:
            raise UserError(
                f"the network takes {network.in_channels} latent channels, the latents have {autoencoder.channels}: "
                f"leave the network's in_channels out, which follows ({autoencoder.channels})"
            )
        self.latents, self.network, self.schedule = LatentSpace(autoencoder), network, schedule

    def parts_to_compile(self) -> list[nn.Module]:
        """What is trained."""
        return [self.network]

    def logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(B, num_classes) of x (B,C,h,w) = z0 + sigma (() or (B,)) * noise."""
        scale = factor(self.schedule.scale(sigma.double()), x)
        return self.network(x * scale, each(self.schedule.t(sigma), x)).float()

    def as_companion(self, batch: Batch) -> Denoise:
        """The gradient of log p(label | x) as the second model of a guidance; 0 for images without a label."""
        label, known = batch["label"], (batch["label"] >= 0) & (batch["label"] < self.network.num_classes)

        def gradient(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                log_p = -F.cross_entropy(self.logits(x, sigma), label.where(known, 0), reduction="none")
                return torch.autograd.grad((log_p * known).sum(), x)[0]

        return gradient


LatentModel = LatentDiffusion | NoisyClassifier


def load_companion(path: str, latents: LatentSpace) -> LatentModel:
    """Another model, which must work in the same latents: frozen, on their device."""
    model = model_folder.load(path).model
    mine, theirs = latents.state_dict(), model.latents.state_dict() if isinstance(model, LatentModel) else {}
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[name].cpu(), theirs[name]) for name in mine if name != "count")
    if not same:
        raise UserError(f"the model {path!r} does not work in the same latents: train both on one first stage and the same data")
    companion: LatentModel = model.to(latents.shift.device).requires_grad_(False).eval()
    return companion
