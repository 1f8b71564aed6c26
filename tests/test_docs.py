"""The documentation: its commands and programs run as they stand there, its links lead somewhere, it says what there is.

Each page runs in a folder of its own, block by block, with LDM_SHORTEN=2: two steps, two pictures, on a CPU.
Files that the text calls PICTURES, MASK, ... are there under these names.  Lines of make, pip and docker are only
looked at: do their targets, extras and files exist?  Comments in a page say what differs:

    <!-- not run: REASON -->   the next block cannot run here; its options are read all the same
    <!-- slow: REASON -->      the next block runs with -m slow only; else its options are read
    <!-- file: NAME -->        the next block is the content of a file that later blocks use
"""

import json
import re
import runpy
import shlex
import shutil
import sys
import traceback
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import COMMANDS, main
from ldm.data.images import EmojiImages
from ldm.data.transforms import as_image
from ldm.sampling.watermark import mark

ROOT = Path(__file__).parent.parent
README, SAMPLING = ROOT / "README.md", ROOT / "docs" / "sampling.md"
RUN = [README, *sorted((ROOT / "docs").glob("*.md"))]  # pages whose blocks run
PAGES = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
WORDS = 1300  # of the README at most

# All that cannot run here, and why.
NOT_RUN = {
    "needs several GPUs",
    "needs a GPU",
    "downloads the weights of VGG16 (528 MB)",
    "hours on one core",
}
SLOW = {"networks for 256 px: minutes on one core"}

TRAINING = ("fit", "validate", "test", "encode")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
CONTINUED = re.compile(r"\\\n\s*")
COMMENT = re.compile(r"<!-- (not run|slow|file): *(.*?) *-->")
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
IN_REPOSITORY = re.compile(r"(?:ldm|configs|tools|tests|docs|docker)/[\w./-]*")
FOLDERS = "|".join(path.name for path in (ROOT / "configs").iterdir())
CONFIG = re.compile(rf"(?:{FOLDERS})/[\w-]+\.yaml")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    line: int  # of its first line in the page
    note: tuple[str, str] | None  # ("not run" | "slow" | "file", what it says)


