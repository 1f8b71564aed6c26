"""Images as conditions: what training images suffer, what the network is told of them, and the models trained so."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import normal, randomise, stage2
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm import model_folder
from ldm.cli import main
from ldm.conditioning.composite import CompositeConditioner
from ldm.conditioning.image import Concat, ImageEmbedding
from ldm.conditioning.label import ClassLabel, Unconditional
from ldm.conditioning.numbers import Numbers
from ldm.conditioning.values import batch_of, checked, condition_of, label_of
from ldm.data.batches import Keyed
from ldm.data.corruptions import BSR, Blur, Fixed, GaussianNoise, Holes, Jpeg, OneOf, Posterised, gaussian_kernel
from ldm.data.images import SourceImages
from ldm.data.modes import as_tensor
from ldm.data.transforms import as_image
from ldm.degradations import Downscale, Grayscale
from ldm.draws import Draws
from ldm.interfaces import ClassInput, Cond, Conditioner, ConditioningImage, Corruption, ImageInput, NumberInput, TextInput
from ldm.latents.model import LatentDiffusion
from ldm.metrics.features import Features
from ldm.nn.attention import timestep_embedding
from ldm.nn.dit import DiT
from ldm.nn.unet import UNet
from ldm.ranges import to_float, to_uint8
from ldm.sampling.settings import settings_in
from ldm.stages.inherit import start_from

CONFIGS = Path(__file__).parent.parent / "configs"
CPU = torch.device("cpu")
KEEPING = [GaussianNoise(), Jpeg(), Blur(), Blur(anisotropic=True), Posterised(), OneOf([Jpeg(), Blur()]), Fixed(Grayscale()), Holes()]
ALL: list[Corruption] = [*KEEPING, Fixed(Downscale()), Fixed(Downscale(2)), BSR()]


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    """(count,3,size,size) smooth, with values of 8 bits."""
    return to_float(to_uint8(F.interpolate(normal(count, 3, 5, 5), size=(size, size), mode="bicubic").clamp(-1, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# What is done to images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", ALL, ids=lambda c: f"{type(c).__name__}{c.downscale}")
def test_what_is_left_of_an_image(corruption: Corruption) -> None:
    x = images()
    torch.manual_seed(3)
    seen = corruption.degrade(x)
    assert seen.x.shape == (4, 3, 32 // corruption.downscale, 32 // corruption.downscale)
    torch.testing.assert_close(seen.x, to_float(to_uint8(seen.x)), rtol=0, atol=1e-6)  # what fits into a file of 8 bits
    assert (seen.mask is not None) == corruption.takes_mask
    torch.manual_seed(3)
    again = corruption.degrade(x)
    assert torch.equal(seen.x, again.x)
    if seen.mask is not None and again.mask is not None:
        assert torch.equal(seen.mask, again.mask)
        assert torch.equal(seen.x, x), "masks hide, they change nothing"
        assert set(seen.mask.unique().tolist()) <= {0.0, 1.0}


def test_noise_has_its_level_and_bounds_are_checked() -> None:
    x = torch.zeros(6, 3, 64, 64)
    torch.manual_seed(0)
    levels = (GaussianNoise((0.01, 0.1)).degrade(x).x / 2).std((1, 2, 3))
    assert (levels > 0.0095).all()
    assert (levels < 0.105).all()
    assert levels.std() > 0.005, "each image has its own"
    assert abs(float((GaussianNoise((0.1, 0.1)).degrade(x).x / 2).std()) - 0.1) < 0.002
    with pytest.raises(ValueError, match="smaller number first"):
        GaussianNoise((0.3, 0.1)).degrade(x)


@given(along=st.floats(0.8, 3.0), across=st.floats(0.8, 3.0), angle=st.floats(0, 3.1))
@settings(max_examples=25, deadline=None)
def test_a_blur_kernel_has_the_covariance_of_its_gaussian(along: float, across: float, angle: float) -> None:
    kernel = gaussian_kernel(*(torch.tensor([value], dtype=torch.float64) for value in (along, across, angle)), 18)[0]
    line = torch.arange(-18.0, 19.0, dtype=torch.float64)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-9)
    xx, yy = (kernel * line[None] ** 2).sum(), (kernel * line[:, None] ** 2).sum()
    xy = (kernel * line[None] * line[:, None]).sum()
    cos, sin = np.cos(angle), np.sin(angle)
    assert float(xx) == pytest.approx((along * cos) ** 2 + (across * sin) ** 2, abs=1e-3)
    assert float(yy) == pytest.approx((along * sin) ** 2 + (across * cos) ** 2, abs=1e-3)
    assert float(xy) == pytest.approx((along**2 - across**2) * cos * sin, abs=1e-3)


def test_corruptions_against_pillow_and_by_hand(tmp_path: Path) -> None:
    x = images()
    soft = 0.7 * x  # Pillow clips between rows and columns
    for image, small in zip(to_uint8(soft), to_uint8(Fixed(Downscale(4)).degrade(soft).x), strict=True):
        wanted = as_tensor(as_image(image).resize((8, 8), Image.Resampling.BICUBIC)).int()
        assert (wanted - small.int()).abs().max() <= 1
    luma = as_tensor(as_image(to_uint8(x)[0]).convert("L")).int()
    assert (to_uint8(Fixed(Grayscale()).degrade(x).x)[0].int() - luma).abs().max() <= 1
    as_image(to_uint8(x)[0]).save(tmp_path / "x.jpg", quality=20)
    with Image.open(tmp_path / "x.jpg") as saved:
        difference = as_tensor(saved).float() - to_uint8(Jpeg((20, 20)).degrade(x).x)[0].float()
    assert difference.abs().mean() < 1.5, "the same quality as Pillow's"
    flat = torch.full((2, 3, 16, 16), 0.5)
    torch.testing.assert_close(Blur().degrade(flat).x, to_float(to_uint8(flat)))
    assert len(Posterised(4, 3).degrade(x).x.unique()) <= 3
    torch.manual_seed(0)
    grey, either = Fixed(Grayscale()).degrade(images(32)).x, OneOf([Fixed(Grayscale()), Blur((2.0, 2.0))]).degrade(images(32)).x
    changed = (either - grey).abs().amax((1, 2, 3)) > 0
    assert 0 < int(changed.sum()) < 32, "each image has its own"


def test_holes_have_the_share_that_was_asked_for() -> None:
    torch.manual_seed(0)
    holes = Holes((0.2, 0.5))
    for make in (holes._box, holes._side):
        shares = torch.tensor([float(make(40, 40).mean()) for _ in range(60)])
        assert shares.min() > 0.17
        assert shares.max() < 0.53
        assert shares.std() > 0.05
    strokes = torch.stack([holes._strokes(40, 40) for _ in range(60)])
    assert (strokes.mean((1, 2)) > 0).all()
    assert 0.05 < strokes.mean() < 0.6
    assert {mask.shape for mask in (holes._side(24, 40) for _ in range(20))} == {(24, 40)}


def halve(x: torch.Tensor) -> torch.Tensor:
    """Stands for an encoder: 4 latents of 2x2 px."""
    return F.avg_pool2d(x[:, [0, 1, 2, 0]], 2)


def test_what_is_hidden_has_no_influence_and_the_mask_is_told() -> None:
    conditioner, x, mask = Concat(Holes()), images(2), torch.zeros(2, 1, 32, 32)
    mask[:, :, :9, :] = 1
    other = torch.where(mask > 0, -x, x)
    one, two = (conditioner.encode({"conditioning_image": ConditioningImage(shown, mask)}, halve) for shown in (x, other))
    assert one.concat is not None
    assert two.concat is not None
    assert one.concat.shape == (2, 5, 16, 16)
    assert torch.equal(one.concat, two.concat)
    assert one.concat[0, 4, :, 0].tolist() == [1.0] * 5 + [0.0] * 11  # a latent that has lost a pixel is made anew
    assert torch.equal(one.concat[:, :4, 5:], halve(x)[:, :, 5:])
    null = conditioner.null({"conditioning_image": ConditioningImage(x, mask)})
    assert null.concat is not None
    assert null.concat[:, :, 0, 0].tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0]] * 2


def test_a_condition_of_one_value_everywhere_joins_any_other() -> None:
    full, flat = Cond(concat=normal(2, 5, 4, 4)), Cond(concat=normal(2, 5, 1, 1, seed=1))
    wide = Cond(concat=flat.concat.expand(2, 5, 4, 4))  # type: ignore[union-attr]
    keep = torch.tensor([True, False])
    for a, b in ((full.where(keep, flat), full.where(keep, wide)), (full.stack(flat), full.stack(wide))):
        assert torch.equal(a.concat, b.concat)  # type: ignore[arg-type]
    for network in (UNet(4, 32, (1, 2), 1, (1,), concat_channels=5), DiT(4, 32, 1, 2, concat_channels=5)):
        x, t = normal(2, 4, 4, 4), torch.tensor([1.0, 2.0])
        assert torch.equal(randomise(network)(x, t, flat), network(x, t, wide))


def test_a_smaller_image_is_enlarged_and_noise_is_added_in_training_alone() -> None:
    conditioner, x = Concat(Fixed(Downscale(4)), noise=0.3), images(3)
    batch = {"image": to_uint8(x)}
    conditioner.eval()
    one, two = (conditioner.encode(batch, halve) for _ in range(2))
    assert torch.equal(one.concat, two.concat)  # type: ignore[arg-type]
    wanted = F.interpolate(Fixed(Downscale(4)).degrade(x).x, scale_factor=4, mode="bicubic").clamp(-1, 1)
    torch.testing.assert_close(one.concat, halve(wanted))
    assert one.vector.shape == (3, conditioner.vector_dim)  # type: ignore[union-attr]
    assert torch.equal(one.vector, conditioner.null(batch).vector)  # type: ignore[arg-type]
    conditioner.train()
    noisy = conditioner.encode({**batch, "draws": Draws(range(3))}, halve)
    assert ((noisy.concat - one.concat).std((1, 2, 3)) < 0.35).all()  # type: ignore[operator]
    assert not torch.equal(noisy.vector, one.vector)  # type: ignore[arg-type]
    assert Concat(Fixed(Downscale(4))).encode(batch, halve).vector is None


class Mean(Features):
    name, resize = "mean", 8

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Classes, texts, numbers: as a user gives them, and as a batch
# ---------------------------------------------------------------------------------------------------------------------


NAMES = ["animal/cat", "animal/dog", "food/hot dog", "Face/Smiling", "symbol/cat"]


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        ("animal/cat", 0), ("ANIMAL/CAT", 0), ("symbol/cat", 4), ("dog", 1), ("Dog", 1), ("hot dog", 2), ("smiling", 3),
        ("smil", 3), ("hot", 2), ("food", 2), (0, 0), (4, 4), ("3", 3),
    ],
)  # fmt: skip
def test_a_class_by_name_number_or_part(asked: str | int, label: int) -> None:
    inputs = ClassLabel(5, 2).inputs
    assert label_of(asked, NAMES, 5) == label
    assert checked(inputs, {"class": asked}, NAMES) == {"class": NAMES[label]}, "settings have whole names"
    assert batch_of(inputs, [{"class": asked}, {}], NAMES, CPU)["label"].tolist() == [label, -1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("cat", "class 'cat' is ambiguous; allowed: animal/cat, symbol/cat"),
        ("animal", "class 'animal' is ambiguous; allowed: animal/cat, animal/dog"),
        ("horse", "class 'horse' is unknown; allowed: cat, dog, hot dog, Smiling"),
        ("5", "class '5' is unknown; allowed: cat, dog, hot dog, Smiling"),
        (5, "class 5 is unknown; allowed: cat, dog, hot dog, Smiling"),
        (-1, "class -1 is unknown; allowed: cat, dog, hot dog, Smiling"),
    ],
)
def test_a_class_that_is_ambiguous_or_unknown(asked: str | int, message: str) -> None:
    with pytest.raises(ValueError, match=r"^class ") as error:
        label_of(asked, NAMES, 5)
    assert str(error.value) == message


def test_names_that_are_numbers_and_no_names_at_all() -> None:
    names = ["10", "2", "30"]
    assert [label_of(asked, names, 3) for asked in ("2", 2, "10", "30", "0", 1)] == [1, 1, 0, 2, 0, 1]
    assert label_of(2, [], 3) == 2
    assert checked(ClassLabel(3, 2).inputs, {"class": 2}, []) == {"class": "2"}
    with pytest.raises(ValueError, match=r"^class 'cat' is unknown; allowed: 0 to 2$"):
        label_of("cat", [], 3)
    with pytest.raises(ValueError, match="num_classes is 0"):
        ClassLabel(0)


def test_a_class_with_a_slip_is_answered_with_the_nearest_names_first() -> None:
    with pytest.raises(ValueError, match=r"^class 'hotdog' is unknown; allowed: hot dog, dog, cat, Smiling$"):
        label_of("hotdog", NAMES, 5)


@pytest.mark.parametrize("names", [["A", "B", "a", "b"], ["animal/cat", "cat"]])
def test_every_class_can_be_asked_for_by_its_whole_name(names: list[str]) -> None:
    """DiffusionStage.pictures and `ldm sample` without --class ask for all names."""
    assert [label_of(name, names, len(names)) for name in names] == list(range(len(names)))


def test_class_label_vectors() -> None:
    conditioner = ClassLabel(3, 4)
    batch = {"label": torch.tensor([2, 0, 3, -1])}
    table = conditioner.embedding.weight
    assert table.shape == (4, 4)
    cond, null = conditioner.encode(batch, lambda x: x), conditioner.null(batch)
    assert cond.vector is not None
    assert null.vector is not None
    assert torch.equal(cond.vector, table[[2, 0, 3, 3]]), "-1 is an image without a class"
    assert torch.equal(null.vector, table[[3, 3, 3, 3]])


def test_several_conditions_at_once() -> None:
    parts = [ClassLabel(3, 6), Concat(Holes()), ImageEmbedding(Mean(), 3)]
    with pytest.raises(ValueError, match="CompositeConditioner has 2 parts for images; allowed is one"):
        CompositeConditioner(parts)
    together = CompositeConditioner(parts[:2])
    assert (together.num_classes, together.vector_dim, together.concat_channels) == (3, 6, 5)
    assert dict(together.inputs) == {"class": ClassInput(3), "image": ImageInput(1, takes_mask=True)}
    assert together.image == ImageInput(1, takes_mask=True)
    batch = {"label": torch.tensor([0, 2]), "image": to_uint8(images(2))}
    cond, null = together.encode(batch, halve), together.null(batch)
    assert cond.vector.shape == (2, 6)  # type: ignore[union-attr]
    assert cond.concat.shape == (2, 5, 16, 16)  # type: ignore[union-attr]
    dropped = cond.where(torch.tensor([True, False]), null)
    for part, whole, none in ((dropped.vector, cond.vector, null.vector), (dropped.concat, cond.concat, null.concat)):
        assert torch.equal(part[0], whole[0])  # type: ignore[index]
        assert torch.equal(part[1], none[1].expand_as(part[1]))  # type: ignore[index]
    assert batch_of(together.inputs, [{"class": "b"}], ["a", "b", "c"], CPU)["label"].tolist() == [1]
    images_alone = CompositeConditioner([Concat(Holes())])
    assert batch_of(images_alone.inputs, [{}, {}], [], CPU) == {"id": ["", ""]}
    with pytest.raises(ValueError, match=r"^this model takes no class, 'b' was given: it takes an image$"):
        batch_of(images_alone.inputs, [{"class": "b"}], [], CPU)
    seen = together.prepare(batch, [3, 4])["conditioning_image"]
    assert seen.mask is not None
    assert torch.equal(seen.x[1:], together.prepare({"image": batch["image"][1:]}, [4])["conditioning_image"].x), "by its seed alone"
    assert CompositeConditioner(parts[:1]).prepare(batch, [3, 4]) == {}


def test_each_frame_of_a_clip_has_the_mask_beside_its_latents() -> None:
    x, mask = normal(2, 9, 8, 8).clamp(-1, 1), (normal(2, 1, 8, 8, seed=1) > 0).float()
    clips, single, smaller = Concat(Holes(), 3, frames=3), Concat(Holes(), 3), partial(F.avg_pool2d, kernel_size=2)
    found = clips.encode({"conditioning_image": ConditioningImage(x, mask)}, smaller).concat
    assert found is not None
    assert found.shape[1] == clips.concat_channels == 12
    for frame, mine in enumerate(found.chunk(3, dim=1)):
        shown = ConditioningImage(x[:, 3 * frame : 3 * frame + 3], mask)
        one = single.encode({"conditioning_image": shown}, smaller).concat
        assert torch.equal(mine, one)
        assert torch.equal(clips.null({"image": x}).concat.chunk(3, dim=1)[frame], single.null({"image": x}).concat)


def test_classes_and_numbers_are_asked_for_together() -> None:
    together, names = CompositeConditioner([ClassLabel(3, 6), Numbers({"age": [0, 100], "dose": [0, 1]}, 8)]), ["a", "b", "c"]
    assert dict(together.inputs) == {"class": ClassInput(3), "age": NumberInput(0, 100), "dose": NumberInput(0, 1)}
    assert together.numbers == ["age", "dose"]
    batch = batch_of(together.inputs, [{"class": "b", "age": 30, "dose": 1}, {"age": "30"}, {"class": 2}, {}], names, CPU)
    assert batch["label"].tolist() == [1, -1, 2, -1]
    assert batch["numbers"] == [{"age": 30.0, "dose": 1.0}, {"age": 30.0}, {}, {}]
    shown = condition_of(together, "b", "a text", {"age": 30.0, "other": 1.0})
    assert shown == {"class": "b", "age": 30.0}, "what the model takes"
    assert batch_of(together.inputs, [shown], names, CPU)["numbers"] == [{"age": 30.0}]
    assert condition_of(together, None, "", {}) == {}
    assert checked(together.inputs, {"class": 1, "age": "3e1"}, names) == {"class": "b", "age": 30.0}
    with pytest.raises(ValueError, match=r"no weight, 3 was given: it takes a class, age \(0 to 100\), dose \(0 to 1\)$"):
        checked(together.inputs, {"weight": 3}, names)


def test_texts_are_asked_for() -> None:
    class Words(Unconditional):
        inputs = {"text": TextInput()}  # noqa: RUF012

    words = CompositeConditioner([Words(), ClassLabel(3, 6)])
    assert (words.takes_text, ClassLabel(3, 6).takes_text) == (True, False)
    batch = batch_of(words.inputs, [{"text": "red"}, {}], ["a", "b", "c"], CPU)
    assert (batch["text"], batch["label"].tolist(), batch["id"]) == (["red", ""], [-1, -1], ["", ""])
    assert condition_of(words, "b", "red", {}) == {"text": "red", "class": "b"}
    assert condition_of(words, "b", "", {}) == {"class": "b"}
    with pytest.raises(ValueError, match="CompositeConditioner has 2 parts for texts; allowed is one"):
        CompositeConditioner([Words(), Words()])


def test_an_image_as_a_vector_and_a_wrong_size_of_it() -> None:
    batch = {"image": to_uint8(images(2))}
    cond = ImageEmbedding(Mean(), 3).encode(batch, halve)
    torch.testing.assert_close(cond.vector.norm(dim=1), torch.full((2,), 3**0.5))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="have 3 values, ImageEmbedding's dim is 5"):
        ImageEmbedding(Mean(), 5).encode(batch, halve)


def test_numbers_are_told_apart_and_a_missing_one_is_nothing() -> None:
    numbers = Numbers({"age": [0, 100], "dose": [0.5, 2.5]}, 8)
    known = [{"age": 50.0, "dose": 2.5}, {"age": 51.0, "dose": 2.5}, {"dose": 2.5}, {"age": 50.0, "dose": 2.5, "other": 1.0}, {}]
    told, null = numbers.encode({"numbers": known}, halve).vector, numbers.null({"numbers": known}).vector
    assert told is not None
    assert told.shape == (5, 16) == (5, numbers.vector_dim)
    torch.testing.assert_close(told[0, :8], timestep_embedding(torch.tensor([500.0]), 8)[0])
    torch.testing.assert_close(told[0, 8:], timestep_embedding(torch.tensor([1000.0]), 8)[0])
    assert not torch.allclose(told[0, :8], told[1, :8], atol=1e-3)
    assert torch.equal(told[0], told[3])
    assert (told[2, :8] == 0).all()
    assert torch.equal(told[2, 8:], told[0, 8:])
    assert torch.equal(told[4], null[4])  # type: ignore[index]
    assert batch_of(numbers.inputs, [{"age": 30, "dose": "1e0"}, {}], [], CPU)["numbers"] == [{"age": 30.0, "dose": 1.0}, {}]
    wrong = {
        ("age", "old"): r"^age is 'old'; give a finite number$",
        ("age", float("nan")): r"^age is nan; give a finite number$",
        ("weight", 3): r"^this model takes no weight, 3 was given: it takes age \(0 to 100\), dose \(0.5 to 2.5\)$",
    }
    for (name, value), message in wrong.items():
        with pytest.raises(ValueError, match=message):
            batch_of(numbers.inputs, [{name: value}], [], CPU)
    with pytest.raises(ValueError, match="range of age is"):
        Numbers({"age": [3, 3]})


def test_numbers_of_a_folder_condition_a_model(trained: Path, photos, tmp_path: Path, capsys) -> None:
    folder = photos(6)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    rows = [f"{name},{index},{'' if index else 7.5},b" for index, name in enumerate(names)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,age,dose,note", *rows]))
    data = ["--data.path", str(folder), "--data.val_fraction=0.4", "--data.size=32", "--data.batch_size=2"]
    data += [f"--trainer.default_root_dir={tmp_path}/x", "--model.network.vector_dim=16"]
    model = ["--model.conditioner=Numbers", "--model.conditioner.ranges={age: [0, 5], %s: [0, 9]}", "--model.conditioner.dim=8"]
    run = [*stage2(tmp_path, f"--model.first_stage={trained}/autoencoder/model", data="folder"), *data]
    assert main([*run, *(option.replace("%s", "weight") for option in model)]) == 1
    assert "takes weight, which no image has; the data's metadata have age, dose" in capsys.readouterr().err
    assert main([*run, *(option.replace("%s", "dose") for option in model)]) == 0
    command = ["sample", str(tmp_path / "x" / "model"), "--n=1", "--steps=2", "--device=cpu", "--out"]
    for name, option in {"new": "--numbers", "old": "--prompt"}.items():
        capsys.readouterr()
        assert main([*command, str(tmp_path / name), option, "age=3, dose=2"]) == 0
        assert ("--prompt with numbers is the old spelling: write --numbers" in capsys.readouterr().err) == (name == "old")
        stored = settings_in(tmp_path / name / "0.png")
        assert stored is not None
        assert stored["condition"] == {"age": 3.0, "dose": 2.0}
    assert main([*command, str(tmp_path / "wrong"), "--numbers", "weight=3"]) == 1
    assert "age (0 to 5), dose (0 to 9)" in capsys.readouterr().err


def test_maps_of_a_folder_are_the_condition_and_turn_with_their_images(trained: Path, photos, tmp_path: Path, capsys) -> None:
    folder, maps = photos(6), tmp_path / "maps"
    for path in folder.rglob("*.jpg"):
        target = (maps / path.relative_to(folder)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).quantize(4).save(target)  # a palette, as maps often have
    images = SourceImages(str(folder), 32, maps=str(maps))
    keyed = Keyed(images, list(range(6)))
    keyed.with_images = True
    batch = keyed.__getitems__([(2, False), (2, True)])
    assert batch["map"].shape == batch["image"].shape
    assert torch.equal(batch["map"][0], batch["map"][1].flip(-1))
    assert len(batch["map"][0].flatten(1).unique(dim=1).T) <= 4
    assert (batch["map"].float() - batch["image"].float()).abs().mean() < 40, "of the same image"
    data = ["--data.path", str(folder), "--data.val_fraction=0.4", "--data.size=32", "--data.batch_size=2"]
    model = [
        "--model.conditioner=Concat",
        "--model.conditioner.channels=2",
        "--model.network.concat_channels=2",
        "--model.network.vector_dim=0",
    ]
    first = [f"--model.first_stage={trained}/autoencoder/model", f"--trainer.default_root_dir={tmp_path}/x"]
    run = [*stage2(tmp_path, data="folder"), *data, *model, *first]
    assert main(run) == 1
    assert "the data has none: set data.maps" in capsys.readouterr().err
    assert main([*run, "--data.maps", str(maps)]) == 0
    next(maps.rglob("*.png")).unlink()
    assert main([*run, "--data.maps", str(maps)]) == 1
    assert "1 of 6 images have no map in data.maps; the first that is missing is" in capsys.readouterr().err


def with_channels(path: Path, conditioner: Conditioner, **sizes: int) -> LatentDiffusion:
    """The model of a folder with another conditioner and a network for it."""
    old = model_folder.load(path).model
    network = UNet(**{**old.denoiser.network.init_args, "vector_dim": 0, **sizes})
    return LatentDiffusion(old.latents.autoencoder, network, conditioner, old.denoiser.schedule)


def test_a_model_that_is_given_images_starts_as_the_model_that_was_not(trained: Path, capsys) -> None:
    path = trained / "diffusion" / "model"
    old = model_folder.load(path).model
    classes = ClassLabel(10, old.conditioner.vector_dim)
    new = with_channels(path, CompositeConditioner([classes, Concat(Holes(), 2)]), concat_channels=3, vector_dim=classes.vector_dim)
    start_from(new, str(path))
    told = capsys.readouterr().out
    assert "not in it: conditioner.parts.0.embedding.weight; not used of it: conditioner.embedding.weight" in told
    assert new.latents.measured
    vector, x, t = normal(2, classes.vector_dim), normal(2, 2, 8, 8), torch.tensor([3.0, 500.0])
    one = old.denoiser.network(x, t, Cond(vector))
    two = new.denoiser.network(x, t, Cond(vector, concat=normal(2, 3, 8, 8, seed=1)))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="do not fit the model"):
        start_from(with_channels(path, Concat(Holes(), 2), concat_channels=3, channels=32), str(path))
    with pytest.raises(ValueError, match="images of 0 channels, the conditioner makes 3: leave the network's concat_channels out"):
        with_channels(path, Concat(Holes(), 2))
    wrong = with_channels(path, Concat(Fixed(Grayscale())), concat_channels=4)
    with pytest.raises(ValueError, match="has 2 latent channels, Concat 1 x 4"):
        wrong.conditioner.encode({"image": to_uint8(images())}, wrong.latents.to_latents)


@pytest.mark.parametrize("path", sorted(set(CONFIGS.glob("task/*.yaml")) - {CONFIGS / "task" / "base.yaml"}), ids=lambda p: p.stem)
def test_every_task_runs_for_two_tiny_steps_and_its_model_works_on_an_image(path: Path, trained: Path, tmp_path: Path) -> None:
    model = str(trained / "diffusion" / "model")
    masks = path.stem == "inpainting"
    options = ["-c", str(path), f"--model.first_stage={model}", f"--model.init={model}", f"--trainer.default_root_dir={tmp_path}/x"]
    limits = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    assert main([*stage2(tmp_path, *options), *limits]) == 0
    assert list((tmp_path / "x" / "pictures").glob("samples_*.png"))
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    as_image(to_uint8(images(1, 32)[0, :, :, :24])).save(image)
    half = np.zeros((32, 24), np.uint8)
    half[:, 12:] = 255
    Image.fromarray(half).save(mask)
    command = ["sample", str(tmp_path / "x" / "model"), "--image", str(image), "--n=1", "--steps=2", "--device=cpu"]
    out = tmp_path / "out"
    assert main([*command, "--out", str(out), *(["--mask", str(mask)] if masks else [])]) == 0
    stored = settings_in(out / "0.png")
    assert stored is not None
    assert (stored["task"] is None) != masks
    factor = model_folder.load(tmp_path / "x" / "model").model.conditioner.image.downscale
    assert Image.open(out / "0.png").size == (24 * factor, 32 * factor), "of the image's shape"


def of_images(trained: Path, folder: Path, corruption: Corruption) -> str:
    """A model folder of a model that starts as the trained one and is shown what a corruption leaves."""
    path = trained / "diffusion" / "model"
    model = with_channels(path, Concat(corruption, 2), concat_channels=2)
    start_from(model, str(path))
    model_folder.save(model, folder, model_folder.load(path).card)
    return str(folder)


def test_mistakes_with_models_of_images(trained: Path, tmp_path: Path, capsys) -> None:
    larger, grey = (of_images(trained, tmp_path / str(one), one) for one in (Fixed(Downscale(2)), Fixed(Grayscale())))
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30), "red").save(image)

    def refused(*options: str) -> str:
        capsys.readouterr()
        assert main(["sample", *options, "--n=1", "--steps=2", "--device=cpu", "--out", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert "works on an image: give --image FILE" in refused(grey)
    assert "from images 2 times smaller and does nothing else" in refused(larger, "--image", str(image), "--style")
    assert "a class was given ('3'), but this model takes an image" in refused(grey, "--image", str(image), "--class", "3")
    wide = ["--n=1", "--steps=2", "--device=cpu", "--out", str(tmp_path / "wide"), "--overwrite"]
    for size, made in (([], (80, 60)), (["--size=64x32"], (64, 32))):
        assert main(["sample", larger, "--image", str(image), *wide, *size]) == 0
        assert Image.open(tmp_path / "wide" / "0.png").size == made


def test_windows_are_refused_where_a_model_of_images_makes_none(trained: Path, tmp_path: Path, capsys) -> None:
    grey, image = of_images(trained, tmp_path / "grey", Fixed(Grayscale())), tmp_path / "image.png"
    Image.new("RGB", (40, 30), "red").save(image)
    command = ["sample", grey, "--image", str(image), "--n=1", "--steps=2", "--device=cpu", "--out", str(tmp_path / "out"), "--windows"]
    assert main(command) == 1
    assert "makes larger pictures in one piece: leave --windows out" in capsys.readouterr().err
