"""Low-rank fine-tuning: what it trains, and that its model is the sum."""

from pathlib import Path

import pytest
import torch
from conftest import normal, randomise, stage2
from torch import nn

from ldm import model_folder
from ldm.cli import main
from ldm.interfaces import Cond
from ldm.nn.lora import adapt
from ldm.nn.unet import UNet


def test_it_changes_nothing_at_first_and_the_merged_weights_are_what_it_computes() -> None:
    network = randomise(UNet(4, 32, (1, 2), 1, (1,), vector_dim=3))
    x, t, cond = normal(2, 4, 8, 8), torch.tensor([3.0, 500.0]), Cond(normal(2, 3))
    before, names = network(x, t, cond), set(network.state_dict())
    adapted = adapt(network, 3, 6.0, ["attention", "conv"])
    assert any("attention" in name for name in adapted)
    assert any("conv" in name for name in adapted)
    torch.testing.assert_close(network(x, t, cond), before)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.parametrizations.weight.0.{part}" for name in adapted for part in ("down", "up")}
    for name, parameter in network.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    state = model_folder.merged(network.state_dict())
    assert set(state) == names
    plain = UNet(4, 32, (1, 2), 1, (1,), vector_dim=3)
    plain.load_state_dict(state)
    after = network(x, t, cond)
    torch.testing.assert_close(plain(x, t, cond), after)
    assert not torch.allclose(before, after)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        adapt(UNet(4, 32, (1,), 1, ()), 0, 1.0, ())
    with pytest.raises(ValueError, match=r"any of \['atention'\] in it; their parts are .*stem"):
        adapt(UNet(4, 32, (1,), 1, ()), 1, 1.0, ["atention"])


def test_a_run_trains_the_additions_alone_and_stores_their_sum(trained: Path, tmp_path: Path) -> None:
    model, out = trained / "diffusion" / "model", tmp_path / "x"
    options = [
        f"--model.init={model}",
        f"--model.first_stage={model}",
        f"--trainer.default_root_dir={out}",
        "--model.optimizer.lr=0.01",
        "--model.optimizer.warmup=0",
    ]
    run = stage2(tmp_path, *options)
    lora = Path(__file__).parent.parent / "configs" / "finetune" / "lora.yaml"
    run[run.index("--run") : run.index("--run")] = ["-c", str(lora)]
    assert main(run) == 0
    before, after = (model_folder.load(folder).model for folder in (model, out / "model"))
    of_checkpoint = model_folder.load(out / "checkpoints" / "last.ckpt").model
    one, two = before.state_dict(), after.state_dict()
    assert one.keys() == two.keys()
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed
    assert all(name.startswith("denoiser.network.") and name.endswith(".weight") for name in changed), "no bias, no embedding"
    for name, tensor in of_checkpoint.state_dict().items():
        torch.testing.assert_close(tensor, two[name])
    ranks = {name: int(torch.linalg.matrix_rank((two[name] - one[name]).flatten(1), rtol=1e-4)) for name in changed}
    assert max(ranks.values()) <= 8
