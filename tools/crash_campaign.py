"""Every way in which a run ends too early, hundreds of times: nothing may be lost, and what goes on has to end bit-equal to what was never
interrupted, without a file left over.

    python tools/crash_campaign.py --out FOLDER [--kills 200] [--signals 40] [--disk 20] [--ranks 10] [--seed 0] [--only stage1 stage2 ...]

kills: SIGKILL at a random moment, or before, or right after, the n-th call of what writes (a checkpoint, the model folder, the cache, a
picture) or validates; then the same command again, until it ends.  signals: SIGINT, SIGTERM, SIGHUP, SIGUSR1 in a step, a validation, an
encoding, a sampling; the exit status is 128 + n, and the seconds until it ends are measured.  disk: a limit on the size of files, a disk
that is full at the n-th file, a folder that has vanished.  twice: two commands in one folder.  ranks: two processes that train together,
of which one or both get a signal, one is killed, or one has a fault: both have to end within 15 seconds.
Commands run in forked children of a process that has imported ldm; with one thread, so that bits can be compared.
"""

import argparse
import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import ldm.commands.auto as auto
import ldm.commands.sample
import ldm.commands.train  # noqa: F401  imported before the children are forked
from ldm import files, registry
from ldm.auto.plan import Machine, Speed
from ldm.callbacks.checkpoints import GracefulStop
from ldm.cli import main
from ldm.console.configs import CONFIGS
from ldm.data.cache import CacheWriter
from ldm.sampling.run import Job

STEPS, EVERY = 24, 4  # of a training; between two checkpoints
LIMIT = 300.0  # seconds after which a command counts as hung
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SOON = 2.0  # seconds in which a signal ends a command
TOGETHER = 15.0  # seconds in which a rank ends after another one
# of two ranks, the second has a fault at the step that FAULT names
TWO = """
import os, sys
from ldm.cli import run
from ldm.stages.autoencoder import AutoencoderStage
step, fault = AutoencoderStage.training_step, int(os.environ.get("FAULT", -1))
def training_step(stage, *arguments):
    if stage.global_rank == 1 and stage.global_step == fault:
        raise RuntimeError("a fault of the campaign")
    return step(stage, *arguments)
AutoencoderStage.training_step = training_step
if __name__ == "__main__":
    sys.exit(run())
"""


@dataclass
class Child:
    """A command in a process of its own."""

    process: int
    log: Path

    def ended(self) -> int | None:
        found, status = os.waitpid(self.process, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if found else None

    def wait(self, until: float | None = None) -> int | None:
        """Its exit status; None: it still runs at the time `until`, which is no fault, or it hangs, which is one."""
        end = time.monotonic() + LIMIT if until is None else until
        while (status := self.ended()) is None and time.monotonic() < end:
            time.sleep(0.002)
        if status is None and until is None:
            self.kill()
            raise RuntimeError(f"hangs: see {self.log}")
        return status

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process, number)


