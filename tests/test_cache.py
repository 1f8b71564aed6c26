"""The latent cache (ldm/data/cache.py, encoding.py): exact, whole or not there, shared by runs, resumed after a kill."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ldm, stage2
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import Noise, NoiseData, epoch_of, fake_trainer

from ldm.cli import main
from ldm.data import cache as cache_module
from ldm.data.cache import CacheWriter, LatentCache, _successors, others
from ldm.errors import UserError
from ldm.interfaces import Features
from ldm.ranges import to_float


class Encoder:
    """An encoder that is not symmetric, with a memory of what it was given; `fails_at` is the call that raises."""

    def __init__(self, fails_at: int = -1) -> None:
        self.images, self.calls, self.fails_at = 0, 0, fails_at
        self.weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(5))

    def __call__(self, x: Tensor) -> Tensor:
        self.images, self.calls = self.images + len(x), self.calls + 1
        if self.calls == self.fails_at:
            raise RuntimeError("power cut")
        assert x.dtype == torch.float32
        assert -1 <= x.min() <= x.max() <= 1
        return torch.nn.functional.conv2d(x, self.weight, stride=2)


def cached(
    folder: Path, key: str = "key", trainer: Any = None, encoder: Encoder | None = None, **options: Any
) -> tuple[NoiseData, Encoder]:
    data, encoder = NoiseData(**{"size": 8, "batch_size": 4, "cache": str(folder), **options}), encoder or Encoder()
    data.trainer = trainer or fake_trainer()
    data.cache_latents(encoder, key, torch.device("cpu"))
    return data, encoder


def check_cache(data: NoiseData) -> None:
    train, encoder = data.sets[0], Encoder()
    assert train.cache is not None
    pixels = to_float(Noise().data[train.indices])
    everything = list(range(len(train)))
    for mirrored, images in ((0, pixels), (1, pixels.flip(-1))):
        made = train.cache[[mirrored] * len(train), everything][0]["moments"]
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, encoder(images), rtol=2**-10, atol=1e-6)


def content(root: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("place", ["disk", "memory", "device"])
def test_the_cache_holds_images_and_mirror_images(place: str, tmp_path: Path) -> None:
    data, encoder = cached(tmp_path, cache_on=place, num_workers=0 if place == "disk" else 2)
    assert encoder.images == 2 + 2 * len(data.sets[0])
    check_cache(data)
    direct = Encoder()
    plain = NoiseData(size=8, batch_size=4)
    for batch, expected in zip(epoch_of(data), epoch_of(plain), strict=True):
        assert "image" not in batch
        assert batch["id"] == expected["id"]
        assert torch.equal(batch["label"], expected["label"])
        torch.testing.assert_close(batch["moments"], direct(to_float(expected["image"])), rtol=2**-10, atol=1e-6)
    assert data.train_dataloader().num_workers == 0, "what is in memory needs no process"
    assert all("image" in batch for batch in NoiseData(size=8, batch_size=4).val_dataloader()), "held-out images are not cached"
    assert [batch["moments"].shape[0] for batch in data.rank_batches()] == [len(b["id"]) for b in plain.rank_batches()]


class Means(Features):
    name, resize = "means", 8

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


def test_features_are_kept_beside_the_latents(tmp_path: Path) -> None:
    data, _ = cached(tmp_path, cache_features=[Means()])
    plain = NoiseData(size=8, batch_size=4)
    for batch, expected in zip(epoch_of(data), epoch_of(plain), strict=True):
        assert batch["features"].keys() == {"means"}
        torch.testing.assert_close(batch["features"]["means"], expected["image"].float().mean((2, 3)), rtol=1e-3, atol=0)
    without, encoder = cached(tmp_path)
    assert encoder.images > 0, "another cache"
    assert "features" not in epoch_of(without)[0]


def test_the_cache_is_written_once_per_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = cached(tmp_path)
    assert "of their root mean square is lost" in capsys.readouterr().out
    again, encoder = cached(tmp_path)
    assert encoder.images == 0
    check_cache(again)
    for options in ({"split_seed": 3}, {"size": 6}, {"val_fraction": 0.3}):
        data, encoder = cached(tmp_path, **options)
        assert encoder.images == 2 + 2 * len(data.sets[0]), f"{options} is another cache"
    assert "also holds latents of other images" in capsys.readouterr().out
    other, encoder = cached(tmp_path, "other key")
    assert encoder.images == 2 + 2 * len(other.sets[0])
    check_cache(other)
    assert first.sets[0].cache is not None
    assert other.sets[0].cache is not None
    assert other.sets[0].cache.folder != first.sets[0].cache.folder
    _, encoder = cached(tmp_path)
    assert encoder.images == 0, "the first cache is still there"


@pytest.mark.parametrize("workers", [0, 2])
def test_encoding_goes_on_after_a_failure_with_the_same_bytes(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        cached(tmp_path / "parts", encoder=Encoder(fails_at=7), num_workers=workers)
    assert not list(tmp_path.glob("parts/*/latents.json"))
    capsys.readouterr()
    again, encoder = cached(tmp_path / "parts", batch_size=5, num_workers=workers)
    assert encoder.images < 2 + 2 * len(again.sets[0])
    assert "images are encoded already, by a run that was stopped" in capsys.readouterr().out
    check_cache(again)
    assert content(tmp_path / "whole") == content(tmp_path / "parts"), "nothing else is left over"


def test_rows_that_are_not_as_they_were_written_are_encoded_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        cached(tmp_path, encoder=Encoder(fails_at=8))
    (folder,) = tmp_path.glob(".*.partial")
    array = np.load(folder / "moments.npy", mmap_mode="r+")
    array[1] = 7
    array.flush()
    again, _ = cached(tmp_path)
    check_cache(again)


def test_a_cache_of_an_earlier_version_is_made_anew(tmp_path: Path) -> None:
    data, _ = cached(tmp_path)
    assert data.sets[0].cache is not None
    folder = data.sets[0].cache.folder
    (folder / "latents.json").write_text(json.dumps({"key": data.sets[0].cache.key}))  # of format 1
    again, encoder = cached(tmp_path)
    assert encoder.images == 2 + 2 * len(again.sets[0])
    check_cache(again)


def test_values_that_16_bits_cannot_hold_are_refused(tmp_path: Path) -> None:
    encoder = Encoder()
    encoder.weight *= 1e6
    with pytest.raises(UserError, match="which 16 bits cannot hold: train the first stage again"):
        cached(tmp_path, encoder=encoder)


def test_no_cache_folder_and_no_trainer_do_nothing(tmp_path: Path) -> None:
    for data in (NoiseData(size=8), NoiseData(size=8, cache=str(tmp_path))):
        encoder = Encoder()
        if data.cache is None:
            data.trainer = fake_trainer()
        data.cache_latents(encoder, "key", torch.device("cpu"))
        assert encoder.images == 0
        assert data.sets[0].cache is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_fill_one_cache_together(tmp_path: Path, world: int) -> None:
    cached(tmp_path / "alone")
    meeting, box = threading.Barrier(world, timeout=20), {}

    def strategy(rank: int) -> Any:
        def broadcast(value: Any) -> Any:
            if rank == 0:
                box["value"] = value
            meeting.wait()
            received = box["value"]
            meeting.wait()
            return received

        return SimpleNamespace(
            broadcast=broadcast, barrier=lambda name: meeting.wait(), is_global_zero=rank == 0, global_rank=rank, world_size=world,
            root_device=torch.device("cpu"),
        )  # fmt: skip

    results: dict[int, tuple[NoiseData, Encoder]] = {}

    def work(rank: int) -> None:
        results[rank] = cached(tmp_path / "ranks", trainer=fake_trainer(world, rank, strategy(rank)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(world))
    counts = [results[rank][1].images - 2 * (rank == 0) for rank in range(world)]  # rank 0 probes the latents' shape with one image
    assert sum(counts) == 2 * len(results[0][0].sets[0])
    assert all(a - b in range(0, 9) for a, b in pairwise(counts)), "even shares of whole blocks"
    assert content(tmp_path / "alone") == content(tmp_path / "ranks"), "how many ranks there were cannot be seen"


@pytest.mark.timeout(120)
def test_runs_that_share_a_folder_wait_for_each_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cached(tmp_path / "alone")

    class Slow(Encoder):
        def __call__(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return super().__call__(x)

    results: list[tuple[NoiseData, Encoder]] = []
    threads = [threading.Thread(target=lambda: results.append(cached(tmp_path / "shared", encoder=Slow()))) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert sorted(encoder.images > 0 for _, encoder in results) == [False, False, False, True], "one encodes, the others share"
    assert "another run is encoding into" in capfd.readouterr().out
    for data, _ in results:
        check_cache(data)
    assert content(tmp_path / "alone") == content(tmp_path / "shared")


@settings(deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))))
def test_a_damaged_image_is_replaced_by_the_next_that_is_not(case: tuple[int, set[int]]) -> None:
    rows, damaged = case
    found = _successors(sorted(damaged), rows)
    assert found.keys() == damaged
    for index, other in found.items():
        assert other == next((index + k) % rows for k in range(1, rows + 1) if (index + k) % rows not in damaged)


def test_a_damaged_image_in_the_cache_has_its_successors_position(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, "key")
    with writer.alone() as missing:
        assert missing
        writer.create(4, {"moments": (1, 1, 1)}, 4)
        writer.open()
        writer.write(range(4), [0, 2, 2, 0], {"moments": torch.arange(8.0).view(4, 2, 1, 1, 1)})
        writer.finish()
    arrays, positions = LatentCache(tmp_path, "key")[[0, 1, 1], [1, 3, 2]]
    assert positions == [2, 0, 2]
    assert arrays["moments"].flatten().tolist() == [4.0, 1.0, 5.0]


def test_a_disk_without_room_is_said_before_anything_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    encoder = Encoder()
    with pytest.raises(UserError, match=r"the latents need 0.0 MB in .*, where .* MB are free \(No space left on device\): make room"):
        cached(tmp_path, encoder=encoder)
    assert encoder.calls == 2, "of the one image that tells the latents' shape"
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_the_size_of_files_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    arguments = stage2(tmp_path, f"--model.first_stage={trained}/autoencoder/model", command="encode")
    result = ldm(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert result.returncode == 1, result.stderr[-2000:]
    assert "ldm encode: the latents need 1.7 MB in" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "latents").iterdir())


def test_other_caches_are_named_checked_and_pruned(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = f"--model.first_stage={trained}/autoencoder/model"
    for size in (16, 32):
        assert main(stage2(tmp_path, first, f"--data.size={size}", command="encode")) == 0
    assert "also holds latents of other images" in capsys.readouterr().out
    assert main([*stage2(tmp_path, first, "--data.size=32", command="encode"), "--check"]) == 0
    assert "64 of 1617 images encoded anew differ from" in capsys.readouterr().out
    assert len(list((tmp_path / "latents").iterdir())) == 2
    assert main([*stage2(tmp_path, first, "--data.size=32", command="encode"), "--prune"]) == 0
    assert "removed" in capsys.readouterr().out
    (left,) = (tmp_path / "latents").iterdir()
    assert others(tmp_path / "latents", "x")
    array = np.load(left / "moments.npy", mmap_mode="r+")
    array[0] = 0
    array.flush()
    assert main([*stage2(tmp_path, first, "--data.size=32", command="encode"), "--check"]) == 1
    assert "1 of 64 rows in" in capsys.readouterr().err
    assert main([*stage2(tmp_path, first, "--data.size=24", command="encode"), "--check"]) == 1
    assert "leave --check out to write them" in capsys.readouterr().err


def test_a_killed_encoding_goes_on_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    """At random moments: tools/torture_cache.py."""
    run = tmp_path / "run"
    arguments = stage2(run, f"--model.first_stage={trained}/autoencoder/model", command="encode")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: the last bits of a sum depend on it
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 120
    while not list(run.glob("latents/.*.partial/plan.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(arguments) == 0
    (own,), (whole,) = (list((root / "latents").iterdir()) for root in (run, trained))
    assert content(own) == content(whole)
