"""Stage 2: train the noise predictor in the frozen first stage's latents."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import model_folder, registry
from ldm.conditioning.values import condition_of
from ldm.devices import send
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.guidance import CFG
from ldm.diffusion.objective import Simple
from ldm.diffusion.samplers import DPMSolverPP2M
from ldm.diffusion.schedule import LDMSchedule, Spacing
from ldm.draws import Draws
from ldm.errors import UserError
from ldm.frames import side_by_side
from ldm.interfaces import (
    Autoencoder,
    Batch,
    Cond,
    Condition,
    Conditioner,
    Denoise,
    Factory,
    Guidance,
    Network,
    NoiseSchedule,
    Objective,
    Sampler,
    TrainingData,
    built,
)
from ldm.latents.model import LatentDiffusion, LatentModel, load_companion
from ldm.ranges import to_float
from ldm.sampling.pipeline import CHUNK_SIZE, generate
from ldm.sampling.request import InputImage, SampleRequest, SamplingConfig, SeedNoise
from ldm.stages.derive import COND_DROP_PROB, parts_of_stage_2, unused
from ldm.stages.health import LossByLevel
from ldm.stages.inherit import start_from
from ldm.stages.optim import AdamW, Part, configure
from ldm.stages.training import TrainingStage, first_stage_of, logs_now, posterior_of, require_channels, require_classes, require_multiple

TRAJECTORY = 8  # pictures of how one came about
JUDGED, POOR = 16, 20.0  # images, and PSNR in dB below which a first stage is not fit for use


class DiffusionStage(TrainingStage):
    """Minimises the objective; a share `cond_drop_prob` of the samples loses its condition (arXiv:2207.12598).

    first_stage: model folder or checkpoint of stage 1, or of a stage 2 that holds one, or an autoencoder that has nothing to learn
    (Pixels); None: that of `init`.  conditioner: None: what the data have, see stages.derive.  schedule, objective, sampler, guidance:
    None: LDMSchedule, Simple, DPMSolverPP2M, CFG.  sampler, guidance, sampling_steps, spacing: of the validation pictures, and of the
    model's pictures unless asked otherwise.  cond_drop_prob: None: 0.1 where there is a condition.
    init: model folder or checkpoint of a stage 2 to start from; input channels that it does not have begin as zeros, a UNet of clips as
    one of images does.  data: what numbers that nobody gave are derived from.
    """

    def __init__(
        self,
        first_stage: str | Factory[Autoencoder] | Autoencoder | None,
        network: Factory[Network] | Network,
        conditioner: Factory[Conditioner] | Conditioner | None = None,
        schedule: NoiseSchedule | None = None,
        objective: Objective | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        prediction: Prediction = "eps",
        sampling_steps: int | list[float] = 25,
        spacing: Spacing = "trailing",
        cond_drop_prob: float | None = None,
        init: str | None = None,
        optimizer: AdamW = AdamW(),  # noqa: B008  frozen
        seed: int = 0,
        data: TrainingData | None = None,
    ) -> None:
        super().__init__()
        if (first_stage := first_stage or init) is None:
            raise UserError("first_stage is missing: give a model folder of stage 1, or init")
        image_channels = None if data is None else data.channels // data.frames
        models = [init, None if objective is None else objective.teacher]
        if isinstance(first_stage, str):  # the name of a part, or the path of a model
            part = registry.parts(Autoencoder, ("autoencoder",)).get(first_stage)  # type: ignore[type-abstract]
            models.insert(0, first_stage if part is None else None)
            first_stage = part or first_stage_of(first_stage)
        self.made_from = list(dict.fromkeys(model for model in models if model is not None))
        autoencoder = built(first_stage, image_channels=image_channels)
        parts = parts_of_stage_2(autoencoder, network, conditioner, data)
        self.model = LatentDiffusion(*parts, schedule or LDMSchedule(), prediction)
        if init is not None:
            self.inherited = start_from(self.model, init)
        self.cond_drop_prob = COND_DROP_PROB * bool(self.model.conditioner.inputs) if cond_drop_prob is None else cond_drop_prob
        if not 0 <= self.cond_drop_prob <= 1:
            raise UserError(f"cond_drop_prob is {self.cond_drop_prob}; allowed is 0 to 1")
        self.objective, self.optimizer, self.seed = objective or Simple(), optimizer, seed
        chosen = sampler or DPMSolverPP2M(), guidance or CFG()
        self.sampling, self.held_out_loss = SamplingConfig(*chosen, sampling_steps, spacing), self.mean()
        self.by_level, self.captions = LossByLevel(), dict[str, list[str]]()  # of the pictures that were shown last, by name
        self._teacher_model: tuple[LatentModel, SamplingConfig] | None = None  # a tuple hides it from state_dict

    @property
    def num_classes(self) -> int:
        return self.model.conditioner.num_classes

    def check(self, data: TrainingData) -> None:
        super().check(data)
        conditioner, network, autoencoder = self.model.conditioner, self.model.denoiser.network, self.model.latents.autoencoder
        clips = f"this network makes clips of {network.frames} frames: use -c data/clips.yaml with --data.frames {network.frames}"
        require_channels(data, autoencoder, clips if network.frames > 1 else "train a first stage on such images")
        data.use_buckets(autoencoder.factor * network.multiple)
        both = f"the first stage, whose factor is {autoencoder.factor}, with this network"
        require_multiple(data, autoencoder.factor * network.multiple, both)
        if conditioner.num_classes:
            require_classes(data, "conditioner", conditioner.num_classes)
        if conditioner.takes_text and not data.has_texts:
            raise UserError(
                "the conditioner Text needs a text for each image, the data has none: add metadata.jsonl with file_name and text"
            )
        if missing := set(conditioner.numbers) - set(data.ranges):
            raise UserError(
                f"the conditioner Numbers takes {', '.join(sorted(missing))}, which no image has; "
                f"the data's metadata have {', '.join(data.ranges) or 'no numeric attributes'}"
            )
        self.model.denoiser.schedule.steps(self.sampling.steps, self.sampling.spacing)  # those of the validation's pictures
        for path in filter(None, (self.objective.teacher, self.sampling.guidance.companion)):
            model_folder.find(path)

    @torch.no_grad()
    def _judge_first_stage(self) -> None:
        """Say how well the first stage reconstructs some of these images: no sample of stage 2 is sharper."""
        latents = self.model.latents
        if not self.trainer.is_global_zero or latents.autoencoder.pixels:
            return
        x = to_float(self.data.some(JUDGED)["image"][:JUDGED].to(self.device))
        error = (latents.autoencoder.decode(latents.autoencoder.encode(x).mode()).clamp(-1, 1) - x).square().flatten(1).mean(1)
        psnr = float((10 * torch.log10(4 / error.clamp(min=1e-10))).mean())
        print(f"the first stage reconstructs {len(x)} of the training images with {psnr:.1f} dB PSNR")
        if psnr < POOR:
            warnings.warn(
                f"{psnr:.1f} dB is poor, and no picture will be better than that: train the first stage on these images, or for longer "
                "(-c autoencoder/...)", stacklevel=2,
            )  # fmt: skip

    def on_fit_start(self) -> None:
        """Cache the latents, if the data module has a cache; measure them, unless a checkpoint brought the statistics."""
        latents = self.model.latents
        if rest := unused(self.data, self.model.conditioner):
            self._say(f"not used as a condition: {rest}")
        self._judge_first_stage()
        if self.data.cache is not None:
            self.model.conditioner.cache_in(self.data.cache)
            self.model.conditioner.remember(self.data.texts[self.global_rank :: self.trainer.world_size])
        self.data.with_images = self.model.conditioner.image is not None
        self.cache_latents(latents)
        if not latents.measured:
            self._measure()
        self._load_companions()

    def on_validation_start(self) -> None:
        self._load_companions()

    on_test_start = on_validation_start

    def _load_companions(self) -> None:
        """Once: the second models of the pictures' guidance, and of the objective, which may learn from a teacher with a guidance."""
        latents, path = self.model.latents, self.objective.teacher
        if not latents.measured:  # a sanity check before training
            return
        if self.sampling.companion is None:
            self.sampling = self.sampling.resolved(latents)
        if path is not None and self._teacher_model is None:
            teacher, own = load_companion(path, latents), SamplingConfig.of(model_folder.load(path).card)
            guided = SamplingConfig(guidance=self.objective.guidance or own.guidance).resolved(latents)
            self._teacher_model = (teacher, guided)

    @torch.no_grad()
    def _measure(self) -> None:
        """Mean and standard deviation per channel of latents sampled once for every training image, over all ranks."""
        latents, total, sizes = self.model.latents, 0, dict[tuple[int, int], None]()
        sums = torch.zeros(3, latents.autoencoder.channels, dtype=torch.float64, device=self.device)
        generator = torch.Generator().manual_seed(self.seed + self.global_rank)
        for batch in self.data.rank_batches():
            with self.trainer.precision_plugin.forward_context():
                posterior = posterior_of(latents, self._to_device(batch))
            mode = posterior.mode()
            z = posterior.sample(torch.randn(mode.shape, generator=generator).to(mode)).double()
            sums += torch.stack([z.sum((0, 2, 3)), z.square().sum((0, 2, 3)), torch.full_like(sums[0], z[:, 0].numel())])
            total, sizes[z.shape[2], z.shape[3]] = total + len(z), None
        first, second, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        images = self.trainer.strategy.reduce(torch.tensor(total, device=self.device), reduce_op="sum")
        mean = first / count
        side = self.data.size // latents.autoencoder.factor
        size = next(iter(sizes)) if len(sizes) == 1 else (side, side)  # of several sizes, the one that they are about as large as
        latents.measure(mean.float(), (second / count - mean**2).sqrt().float(), int(images), size)

    def _to_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _loss(self, batch: Batch, drop: float) -> tuple[Tensor, Tensor]:
        """(B,) with fresh posterior samples, noise, steps and dropped conditions; the steps as shares of the schedule, (B,)."""
        model = self.model
        posterior = posterior_of(model.latents, batch)
        draws: Draws = batch["draws"]
        z0 = model.latents.to_latents(posterior, draws.normal(posterior.mode()))
        noise, t = self.objective.draw(z0, model.denoiser.schedule, draws)
        cond: Cond = model.conditioner.encode(batch, model.latents.to_latents)
        if drop:
            keep = send(draws.uniform() >= drop, z0.device)
            cond = cond.where(keep, model.conditioner.null(batch))
        loss = self.objective.loss(model.denoiser, z0, noise, t, cond, self._teacher(batch))
        return loss, t / len(model.denoiser.schedule.sigmas)

    @torch.no_grad()
    def _teacher(self, batch: Batch) -> Denoise | None:
        if self._teacher_model is None:
            return None
        teacher, config = self._teacher_model
        assert isinstance(teacher, LatentDiffusion)
        return teacher.guided(batch, config.guidance, config.companion)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seed_step(batch_idx)
        losses, share = self._loss(self.with_draws(batch, batch_idx), self.cond_drop_prob)
        self.log("train/loss", loss := losses.mean(), prog_bar=True, batch_size=len(batch["id"]))
        self.by_level.update(share, losses.detach())
        if logs_now(self.trainer):
            self.log_dict({f"train/{name}": value for name, value in self.by_level.compute().items()}, batch_size=1)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The objective on held-out images, always with the same noise and steps."""
        if not batch["id"]:
            return
        self.held_out_loss(self._loss(self.with_draws(batch, batch_idx), 0.0)[0])
        self.log("val/loss", self.held_out_loss, prog_bar=True, on_epoch=True, batch_size=len(batch["id"]))

    test_step = validation_step

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Sixteen samples (N,3,H,W) in [-1,1], or fewer clips with their frames side by side: of held-out texts or numbers, of classes
        spread evenly, or of no condition; and how the first came about.  Of a model that works on images, eight held-out images: what it
        was shown, what it made of that, what they are."""
        conditioner, classes = self.model.conditioner, self.data.classes
        frames = self.model.denoiser.network.frames
        if conditioner.image is not None:
            return {"samples": side_by_side(torch.cat(self.restored(batch, 8)), frames)} if self.trainer.is_global_zero else {}
        # the first rank's, as the held-out images of the others are other ones, or none
        conditions = self.trainer.strategy.broadcast(self._conditions(batch) if self.trainer.is_global_zero else [])
        count, chunk_size = max(2, 16 // frames), max(1, CHUNK_SIZE // frames)
        requests = [SampleRequest(i, SeedNoise(0, i), conditions[i * len(conditions) // count]) for i in range(count)]
        self.captions["samples"] = [f"seed {request.noise.index}{_named(request.condition)}" for request in requests]  # type: ignore[arg-type, union-attr]
        denoised = list[Tensor]()
        share = -(-count // self.trainer.world_size)  # that this rank makes
        mine = (requests[self.global_rank * share :] + requests[-1:] * share)[:share]
        chosen = (self.sampling, classes, chunk_size)
        pictures = generate(self.model, mine, *chosen, on_denoised=lambda z0: denoised.append(z0[:1]))
        if self.trainer.world_size > 1:
            pictures = torch.as_tensor(self.all_gather(pictures)).flatten(0, 1)[:count]
        first = denoised[: len(denoised) // -(-share // chunk_size)]  # of the first chunk
        shown = torch.cat([first[i * (len(first) - 1) // (TRAJECTORY - 1)] for i in range(TRAJECTORY)])
        steps = self.model.latents.to_images(shown).clamp(-1, 1)
        return {"samples": side_by_side(pictures, frames), "trajectory": side_by_side(steps, frames)}

    def _conditions(self, batch: Batch) -> list[Condition]:
        """Every class, or what the held-out images of a batch show."""
        conditioner, classes, count = self.model.conditioner, self.data.classes, len(batch["id"])
        if set(conditioner.inputs) == {"class"}:
            return [{"class": name} for name in classes]
        labels = [classes[i] if i >= 0 else None for i in batch["label"].tolist()] if "label" in batch else [None] * count
        numbers = batch.get("numbers", [{}] * count)
        return [condition_of(conditioner, *known) for known in zip(labels, batch["text"], numbers, strict=True)]

    def restored(self, batch: Batch, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a model that works on images: what it is shown of the first `count`, what it makes of that, what they are, (count,3,H,W)."""
        left = self.with_draws(batch, 0)["conditioning_image"]
        masks = [None] * len(left.x) if left.mask is None else [mask.cpu() for mask in left.mask]
        images = [InputImage(x.cpu(), mask) for x, mask in zip(left.x[:count], masks, strict=False)]
        requests = [SampleRequest(i, SeedNoise(0, i), image=image) for i, image in enumerate(images)]
        pictures = generate(self.model, requests, self.sampling, self.data.classes)
        hidden = left.x if left.mask is None else left.x * (1 - left.mask)
        wanted = to_float(batch["image"][:count])
        return F.interpolate(hidden[:count], size=wanted.shape[2:]), pictures, wanted

    def card(self) -> dict[str, Any]:
        """How the validation pictures were sampled is how `ldm sample` samples unless told otherwise."""
        return {**super().card(), "sampling": self.sampling.described(), "cond_drop_prob": self.cond_drop_prob}

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return configure([Part(trainable, self.optimizer)], self.trainer.max_steps)


def _named(condition: Condition) -> str:
    """A condition for a caption."""
    return "".join(f", {name} {value}" for name, value in condition.items() if value is not None)
