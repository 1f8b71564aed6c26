"""What the training stages share."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ldm import model_folder
from ldm.devices import full
from ldm.draws import Draws
from ldm.errors import UserError
from ldm.interfaces import Autoencoder, Batch, Conditioner, Posterior, TrainingData
from ldm.latents.space import LatentSpace
from ldm.ranges import to_float
from ldm.stages.plain import PlainData, as_batch
from ldm.stages.resume import changes, follow_optimizer, require_same_model, require_same_start
from ldm.stages.vocabulary import by_name, follow, follow_moments, sentence, tables


class TrainingStage(L.LightningModule):
    """The plumbing of a stage: `model` is what is trained, averaged and stored; all that is random depends on `seed`."""

    model: Any  # an nn.Module and Buildable
    seed: int
    inherited: tuple[Sequence[str], dict[str, Tensor]] | None = None  # classes and their tables of what it starts from
    settings: Mapping[str, Any] = {}
    place = "model"  # the option that describes `model`
    made_from: Sequence[str] = ()  # paths of the models that it begins with or learns from: the first stage, init, a teacher
    _plain: tuple[PlainData] | None = None

    def __init__(self) -> None:
        super().__init__()
        self._drawn = dict[tuple[int, ...], deque[Draws]]()  # of the last batches, by the shape of their images
        self._thread: ThreadPoolExecutor | None = None

    @property
    def data(self) -> TrainingData:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TrainingData):
            return data
        if self._plain is None:  # a DataLoader was passed to the Trainer
            loop: Any = self.trainer.fit_loop if self.trainer.training or self.trainer.sanity_checking else self.trainer.validate_loop
            loop.setup_data()
            loader = self.trainer.train_dataloader or self.trainer.val_dataloaders
            if loader is None:
                raise UserError("training needs a data module of ldm.data (--data or -c data/...), or a DataLoader of images")
            self._plain = (PlainData(loader, self.num_classes),)
        return self._plain[0]

    @property
    def num_classes(self) -> int:
        """How many classes the model tells apart, for data that do not say."""
        return 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """A batch of ours, whatever the loader gives."""
        return as_batch(batch)

    def draws(self, batch: Batch, batch_idx: int) -> Draws:
        """What is random about each sample: of a training image of its place in the training, of a held-out one of its position."""
        if "draws" in batch:
            begun: Draws = batch["draws"]
            return begun
        if "place" in batch:
            return Draws(seeds_of(batch, self.seed), batch["place"])
        first = hash((self.current_epoch * self.training, self.global_rank, batch_idx)) % 2**40 << 20  # of a plain loader
        return Draws([(self.seed << 64) | (first + i) for i in range(len(batch["id"]))])

    def _begin_draws(self, batch: Batch) -> None:
        """Random numbers of the next batch, for a GPU: made in a thread while it works on this one.  They are as many, in the same order,
        as those of the last batch of such images that was used: not of this one, which has still to be."""
        shape = tuple(batch["moments" if "moments" in batch else "image"].shape[1:])
        drawn = self._drawn.setdefault(shape, deque(maxlen=2))
        draws = batch["draws"] = Draws(seeds_of(batch, self.seed), batch["place"])
        if (asked := next((before.asked for before in drawn if before.asked), None)) is not None:
            self._thread = self._thread or ThreadPoolExecutor(1)
            draws.begin(asked, self._thread)
        drawn.append(draws)

    def seed_step(self, batch_idx: int) -> None:
        """Dropout inside of networks depends on (seed, rank, epoch, batch) alone, so a resumed run repeats none and skips none."""
        torch.manual_seed(hash((self.seed, self.global_rank, self.current_epoch, batch_idx)) % 2**32)

    def with_draws(self, batch: Batch, batch_idx: int) -> Batch:
        """A batch with `draws`, and with what its conditioner prepares, where the loader has not done that."""
        draws = self.draws(batch, batch_idx)
        batch = {**batch, "draws": draws}
        conditioner = getattr(self.model, "conditioner", None)
        if conditioner is None or "place" in batch:
            return batch
        return {**batch, **move_data_to_device(conditioner.prepare(batch, draws.seeds), self.device)}

    @staticmethod
    def mean() -> MeanMetric:
        """Of (B,) values, over all held-out images of all ranks, however many each has (Lightning's own rounds the number per rank).

        nan_strategy "disable" keeps NaN visible, but ignores weights: give it a value per image.
        """
        return MeanMetric(nan_strategy="disable")

    def check(self, data: TrainingData) -> None:
        """A UserError where the data are none for this model; called before anything is encoded or trained."""
        if self.inherited is not None and self.num_classes:
            require_classes(data, "conditioner", self.num_classes)

    def cache_latents(self, latents: LatentSpace) -> None:
        """Where the data module has a cache: into it, under the run's precision."""
        precision = str(self.trainer.precision)

        def moments(x: Tensor) -> Tensor:
            with self.trainer.precision_plugin.forward_context():
                return latents.moments(x)

        made = model_folder.fingerprint(latents.autoencoder) + ("" if precision == "32-true" else f" {precision}")
        self.data.cache_latents(moments, made, self.device)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Each parameter group by itself: a large gradient of the discriminator must not shrink the generator's."""
        if not gradient_clip_val:
            return
        if (scaler := getattr(self.trainer.precision_plugin, "scaler", None)) is not None:
            scaler.unscale_(optimizer)  # Lightning leaves this to the fused optimizer, which is too late
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for group in optimizer.param_groups:
            clip(group["params"], gradient_clip_val)

    def pictures(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What to show after a validation: (N,3,H,W) in [-1,1] by name."""
        return {}

    def card(self) -> dict[str, Any]:
        """Facts that a model folder keeps beside the weights."""
        data = self.data
        facts: dict[str, Any] = {"classes": list(data.classes), "size": int(data.size), "window": data.window and list(data.window)}
        if data.buckets:
            facts["buckets"] = [list(size) for size in data.buckets]
        if (values := data.values.as_card()) is not None:
            facts["values"] = values
        return {"stage": type(self).__name__, **facts, "steps": int(self.trainer.global_step)}

    def setup(self, stage: str) -> None:
        """Rows of the model that training starts from belong to the classes of that name."""
        self.check(self.data)
        self.data.begin = self._begin_draws if self.trainer.strategy.root_device.type == "cuda" else None
        if (conditioner := getattr(self.model, "conditioner", None)) is not None:
            self.data.prepare = partial(prepared, conditioner, self.seed)
        if self.inherited is not None:
            old, found = self.inherited
            if list(old) != self.data.classes:
                state = self.model.state_dict()
                for name, has_null in tables(self.model).items():
                    state[name].copy_(by_name(found[name], old, self.data.classes, has_null).to(state[name]))
                self._say(sentence(old, self.data.classes, True))
            self.inherited = None

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text)

    def _follow_classes(self, checkpoint: dict[str, Any]) -> None:
        """Where the data have other classes than the checkpoint: its rows, averages and running means by name."""
        old, new = checkpoint.get(model_folder.CHECKPOINT_KEY, {}).get("card", {}).get("classes"), self.data.classes
        names = tables(self.model)
        if not names or old is None or len(old) == 0 or list(old) == new:
            return
        if self.num_classes:
            require_classes(self.data, "conditioner", self.num_classes)
        follow(checkpoint, names, old, new)
        configured: Any = self.configure_optimizers()
        places = [p for group in configured["optimizer"].param_groups for p in group["params"]]
        parameters = {id(p): name for name, p in self.model.named_parameters()}
        where = {i: names[name] for i, p in enumerate(places) if (name := parameters.get(id(p), "")) in names}
        for optimizer in checkpoint.get("optimizer_states", []):
            follow_moments(optimizer["state"], where, old, new)
        self._say(sentence(old, new, any(names.values())))

    def _follow_settings(self, checkpoint: dict[str, Any]) -> None:
        """Today's where they may differ from the checkpoint's, which is said; UserError where they may not."""
        entry = checkpoint[model_folder.CHECKPOINT_KEY]
        self._judge_first_stage_of(checkpoint)
        if entry.get("settings") and self.settings:
            require_same_start(entry["settings"], self.settings)
            if differing := changes(entry["settings"], self.settings):
                self._say(f"other than in the checkpoint, and used from here on: {', '.join(differing)}")

    def _judge_first_stage_of(self, checkpoint: dict[str, Any]) -> None:
        """A UserError where first_stage holds another autoencoder than the one that the checkpoint has learned with."""
        if (latents := getattr(self.model, "latents", None)) is None:
            return
        theirs, begin = checkpoint["state_dict"], "model.latents.autoencoder."
        for name, value in latents.autoencoder.state_dict().items():
            if (found := theirs.get(begin + name)) is not None and found.shape == value.shape and not torch.equal(found, value.to(found)):
                raise UserError(
                    f"the first stage ({', '.join(self.made_from[:1])}) is not the one whose latents the checkpoint was trained on: give "
                    "--model.first_stage CHECKPOINT, which holds that one, or begin anew with another --run"
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes classes by name and today's settings, goes on at the image at which it stopped, and refuses another model."""
        entry = checkpoint.get(model_folder.CHECKPOINT_KEY)
        if not isinstance(entry, dict) or missing_of(entry, "model", "card") or missing_of(checkpoint, "state_dict", "global_step"):
            raise UserError(
                "this is no checkpoint of `ldm fit`: leave --ckpt_path out to start anew, or start from a model with --model.init"
            )
        require_same_model(entry["model"], model_folder.describe(self.model), self.place)
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        size = entry["card"].get("size", self.data.size)
        if size != self.data.size and (fitting or hasattr(self.model, "latents")):  # an autoencoder is measured at any size
            raise UserError(f"data.size is {self.data.size}, in the checkpoint {size}: leave it, or start a new run with --model.init")
        if fitting:
            self._follow_settings(checkpoint)
        self._follow_classes(checkpoint)
        self._follow_batches(checkpoint)
        found, own = checkpoint["state_dict"], self.state_dict()
        hint = "give the configs and options that it was trained with, or start a new run from it with --model.init"
        if missing := [name for name in own if name not in found]:
            raise UserError(f"the checkpoint has no {missing[0]}, which this model has: {hint}")
        for name, value in found.items():
            if name not in own:
                raise UserError(f"the checkpoint has {name}, which this model does not have: {hint}")
            if value.shape != own[name].shape:
                raise UserError(f"{name} has shape {list(value.shape)} in the checkpoint, {list(own[name].shape)} in this model: {hint}")
        if fitting:
            configured: Any = self.configure_optimizers()
            follow_optimizer(checkpoint, configured)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The model's description goes into the checkpoint, so that it can be rebuilt from it alone."""
        entry = checkpoint.setdefault(model_folder.CHECKPOINT_KEY, {})
        entry |= {"model": model_folder.describe(self.model), "card": self.card(), "batch": self._images_at_once()}
        entry |= {"settings": self.settings} if self.settings else {}

    def _images_at_once(self) -> int:
        """Images that all ranks see between two counts of Lightning's batches; 0 of a plain loader."""
        return self.trainer.world_size * int(getattr(self.data, "batch_size", 0))

    def _follow_batches(self, checkpoint: dict[str, Any]) -> None:
        """Where a checkpoint was made with another batch or other ranks: count its batches in today's."""
        before, now = checkpoint.get(model_folder.CHECKPOINT_KEY, {}).get("batch", 0), self._images_at_once()
        if not before or not now or before == now or "loops" not in checkpoint:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        images = progress["ready"] * before
        progress |= {name: images // now for name in ("ready", "started", "processed", "completed")}
        self.data.resumed = images
        self._say(f"the batch was {before} images and is {now}: this goes on after image {images} of the epoch")


def logs_now(trainer: L.Trainer) -> bool:
    """Whether Lightning hands what is logged in this step to the loggers: after every log_every_n_steps steps."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def missing_of(found: Mapping[str, Any], *names: str) -> list[str]:
    """Those of the names that are not there."""
    return [name for name in names if name not in found]


def seeds_of(batch: Batch, seed: int) -> list[int]:
    """Of each sample of a batch of a data module."""
    return [(seed << 64) | (draw or place) for draw, place in zip(batch["draw"], batch["place"], strict=True)]


def prepared(conditioner: Conditioner, seed: int, batch: Batch) -> Batch:
    """What a conditioner prepares of a batch of a data module."""
    return conditioner.prepare(batch, seeds_of(batch, seed))


def require_classes(data: TrainingData, part: str, wanted: int) -> None:
    """part: the model's one that has so many classes."""
    if wanted != len(data.classes):
        raise UserError(
            f"the {part} has {wanted} classes, the data {len(data.classes)} ({', '.join(data.classes[:12])}): "
            f"leave model.{part}.num_classes out, which follows from the data"
        )


def require_channels(data: TrainingData, autoencoder: Autoencoder, hint: str) -> None:
    """hint: what to do where the images have other channels than the autoencoder takes."""
    if data.channels != autoencoder.image_channels:
        raise UserError(f"the images have {data.channels} channels, the autoencoder takes {autoencoder.image_channels}: {hint}")


def require_multiple(data: TrainingData, multiple: int, why: str) -> None:
    """why: who needs images whose sides are multiples of so many px."""
    if data.size % multiple and not data.buckets:
        below, above = data.size // multiple * multiple, -(-data.size // multiple) * multiple
        allowed = f"{below} or {above}" if below else str(above)
        raise UserError(f"data.size is {data.size}; {why} needs a multiple of {multiple}: {allowed}")


def posterior_of(latents: LatentSpace, batch: Batch) -> Posterior:
    """Of a batch of images, or of moments from a cache."""
    if "moments" in batch:
        return latents.autoencoder.posterior(batch["moments"])
    return latents.autoencoder.posterior(full(latents.moments(to_float(batch["image"]))))


def first_stage_of(path: str) -> Autoencoder:
    """The autoencoder of a model folder or checkpoint of stage 1, or of a stage 2 that holds one."""
    found = model_folder.load(path).model
    autoencoder = found if isinstance(found, Autoencoder) else found.latents.autoencoder
    assert isinstance(autoencoder, Autoencoder)
    return autoencoder


def parameters_of(module: nn.Module, beginnings: Sequence[str], option: str) -> list[nn.Parameter]:
    """Those whose names have one of these beginnings; option: what the user gave them as."""
    named, found = list(module.named_parameters()), list[nn.Parameter]()
    for beginning in beginnings:
        chosen = [parameter for name, parameter in named if name.startswith(beginning)]
        if not chosen:
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in named))
            raise UserError(f"{option} has {beginning!r}, with which no parameter's name begins; they begin with {parts}")
        found += chosen
    return found
