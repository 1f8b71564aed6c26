"""ldm watermark check: whether pictures have the watermark of `ldm sample`."""

from pathlib import Path

from ldm.data.decode import read_pixels
from ldm.errors import UserError
from ldm.sampling.watermark import BITS, check

USAGE = """usage: ldm watermark check IMAGE [IMAGE ...]

Says of each picture whether it has the watermark of `ldm sample`; the exit status is 0 if all have it, 3 if not."""


def main(command: str, arguments: list[str]) -> int:
    if arguments[:1] != ["check"] or len(arguments) < 2:
        if "--help" not in arguments and "-h" not in arguments:
            raise UserError("give pictures to look at: ldm watermark check IMAGE [IMAGE ...]")
        print(USAGE)
        return 0
    results = []
    for path in arguments[1:]:
        found = check(read_pixels(Path(path)))
        result = f"watermark of ldm, {found.right} of {len(BITS)} bits" if found.marked else "no watermark"
        print(f"{path}: {result} (score {found.score:.2f})")
        results.append(found.marked)
    return 0 if all(results) else 3
