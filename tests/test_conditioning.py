"""Images as conditions: what training images suffer, what the network is told of them, and the models trained so."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

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
from ldm.commands.predict import settings_in
from ldm.commands.wishes import conditions
from ldm.conditioning.image import Concat, ImageEmbedding
from ldm.conditioning.label import ClassLabel
from ldm.conditioning.numbers import Numbers
from ldm.conditioning.together import Together
from ldm.data.corruptions import BSR, Blur, Fixed, GaussianNoise, Holes, Jpeg, OneOf, Posterised, gaussian_kernel
from ldm.data.datasets import FolderImages
from ldm.data.module import Keyed
from ldm.data.transforms import as_image, as_tensor
from ldm.degradations import Grey, Smaller
from ldm.interfaces import Cond, Conditioner, Corruption, Seen
from ldm.metrics.features import Features
from ldm.nn.attention import timestep_embedding
from ldm.nn.dit import DiT
from ldm.nn.unet import UNet
from ldm.ranges import to_float, to_uint8
from ldm.stages.diffusion import start_from
from ldm.stages.model import LatentDiffusion

CONFIGS = Path(__file__).parent.parent / "configs"
KEEPING = [GaussianNoise(), Jpeg(), Blur(), Blur(anisotropic=True), Posterised(), OneOf([Jpeg(), Blur()]), Fixed(Grey()), Holes()]
ALL: list[Corruption] = [*KEEPING, Fixed(Smaller()), Fixed(Smaller(2)), BSR()]


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    """(count,3,size,size) smooth, with values of 8 bits."""
    return to_float(to_uint8(F.interpolate(normal(count, 3, 5, 5), size=(size, size), mode="bicubic").clamp(-1, 1)))


@pytest.mark.parametrize("corruption", ALL, ids=lambda c: f"{type(c).__name__}{c.shrinks}")
def test_what_is_left_of_an_image(corruption: Corruption) -> None:
    x = images()
    torch.manual_seed(3)
    seen = corruption.see(x)
    assert seen.x.shape == (4, 3, 32 // corruption.shrinks, 32 // corruption.shrinks)
    torch.testing.assert_close(seen.x, to_float(to_uint8(seen.x)), rtol=0, atol=1e-6)  # what fits into a file of 8 bits
    assert (seen.mask is not None) == corruption.masks
    torch.manual_seed(3)
    again = corruption.see(x)
    assert torch.equal(seen.x, again.x)
    if seen.mask is not None and again.mask is not None:
        assert torch.equal(seen.mask, again.mask)
        assert torch.equal(seen.x, x), "masks hide, they change nothing"
        assert set(seen.mask.unique().tolist()) <= {0.0, 1.0}


def test_noise_has_its_level_and_bounds_are_checked() -> None:
    x = torch.zeros(6, 3, 64, 64)
    torch.manual_seed(0)
    levels = (GaussianNoise((0.01, 0.1)).see(x).x / 2).std((1, 2, 3))
    assert (levels > 0.0095).all()
    assert (levels < 0.105).all()
    assert levels.std() > 0.005, "each image has its own"
    assert abs(float((GaussianNoise((0.1, 0.1)).see(x).x / 2).std()) - 0.1) < 0.002
    with pytest.raises(ValueError, match="smaller number first"):
        GaussianNoise((0.3, 0.1)).see(x)


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
    for image, small in zip(to_uint8(soft), to_uint8(Fixed(Smaller(4)).see(soft).x), strict=True):
        wanted = as_tensor(as_image(image).resize((8, 8), Image.Resampling.BICUBIC)).int()
        assert (wanted - small.int()).abs().max() <= 1
    luma = as_tensor(as_image(to_uint8(x)[0]).convert("L")).int()
    assert (to_uint8(Fixed(Grey()).see(x).x)[0].int() - luma).abs().max() <= 1
    as_image(to_uint8(x)[0]).save(tmp_path / "x.jpg", quality=20)
    with Image.open(tmp_path / "x.jpg") as saved:
        difference = as_tensor(saved).float() - to_uint8(Jpeg((20, 20)).see(x).x)[0].float()
    assert difference.abs().mean() < 1.5, "the same quality as Pillow's"
    flat = torch.full((2, 3, 16, 16), 0.5)
    torch.testing.assert_close(Blur().see(flat).x, to_float(to_uint8(flat)))
    assert len(Posterised(4, 3).see(x).x.unique()) <= 3
    torch.manual_seed(0)
    changed = (OneOf([Fixed(Grey()), Blur((2.0, 2.0))]).see(images(32)).x - Fixed(Grey()).see(images(32)).x).abs().amax((1, 2, 3)) > 0
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
    one, two = (conditioner.encode({"seen": Seen(shown, mask)}, halve) for shown in (x, other))
    assert one.concat is not None
    assert two.concat is not None
    assert one.concat.shape == (2, 5, 16, 16)
    assert torch.equal(one.concat, two.concat)
    assert one.concat[0, 4, :, 0].tolist() == [1.0] * 5 + [0.0] * 11  # a latent that has lost a pixel is made anew
    assert torch.equal(one.concat[:, :4, 5:], halve(x)[:, :, 5:])
    null = conditioner.null({"seen": Seen(x, mask)})
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
    conditioner, x = Concat(Fixed(Smaller(4)), noise=0.3), images(3)
    batch = {"image": to_uint8(x)}
    conditioner.eval()
    one, two = (conditioner.encode(batch, halve) for _ in range(2))
    assert torch.equal(one.concat, two.concat)  # type: ignore[arg-type]
    wanted = F.interpolate(Fixed(Smaller(4)).see(x).x, scale_factor=4, mode="bicubic").clamp(-1, 1)
    torch.testing.assert_close(one.concat, halve(wanted))
    assert one.vector.shape == (3, conditioner.vector_dim)  # type: ignore[union-attr]
    assert torch.equal(one.vector, conditioner.null(batch).vector)  # type: ignore[arg-type]
    conditioner.train()
    noisy = conditioner.encode(batch, halve)
    assert ((noisy.concat - one.concat).std((1, 2, 3)) < 0.35).all()  # type: ignore[operator]
    assert not torch.equal(noisy.vector, one.vector)  # type: ignore[arg-type]
    assert Concat(Fixed(Smaller(4))).encode(batch, halve).vector is None


class Mean(Features):
    name, resize = "mean", 8

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_several_conditions_at_once() -> None:
    parts = [ClassLabel(3, 6), Concat(Holes()), ImageEmbedding(Mean(), 3)]
    with pytest.raises(ValueError, match="Together has 2 parts for images; allowed is one"):
        Together(parts)
    together = Together(parts[:2])
    assert (together.num_classes, together.vector_dim, together.concat_channels, together.shrinks, together.masks) == (3, 6, 5, 1, True)
    batch = {"label": torch.tensor([0, 2]), "image": to_uint8(images(2))}
    cond, null = together.encode(batch, halve), together.null(batch)
    assert cond.vector.shape == (2, 6)  # type: ignore[union-attr]
    assert cond.concat.shape == (2, 5, 16, 16)  # type: ignore[union-attr]
    dropped = cond.where(torch.tensor([True, False]), null)
    for part, whole, none in ((dropped.vector, cond.vector, null.vector), (dropped.concat, cond.concat, null.concat)):
        assert torch.equal(part[0], whole[0])  # type: ignore[index]
        assert torch.equal(part[1], none[1].expand_as(part[1]))  # type: ignore[index]
    assert together.request("b", ["a", "b", "c"]) == {"label": 1}
    assert Together([Concat(Holes())]).request(None, []) == {}
    with pytest.raises(ValueError, match="takes no condition"):
        Together([Concat(Holes())]).request("b", [])


def test_each_frame_of_a_clip_has_the_mask_beside_its_latents() -> None:
    x, mask = normal(2, 9, 8, 8).clamp(-1, 1), (normal(2, 1, 8, 8, seed=1) > 0).float()
    clips, single = Concat(Holes(), 3, frames=3), Concat(Holes(), 3)
    found = clips.encode({"seen": Seen(x, mask)}, partial(F.avg_pool2d, kernel_size=2)).concat
    assert found is not None
    assert found.shape[1] == clips.concat_channels == 12
    for frame, mine in enumerate(found.chunk(3, dim=1)):
        one = single.encode({"seen": Seen(x[:, 3 * frame : 3 * frame + 3], mask)}, partial(F.avg_pool2d, kernel_size=2)).concat
        assert torch.equal(mine, one)
        assert torch.equal(clips.null({"image": x}).concat.chunk(3, dim=1)[frame], single.null({"image": x}).concat)


def test_classes_and_numbers_are_asked_for_together() -> None:
    together = Together([ClassLabel(3, 6), Numbers({"age": [0, 100], "dose": [0, 1]}, 8)])
    names = ["a", "b", "c"]
    assert together.request("b | age=30, dose=1", names) == {"label": 1, "numbers": {"age": 30.0, "dose": 1.0}}
    assert together.request(" | age=30", names) == {**ClassLabel(3, 6).request(None, names), "numbers": {"age": 30.0}}
    assert together.request(None, names) == {**ClassLabel(3, 6).request(None, names), "numbers": {}}
    with pytest.raises(ValueError, match=r"takes 2 conditions, 'b' has 1: divide them by '\|'"):
        together.request("b", names)
    assert together.request(together.ask("b", "", {"age": 30.0, "other": 1.0}), names) == {"label": 1, "numbers": {"age": 30.0}}
    assert together.ask(None, "", {}) is None
    loaded = SimpleNamespace(model=SimpleNamespace(conditioner=together), card={"classes": names})
    assert conditions(loaded, ["age=3"], ["b"], 2) == ["b | age=3"] * 2
    assert conditions(loaded, [], ["a", "b"], 2) == ["a | ", "b | "]
    assert conditions(loaded, ["age=3"], None, 1) == [" | age=3"]
    assert conditions(loaded, [], None, 3) == ["a | ", "b | ", "c | "]
    assert conditions(loaded, [], [], 1) == [None]
    with pytest.raises(ValueError, match="has 2 parts divided by"):
        conditions(loaded, ["age=3|dose=1"], ["b"], 1)


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
    assert numbers.request("age=30, dose = 1e0", []) == {"numbers": {"age": 30.0, "dose": 1.0}}
    assert numbers.request(None, []) == {"numbers": {}}
    for wrong in ("age", "age=old", "weight=3"):
        with pytest.raises(ValueError, match=r"is no number that this model knows: .* of age \(0 to 100\), dose \(0.5 to 2.5\)"):
            numbers.request(wrong, [])
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
    command = ["sample", str(tmp_path / "x" / "model"), "--n=1", "--steps=2", "--device=cpu", "--out", str(tmp_path / "out"), "--prompt"]
    assert main([*command, "age=3, dose=2"]) == 0
    stored = settings_in(tmp_path / "out" / "0.png")
    assert stored is not None
    assert stored["class"] == "age=3, dose=2"
    assert main([*command, "weight=3"]) == 1
    assert "age (0 to 5), dose (0 to 9)" in capsys.readouterr().err


def test_maps_of_a_folder_are_the_condition_and_turn_with_their_images(trained: Path, photos, tmp_path: Path, capsys) -> None:
    folder, maps = photos(6), tmp_path / "maps"
    for path in folder.rglob("*.jpg"):
        target = (maps / path.relative_to(folder)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).quantize(4).save(target)  # a palette, as maps often have
    images = FolderImages(str(folder), 32, maps=str(maps))
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
    new = with_channels(path, Together([classes, Concat(Holes(), 2)]), concat_channels=3, vector_dim=classes.vector_dim)
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
    with pytest.raises(ValueError, match="images of 0 channels, the conditioner makes 3: set the network's concat_channels to 3"):
        with_channels(path, Concat(Holes(), 2))
    wrong = with_channels(path, Concat(Fixed(Grey())), concat_channels=4)
    with pytest.raises(ValueError, match="has 2 latent channels, Concat 1 x 4"):
        wrong.conditioner.encode({"image": to_uint8(images())}, wrong.latents.to_latents)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("task/*.yaml")), ids=lambda p: p.stem)
def test_every_task_runs_for_two_tiny_steps_and_its_model_works_on_an_image(path: Path, trained: Path, tmp_path: Path) -> None:
    model = str(trained / "diffusion" / "model")
    masks = path.stem == "inpainting"
    sizes = ["--model.conditioner.channels=2", f"--model.network.concat_channels={2 + masks}"]
    options = ["-c", str(path), *sizes, f"--model.first_stage={model}", f"--model.init={model}", f"--trainer.default_root_dir={tmp_path}/x"]
    limits = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    assert main([*stage2(tmp_path, *options), *limits]) == 0
    assert list((tmp_path / "x" / "pictures").glob("samples_*.png"))
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    as_image(to_uint8(images(1, 64)[0])).save(image)
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(mask)
    command = ["sample", str(tmp_path / "x" / "model"), "--image", str(image), "--n=1", "--steps=2", "--device=cpu"]
    out = tmp_path / "out"
    assert main([*command, "--out", str(out), *(["--mask", str(mask)] if masks else [])]) == 0
    stored = settings_in(out / "0.png")
    assert stored is not None
    assert (stored["task"] is None) != masks
    assert Image.open(out / "0.png").size == (32, 32)


def test_mistakes_with_models_of_images(trained: Path, tmp_path: Path, capsys) -> None:
    path = trained / "diffusion" / "model"
    for name, corruption in (("larger", Fixed(Smaller(2))), ("grey", Fixed(Grey()))):
        model = with_channels(path, Concat(corruption, 2), concat_channels=2)
        start_from(model, str(path))
        model_folder.save(model, tmp_path / name, model_folder.load(path).card)
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30), "red").save(image)

    def refused(*options: str) -> str:
        capsys.readouterr()
        assert main(["sample", *options, "--n=1", "--steps=2", "--device=cpu", "--out", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert "works on an image: give --image FILE" in refused(str(tmp_path / "grey"))
    assert "from images 2 times smaller and does nothing else" in refused(str(tmp_path / "larger"), "--image", str(image), "--style=true")
    assert "takes no condition" in refused(str(tmp_path / "grey"), "--image", str(image), "--class", "3")
    wide = ["--n=1", "--steps=2", "--device=cpu", "--size=64x32", "--out", str(tmp_path / "wide")]
    assert main(["sample", str(tmp_path / "larger"), "--image", str(image), *wide]) == 0
    assert Image.open(tmp_path / "wide" / "0.png").size == (64, 32)
    options = [
        "--image",
        str(image),
        "--num=1",
        "--steps=2",
        "--windows=true",
        "--trainer.accelerator=cpu",
        "--out",
        str(tmp_path / "windows"),
    ]
    assert main(["predict", "--model", str(tmp_path / "grey"), *options]) == 1
    assert "makes larger pictures in one piece: leave windows out" in capsys.readouterr().err