def blocks(page: Path) -> list[Block]:
    """Fenced blocks in the order of the page, each with the comment right above it."""
    text, found = page.read_text(encoding="utf-8"), list[Block]()
    assert text.count("\n```") % 2 == 0, f"{page.name} has a block without an end"
    for match in FENCED.finditer(text):
        language, body = match.groups()
        above = text[: match.start()].rstrip().rpartition("\n")[2]
        note = COMMENT.fullmatch(above.strip())
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(language, body, line, (note[1], note[2]) if note else None))
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a block of shell, as a shell would split them."""
    lines = [line for text in CONTINUED.sub(" ", block.text).splitlines() for line in text.split(" && ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def notes(kind: str) -> list[tuple[str, str]]:
    """(page and line, reason) of all blocks with a comment of this kind."""
    return [(f"{page.name}:{block.line}", block.note[1]) for page in RUN for block in blocks(page) if block.note and block.note[0] == kind]


def text_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


# --- what the text calls PICTURES, MASK, ...


def photos(folder: Path, with_texts: bool) -> None:
    """Two classes of 12 small JPEGs; with_texts: a metadata.jsonl beside them."""
    generator, rows = np.random.default_rng(0), []
    for i in range(24):
        name, path = ("cats" if i % 2 else "dogs"), folder / ("cats" if i % 2 else "dogs") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((48, 40)).save(path)
        row = {"file_name": f"{name}/{i}.jpg", "label": name, "text": f"{name} on grass", "age": i, "dose": i / 10}
        rows.append(json.dumps(row))
    if with_texts:
        (folder / "metadata.jsonl").write_text("\n".join(rows))


def maps(folder: Path) -> None:
    """A map for each of the photos."""
    for i in range(24):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (i, 0, 0)).save(path)


def films(folder: Path, emoji: EmojiImages) -> None:
    """Small GIFs of 8 frames."""
    folder.mkdir()
    for i in range(4):
        turned = [as_image(emoji.pixels(40 + i)).rotate(5 * k, fillcolor="white") for k in range(8)]
        turned[0].save(folder / f"{i}.gif", save_all=True, append_images=turned[1:])


def frames(folder: Path, emoji: EmojiImages) -> None:
    """A film as a folder of frames."""
    folder.mkdir()
    for k in range(8):
        as_image(emoji.pixels(40)).rotate(5 * k, fillcolor="white").save(folder / f"{k}.png")


def slices(folder: Path) -> None:
    """Grey images of 16 bits."""
    folder.mkdir()
    for i in range(6):
        values = np.random.default_rng(i).integers(0, 4096, (64, 64)).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{i}.png")


def volumes(folder: Path) -> None:
    """Densities of 8 slices, as one array."""
    folder.mkdir()
    np.save(folder / "density.npy", np.random.default_rng(0).random((24, 1, 8, 32, 32), dtype=np.float32))


def sounds(folder: Path) -> None:
    """WAV files of a second."""
    folder.mkdir()
    for i in range(4):
        samples = (8000 * np.sin(np.arange(16000) * 0.1 * (i + 1))).astype("<i2")
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(samples.tobytes())


def autoencoder_of_diffusers(folder: Path) -> None:
    """A tiny AutoencoderKL as diffusers saves it."""
    from diffusers import AutoencoderKL

    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=(32, 32)).save_pretrained(folder)


def picture(path: Path, pixels: torch.Tensor, marked: bool = False) -> None:
    """A PNG file without a suffix; marked: with the watermark."""
    as_image(mark(pixels) if marked else pixels).save(path, format="PNG")


def mask(path: Path) -> None:
    """The lower half is white."""
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[32:] = 255
    Image.fromarray(pixels).save(path, format="PNG")


def prepare(folder: Path, page: Path) -> None:
    """What the page names in capitals."""
    emoji, text = EmojiImages(), page.read_text(encoding="utf-8")
    makers: dict[str, Callable[[Path], Any]] = {
        "PICTURES": lambda path: photos(path, "metadata" in text),
        "MAPS": maps,
        "SLICES": slices,
        "SOUNDS": sounds,
        "VOLUMES": volumes,
        "FILMS": lambda path: films(path, emoji),
        "FILM": lambda path: frames(path, emoji),
        "VAE": autoencoder_of_diffusers,
        "MASK": mask,
        "MODEL": lambda path: shutil.copytree(ROOT / "ldm" / "models" / "emoji", path),
        "SMALL": lambda path: picture(path, EmojiImages(16).pixels(40)),
        "PICTURE": lambda path: picture(path, emoji.pixels(40), marked=page.name == "watermark.md"),
        "ONE": lambda path: picture(path, emoji.pixels(41)),
        "OTHER": lambda path: picture(path, emoji.pixels(900)),
    }
    for name, make in makers.items():
        if re.search(rf"\b{name}\b", text):
            make(folder / name)


# --- what is done with a line, by its first word


def ldm(words: list[str]) -> None:
    """Run a command of ldm in this process."""
    extra = ["--trainer.enable_model_summary=false"] if words[0] in TRAINING else []
    if words[0] in TRAINING and any(word.startswith("diffusion/") for word in words):
        extra.append("--model.sampling_steps=2")  # of the model, for `ldm ema`
    assert main([*words, *extra]) == 0


def only_read(words: list[str]) -> None:
    """Whether a command that does not run here has options and configs that exist."""
    shown = "--print_config" if words[0] in TRAINING else "--help"
    with pytest.raises(SystemExit, match="0"):
        sys.exit(main([*words, shown]))


def make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(words) <= set(targets)


def python(words: list[str]) -> None:
    """A tool: run if it takes seconds, else asked for its help, which must name the options."""
    if words[0] == "-m":
        assert find_spec(words[1]) is not None
        return
    path = ROOT / words[0]
    assert path.is_file()
    if "add_argument" not in path.read_text():
        return
    quick = path.name == "judge_digits.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *(words[1:] if quick else ["--help"])])
        patch.syspath_prepend(str(path.parent))
        if quick:
            runpy.run_path(str(path), run_name="__main__")
            return
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(path), run_name="__main__")
    options = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    named = set(re.findall(r"--[\w-]+", path.read_text()))
    assert options <= named, f"{path.name} has no {options - named}"


def pip(words: list[str]) -> None:
    """What is installed is an extra of ours, or a package that the Makefile or pyproject.toml name."""
    project = (ROOT / "pyproject.toml").read_text()
    assert words[0] == "install"
    for word in (word for word in words[1:] if not word.startswith("-")):
        name, _, extras = word.rstrip("]").partition("[")
        assert name in (".", "ldm") or name in project + (ROOT / "Makefile").read_text()
        for extra in filter(None, extras.split(",")):
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), f"there is no extra {extra}"


def docker(words: list[str]) -> None:
    """The files that it reads are there, and the command of ldm, if any, is one."""
    files = [after for before, after in pairwise(words) if before in ("--file", "-f")]
    assert all((ROOT / file).is_file() for file in files)
    if "ldm" in words[:-1] and words[0] == "run":
        assert words[words.index("ldm") + 1] in COMMANDS


def nothing(words: list[str]) -> None:
    """A word of the shell."""


HANDLERS: dict[str, Callable[[list[str]], None]] = {
    "ldm": ldm, "make": make, "python": python, "pip": pip, "docker": docker,
    **dict.fromkeys(("source", "mkdir", "git"), nothing),
}  # fmt: skip


def run_shell(block: Block, patch: pytest.MonkeyPatch, slow: bool) -> list[str]:
    """What went wrong, a line for each command."""
    wrong = []
    reads_only = block.note is not None and (block.note[0] == "not run" or (block.note[0] == "slow" and not slow))
    for words in commands(block):
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # NAME=VALUE ldm ...
            name, _, value = words.pop(0).partition("=")
            patch.setenv(name, value)
        assert words[0] in HANDLERS, f"nobody knows what {words[0]} does here"
        handler = only_read if words[0] == "ldm" and reads_only else HANDLERS[words[0]]
        try:
            handler(words[1:])
        except (Exception, pytest.fail.Exception) as error:
            traceback.print_exc()
            wrong.append(f"line {block.line}, `{shlex.join(words)}`: {type(error).__name__}: {error}")
    return wrong


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    exec(compile(block.text, f"<block in line {block.line}>", "exec"), namespace)


@pytest.fixture
def shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A folder to work in, two steps for everything, and no pictures at validations (tests/test_runs.py has them)."""
    from ldm.sampling.model import Model
    from ldm.stages.diffusion import DiffusionStage

    plan = Model.plan

    def short(self: Model, options: Any, *rest: Any) -> Any:
        steps = options.steps[:1] + options.steps[-1:] if isinstance(options.steps, list) else 2
        return plan(self, replace(options, steps=steps), *rest)

    threads = torch.get_num_threads()
    monkeypatch.setattr(Model, "plan", short)
    monkeypatch.setattr(DiffusionStage, "pictures", lambda stage, batch: {})
    monkeypatch.setattr("ldm.sampling.tasks.FINAL_ITERATIONS", 20)
    monkeypatch.setenv("LDM_SHORTEN", "2")
    monkeypatch.setenv("LDM_TRACEBACK", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    yield monkeypatch
    torch.set_num_threads(threads)


def run_page(page: Path, folder: Path, patch: pytest.MonkeyPatch, slow: bool = False) -> None:
    prepare(folder, page)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    wrong: list[str] = []
    for block in blocks(page):
        if block.note is not None and block.note[0] == "file":
            Path(block.note[1]).write_text(block.text)
        elif block.language == "sh":
            wrong += run_shell(block, patch, slow)
        elif block.language == "python":
            run_python(block, namespace)
    assert not wrong, "\n".join(wrong)


def slow_pages() -> list[Path]:
    return [page for page in RUN if any(block.note and block.note[0] == "slow" for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_says_to_run_runs(page: Path, tmp_path: Path, shortened: pytest.MonkeyPatch) -> None:
    run_page(page, tmp_path, shortened)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", slow_pages(), ids=lambda page: page.stem)
def test_what_takes_longer_runs_too(page: Path, tmp_path: Path, shortened: pytest.MonkeyPatch) -> None:
    run_page(page, tmp_path, shortened, slow=True)


def test_what_does_not_run_has_a_reason_that_is_listed_above() -> None:
    for kind, known in (("not run", NOT_RUN), ("slow", SLOW)):
        reasons = notes(kind)
        assert all(reason for _, reason in reasons), reasons
        assert {reason for _, reason in reasons} == known, reasons


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(text_of(page)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    for code in INLINE.findall(text_of(page)):
        for name in IN_REPOSITORY.findall(code) if IN_REPOSITORY.fullmatch(code.split()[-1]) else []:
            assert (ROOT / name).exists(), f"{page.name} names {name}"
        for name in CONFIG.findall(code):
            assert (ROOT / "configs" / name).is_file(), f"{page.name} names {name}"


def test_every_page_is_found_from_the_readme() -> None:
    targets = {target.partition("#")[0] for target in LINK.findall(text_of(README))}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= targets


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= WORDS


def test_the_map_of_the_readme_names_every_room() -> None:
    text = README.read_text(encoding="utf-8")
    rooms = [path for path in (ROOT / "ldm").iterdir() if path.name != "models" and (path / "__init__.py").is_file()]
    assert [room.name for room in rooms if f"`{room.name}/`" not in text] == []


def test_every_option_of_sample_is_explained() -> None:
    from ldm.commands.sample import OPTIONS

    text = SAMPLING.read_text(encoding="utf-8")
    options = [option.name for option in OPTIONS if option.help and option.name.startswith("--")]
    assert [name for name in options if not re.search(rf"{name}(?![\w-])", text)] == []