def start(arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> Child:
    """prepare: what the child does before."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if child := os.fork():
        return Child(child, log)
    status = 99
    try:
        with log.open("a") as file:
            file.write(f"$ ldm {' '.join(arguments)}\n")
            file.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        prepare()
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def at_call(number: int, owner: Any, name: str, act: Callable[[], None], after: bool = False) -> Callable[[], None]:
    """A preparation: act before, or after, the call of this number of a function."""

    def prepare() -> None:
        plain, calls = getattr(owner, name), 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            now = calls == number
            if now and not after:
                act()
            found = plain(*arguments, **options)
            if now and after:
                act()
            return found

        setattr(owner, name, counted)

    return prepare


def hashes(paths: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def checkpoint_hash(path: Path) -> str:
    """Of all numbers in a checkpoint but for scores and paths of Lightning's own callback, which name the folder, and for how many batches
    of validations this process has seen."""
    found, digest = torch.load(path, map_location="cpu", weights_only=True), hashlib.sha256()
    found.pop("callbacks", None)
    found.get("ldm", {}).pop("settings", None)
    loop = found["loops"]["fit_loop"]
    for name in [name for name in loop if name.startswith("epoch_loop.val_loop")]:
        del loop[name]

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        else:
            digest.update(repr(value).encode())

    add(found)
    return digest.hexdigest()


@dataclass(frozen=True)
class Kind:
    """A command, and what it must leave.  moments: (name, owner, function) of what it may be killed in."""

    name: str
    command: Callable[[Path], list[str]]
    result: Callable[[Path], dict[str, str]]
    moments: tuple[tuple[str, Any, str], ...]
    good: Callable[[Path], list[Path]] = lambda run: []  # files that have to be whole at any time


def kinds(out: Path) -> dict[str, Kind]:
    trainer = yaml.safe_load((CONFIGS / "trainer" / "cpu.yaml").read_text())
    trainer["trainer"] |= {"log_every_n_steps": 1, "limit_val_batches": 2, "enable_model_summary": False}
    trainer["trainer"]["logger"] = trainer["trainer"]["logger"][1:]
    trainer["trainer"]["callbacks"][-1]["init_args"]["every_n_train_steps"] = EVERY
    gan = {"class_path": "PatchGAN", "init_args": {"start": 12, "discriminator": {"class_path": "PatchDiscriminator"}}}
    gan["init_args"]["discriminator"] |= {"init_args": {"channels": 16, "layers": 2}}  # type: ignore[index]
    out.mkdir(parents=True, exist_ok=True)
    (out / "trainer.yaml").write_text(yaml.safe_dump(trainer))
    (out / "gan.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"adversary": gan}}}))
    common = [
        "-c",
        str(out / "trainer.yaml"),
        "-c",
        "data/digits.yaml",
        "--data.batch_size=16",
        f"--trainer.max_steps={STEPS}",
        "--trainer.val_check_interval=10",
    ]
    one = [*common, "-c", "autoencoder/digits.yaml", "-c", str(out / "gan.yaml"), "--model.autoencoder.channels=16"]
    two = [*common, "-c", "diffusion/digits.yaml", "--model.network.channels=32", "--model.sampling_steps=2"]
    two += ["--model.first_stage", str(out / "first" / "autoencoder" / "model")]
    model = out / "second" / "diffusion" / "model"

    def fit(options: list[str], stage: str) -> tuple[Callable[[Path], list[str]], Callable[[Path], dict[str, str]]]:
        def result(run: Path) -> dict[str, str]:
            folder = run / stage
            found = hashes([folder / "model" / "model.safetensors", folder / "model" / "config.yaml"])
            return found | {"last": checkpoint_hash(folder / "checkpoints" / "last.ckpt")}

        return lambda run: ["fit", *options, "--run", str(run), "--ckpt_path", "auto"], result

    writes = (("a file", files, "sync"), ("its renaming", os, "replace"), ("a validation", GracefulStop, "on_validation_batch_end"))
    found = [
        Kind("stage1", *fit(one, "autoencoder"), writes, lambda run: [*run.glob("autoencoder/checkpoints/*.ckpt")]),
        Kind("stage2", *fit(two, "diffusion"), writes, lambda run: [*run.glob("diffusion/checkpoints/*.ckpt")]),
        Kind(
            "encode", lambda run: ["encode", *two, "--run", str(run)],
            lambda run: hashes([path for path in (run / "latents").rglob("*") if path.is_file()]),
            (("its rows", CacheWriter, "write"), ("the renaming", os, "replace"), ("its end", CacheWriter, "finish")),
        ),
        Kind(
            "sample", lambda run: ["sample", str(model), "--n", "12", "--steps", "5", "--frames", "3", "--out", str(run)],
            lambda run: hashes([*run.glob("*.png"), *run.glob("*.webp"), run / "manifest.jsonl"]), writes[:2],
        ),
        Kind(
            "train", lambda run: ["train", str(out / "pictures"), "--hours", "0.06", "--run", str(run)],
            lambda run: hashes([run / stage / "model" / "model.safetensors" for stage in ("autoencoder", "diffusion")]), writes,
            lambda run: [*run.glob("*/checkpoints/*.ckpt")],
        ),
    ]  # fmt: skip
    return {kind.name: kind for kind in found}


def prepared(out: Path) -> dict[str, Kind]:
    """The kinds, with the models and pictures that they need."""
    found = kinds(out)
    for name, folder in (("stage1", "first"), ("stage2", "second")):
        if not list((out / folder).glob("*/model/config.yaml")) and start(found[name].command(out / folder), out / "log.txt").wait():
            raise SystemExit(f"{name} was not trained: see {out / 'log.txt'}")
    if not (out / "pictures").is_dir():
        from PIL import Image

        draw = random.Random(0)
        for i in range(24):
            path = out / "pictures" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (40, 40), bytes(draw.randrange(256) for _ in range(4800))).save(path)
    os.environ["LDM_SHORTEN"] = "8"  # only `ldm train` is longer than that
    auto.measure = lambda where, shape, least: Speed(0.01, 0.02, 0.001)  # type: ignore[assignment]  the plan must not vary
    auto.machine = lambda: Machine("cpu", 1, 2, 2**34)  # type: ignore[assignment]
    return found


def environment(kind: str) -> Callable[[], None]:
    """What a child of this kind needs: only `ldm train` is shortened."""
    return lambda: None if kind == "train" else os.environ.pop("LDM_SHORTEN", None)  # type: ignore[return-value]


def both(*steps: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        for step in steps:
            step()

    return prepare


def left_over(run: Path) -> list[str]:
    return [path.name for path in run.rglob("*") if path.is_file() and files.PART in path.name]


class Campaign:
    """Counts of what was tried and of what went wrong, by row of the table."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.draw, self.kinds = out, random.Random(seed), prepared(out)
        self.tries, self.wrong, self.slowest = Counter[str](), dict[str, list[str]](), dict[str, float]()
        self.whole, self.lasts = dict[str, dict[str, str]](), dict[str, float]()

    def reference(self, name: str) -> None:
        """What an uninterrupted run leaves, and how long it lasts."""
        run = self.out / "whole" / name
        shutil.rmtree(run, ignore_errors=True)
        began = time.monotonic()
        status = start(self.kinds[name].command(run), self.out / "log.txt", environment(name)).wait()
        if status != 0:
            raise SystemExit(f"an uninterrupted {name} ended with {status}: see {self.out / 'log.txt'}")
        self.lasts[name], self.whole[name] = time.monotonic() - began, self.kinds[name].result(run)

    def fresh(self, name: str) -> Path:
        run = self.out / "try" / name
        shutil.rmtree(run, ignore_errors=True)
        return run

    def note(self, row: str, problem: str | None) -> None:
        self.tries[row] += 1
        if problem:
            self.wrong.setdefault(row, []).append(problem)
            print(f"  {row}: {problem}", flush=True)

    def goes_on(self, name: str, run: Path, again: Callable[[Path], int | None] | None = None) -> str | None:
        """Run the same command again, in a child or as `again` does; what is wrong with what it leaves."""
        status = again(run) if again else start(self.kinds[name].command(run), self.out / "log.txt", environment(name)).wait()
        if status != 0:
            return f"the same command again ends with {status}"
        try:
            found = self.kinds[name].result(run)
        except OSError as error:
            return f"lost: {error}"
        whole = self.whole[name]
        if other := sorted(key for key in found.keys() | whole.keys() if found.get(key) != whole.get(key)):
            return f"other bits in {other}"
        return f"left over: {left}" if (left := left_over(run)) else None

    def damaged(self, name: str, run: Path) -> str | None:
        for path in self.kinds[name].good(run):
            if files.PART in path.name:
                continue
            try:
                torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                return f"damaged {path.name}: {error!r}"[:160]
        return None

    def kills(self, count: int, names: list[str]) -> None:
        for name in names:
            self.reference(name)
        while sum(self.tries[f"kill in {name}"] for name in names) < count:
            name = names[self.draw.randrange(len(names))]
            run = self.fresh(name)
            for _ in range(self.draw.randint(1, 4)):
                problem = self.damaged(name, run) if self._killed(name, run) else None
                self.note(f"kill in {name}", problem)
            problem = self.goes_on(name, run)
            if problem:
                self.note(f"kill in {name}", problem)

    def _killed(self, name: str, run: Path) -> bool:
        """Kill a start of a kind, at random or at a moment; whether it was alive by then."""
        kind, prepare, until = self.kinds[name], environment(name), time.monotonic() + self.draw.uniform(0.05, 0.9) * self.lasts[name]
        if self.draw.random() < 0.6:
            _, owner, function = kind.moments[self.draw.randrange(len(kind.moments))]
            number, after = self.draw.randint(1, 12), self.draw.random() < 0.5
            prepare = both(prepare, at_call(number, owner, function, lambda: os.kill(os.getpid(), signal.SIGKILL), after))
            until = time.monotonic() + LIMIT
        child = start(kind.command(run), self.out / "log.txt", prepare)
        if child.wait(until) is None:
            child.kill()
            child.wait()
        return True

    def signals(self, count: int) -> None:
        moments = [
            ("stage1", "a step", GracefulStop, "on_train_batch_end"),
            ("stage1", "a validation", GracefulStop, "on_validation_batch_end"),
            ("stage2", "a step", GracefulStop, "on_train_batch_end"),
            ("stage2", "a validation", GracefulStop, "on_validation_batch_end"),
            ("stage2", "a file", files, "sync"),
            ("encode", "its rows", CacheWriter, "write"),
            ("sample", "a picture", os, "replace"),
            ("sample", "the pictures", Job, "make"),
            ("train", "stage 1", GracefulStop, "on_train_batch_end"),
            ("train", "a file", os, "replace"),
        ]
        for name in sorted({moment[0] for moment in moments} - self.whole.keys()):
            self.reference(name)
        for i in range(count):
            (name, where, owner, function), number = moments[i % len(moments)], SIGNALS[(i // len(moments)) % len(SIGNALS)]
            run, mark = self.fresh(name), self.out / "mark"
            mark.unlink(missing_ok=True)

            def sent(number: int = number, mark: Path = mark) -> None:
                mark.write_text(repr(time.monotonic()))
                os.kill(os.getpid(), number)

            child = start(
                self.kinds[name].command(run), self.out / "log.txt", both(environment(name), at_call(2 + i % 3, owner, function, sent))
            )
            status, row = child.wait(), f"{number.name} in {name}"
            took = time.monotonic() - float(mark.read_text()) if mark.is_file() else float("nan")
            self.slowest[row] = max(took, self.slowest.get(row, 0.0))
            problem = None if status == 128 + number else f"in {where} it ends with {status}"
            problem = problem if mark.is_file() else "the moment never came, which is a fault of the campaign"
            if problem is None and took > SOON:
                problem = f"in {where} it takes {took:.1f} s"
            self.note(row, problem or self.damaged(name, run) or self.goes_on(name, run))

    def disk(self, count: int) -> None:
        names = ["stage1", "stage2", "encode", "sample", "train"]
        for name in [name for name in names if name not in self.whole]:
            self.reference(name)
        for i in range(count):
            name, way = (
                names[i % len(names)],
                ("a limit on files", "a full disk", "a vanished folder", "a full disk")[(i // len(names)) % 4],
            )
            run = self.fresh(name)
            if way == "a limit on files":
                size = self.draw.choice((30_000, 100_000, 300_000))  # more than what is said, which goes into a file, too

                def prepare(size: int = size) -> None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

            elif way == "a full disk":

                def full() -> None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                prepare = at_call(self.draw.randint(1, 9), files, "sync", full)
            else:
                prepare = at_call(self.draw.randint(2, 6), files, "sync", lambda run=run: shutil.rmtree(run, ignore_errors=True))
            log = self.out / "disk.txt"
            log.unlink(missing_ok=True)
            status = start(self.kinds[name].command(run), log, both(environment(name), prepare)).wait()
            said = log.read_text(errors="replace")
            problem = f"status {status}" if status not in (0, 1) else None
            problem = "a traceback" if "Traceback" in said or "fault of ldm" in said else problem
            if way == "a vanished folder":  # nothing is left to go on from
                shutil.rmtree(run, ignore_errors=True)
            problem = f"left over: {left}" if (left := left_over(run)) else problem
            self.note(f"{way}, {name}", problem or self.damaged(name, run) or self.goes_on(name, run))

    def twice(self) -> None:
        for name in ("stage1", "stage2", "encode", "sample", "train"):
            if name not in self.whole:
                self.reference(name)
            run = self.fresh(name)
            first = start(self.kinds[name].command(run), self.out / "log.txt", environment(name))
            time.sleep(self.lasts[name] * 0.4)
            second = start(self.kinds[name].command(run), self.out / "log.txt", environment(name))
            statuses = [second.wait(), first.wait()]
            allowed = ([1, 0], [0, 0])  # refused, or both come to the end
            problem = None if statuses in allowed else f"statuses {statuses}"
            self.note(f"two at once, {name}", problem or self.goes_on(name, run))

    def ranks(self, count: int) -> None:
        """Two processes that train stage 1 together."""
        script, log = self.out / "two.py", self.out / "ranks.txt"
        script.write_text(TWO)
        kind = self.kinds["two ranks"] = self.kinds["stage1"]

        def begin(run: Path, fault: int = -1) -> subprocess.Popen[bytes]:
            command = [sys.executable, str(script), *kind.command(run), "--trainer.devices=2", "--trainer.strategy=ddp"]
            plain = {name: value for name, value in os.environ.items() if name != "LDM_SHORTEN"}
            with log.open("a") as file:
                file.write(f"$ {' '.join(command)}\n")
                file.flush()
                return subprocess.Popen(command, stdout=file, stderr=file, env={**plain, "FAULT": str(fault)}, start_new_session=True)

        reference = self.fresh("whole with two ranks")
        if begin(reference).wait(LIMIT):
            raise SystemExit(f"an uninterrupted training of two ranks failed: see {log}")
        self.whole["two ranks"] = kind.result(reference)
        ways = ("SIGTERM to the first", "SIGINT to both", "the second is killed", "the first is killed", "a fault of the second")
        for i in range(count):
            way, run = ways[i % len(ways)], self.fresh("two ranks")
            first = begin(run, self.draw.randint(EVERY + 1, STEPS - 1) if way == "a fault of the second" else -1)
            while not list(run.glob("autoencoder/checkpoints/*.ckpt")) and first.poll() is None:
                time.sleep(0.01)
            second = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[-1])
            if way == "a fault of the second":
                while Path(f"/proc/{second}/stat").exists() and Path(f"/proc/{second}/stat").read_text().split()[2] != "Z":
                    time.sleep(0.01)
            else:
                time.sleep(self.draw.uniform(0, 1))
            began, row = time.monotonic(), f"two ranks, {way}"
            if way == "SIGTERM to the first":
                first.terminate()
            elif way == "SIGINT to both":
                os.killpg(first.pid, signal.SIGINT)
            elif "killed" in way:
                os.kill(second if way == "the second is killed" else first.pid, signal.SIGKILL)
            status = first.wait(LIMIT)
            while Path(f"/proc/{second}").exists() and time.monotonic() < began + 2 * TOGETHER:
                time.sleep(0.01)
            took = time.monotonic() - began
            self.slowest[row] = max(took, self.slowest.get(row, 0.0))
            wanted = {ways[0]: 128 + signal.SIGTERM, ways[1]: 128 + signal.SIGINT, ways[3]: -signal.SIGKILL}.get(way, 1)
            problem = None if status == wanted else f"it ends with {status}"
            problem = f"it takes {took:.1f} s" if took > TOGETHER else problem
            problem = problem or self.damaged("two ranks", run)
            self.note(row, problem or self.goes_on("two ranks", run, lambda run: begin(run).wait(LIMIT)))

    def table(self) -> str:
        rows = ["| what | tries | wrong | slowest end |", "|---|---|---|---|"]
        for row, tries in self.tries.items():
            slowest = f"{self.slowest[row]:.2f} s" if row in self.slowest else ""
            rows.append(f"| {row} | {tries} | {len(self.wrong.get(row, []))} | {slowest} |")
        return "\n".join([*rows, "", *(f"{row}: {problem}" for row, found in self.wrong.items() for problem in found)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=40)
    parser.add_argument("--disk", type=int, default=20)
    parser.add_argument("--twice", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["stage1", "stage2", "encode", "sample", "train"], help="kinds that are killed")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    registry.load()
    campaign = Campaign(chosen.out, chosen.seed)
    if chosen.kills:
        campaign.kills(chosen.kills, chosen.only)
    if chosen.signals:
        campaign.signals(chosen.signals)
    if chosen.disk:
        campaign.disk(chosen.disk)
    for _ in range(chosen.twice):
        campaign.twice()
    if chosen.ranks:
        campaign.ranks(chosen.ranks)
    print(campaign.table())
    sys.exit(bool(campaign.wrong))
