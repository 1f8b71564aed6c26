"""The report of a training: one page of HTML that holds everything."""

import base64
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ldm.files import write_atomically

WIDTH, HEIGHT, LEFT, TOP = 350, 180, 60, 10  # px of a curve's plot
SHOWN = ("train/loss", "val/psnr", "val/loss", "val/reconstruction")


@dataclass(frozen=True)
class Curve:
    """A metric over steps, as points of an SVG polyline."""

    name: str
    points: str
    low: str
    high: str
    last: int


def curves(stage: Path) -> list[Curve]:
    """The metrics that a stage's CSV log holds."""
    found = dict[str, dict[int, float]]()
    file = stage / "logs" / "metrics.csv"
    if file.is_file():
        with file.open(encoding="utf-8") as rows:
            for row in csv.DictReader(rows):
                for name in SHOWN:
                    if row.get(name):
                        found.setdefault(name, {})[int(row["step"])] = float(row[name])
    return [_curve(f"{stage.name}: {name}", values) for name, values in found.items() if len(values) > 1]


def _curve(name: str, values: Mapping[int, float]) -> Curve:
    steps = sorted(values)
    low, high = min(values.values()), max(values.values())
    span, last = (high - low) or 1.0, steps[-1]
    points = " ".join(f"{LEFT + WIDTH * step / max(1, last):.1f},{TOP + HEIGHT * (high - values[step]) / span:.1f}" for step in steps)
    return Curve(name, points, f"{low:.3g}", f"{high:.3g}", last)


def embedded(path: Path) -> str:
    """A PNG file as the address of an image in a page."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def write(path: Path, **facts: Any) -> None:
    """Write the page; everything in it is escaped."""
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    write_atomically(path, environment.from_string(template).render(**facts).encode())


def table(figures: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Names and values as text."""
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in figures.items()]
