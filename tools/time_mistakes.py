"""How long a mistake on the command line takes until its sentence is there: rows of tests/mistakes.txt, each in a process of its own.

    python tools/time_mistakes.py [--every 5]

Prints how many took less than 1 s, less than 5 s and more, the median and the slowest; one thread.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_mistakes import ROWS, STAGES, things

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only each so manieth row")
    chosen = parser.parse_args()
    seconds = dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        things(Path(folder))
        for row, _ in ROWS[:: chosen.every]:
            known = {name: text.format(tmp=folder) for name, text in STAGES.items()}
            words = shlex.split(row.format(tmp=folder, pictures=f"{folder}/pictures", **known))
            began = time.monotonic()
            command = [sys.executable, "-m", "ldm", *words]
            subprocess.run(command, cwd=folder, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            seconds[row] = time.monotonic() - began
    fast, middling = sum(each < 1 for each in seconds.values()), sum(1 <= each < 5 for each in seconds.values())
    slowest = sorted(seconds, key=seconds.__getitem__)[-3:]
    print(f"{len(seconds)} mistakes: {fast} in less than 1 s, {middling} in 1 to 5 s, {len(seconds) - fast - middling} in more")
    print(f"median {median(seconds.values()):.2f} s; slowest: {', '.join(f'{row} ({seconds[row]:.1f} s)' for row in slowest)}")
