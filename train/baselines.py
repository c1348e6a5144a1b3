"""What the worlds' questions give away without their clips as they move: the explicit control, which writes its chain and reads
whole clips nearly without a fault, learns on with less, and is tested on less.

    python -m train.baselines --out runs/baselines      # all four

Each is shown nothing, the last frame, one frame at random, or the frames in random order. If the worlds ask for what happens
over time, none comes far above chance.
"""

import json
import sys
from pathlib import Path

from engine.benchmark import WRITTEN, Benchmark, measure
from train.small import EXPECTED, arguments, workshop

SHOWN = ("blind", "last", "single", "shuffled")
SCORES = EXPECTED.with_name("baselines.json")
EXPLICIT = EXPECTED.with_name("explicit")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--shown", nargs="+", choices=SHOWN, default=list(SHOWN), help="which (default: all)")
    options = parser.parse_args()
    at = workshop(options)

    def trained(shown: str) -> Path:
        to = at.out / shown
        at.learn("explicit", "baseline", EXPLICIT, to, "--set", f"worlds.corrupt={shown}")
        return to / "best"

    found = json.loads(SCORES.read_text()) if SCORES.exists() else {}
    for shown, folder in zip(options.shown, at.side_by_side(trained, options.shown), strict=True):
        written = f"{folder}{WRITTEN}"
        found[shown] = measure(Benchmark("test", corrupt=shown), [written], None, "cpu", print)["methods"][written]
    print(json.dumps(found, indent=1))
    if options.write:
        SCORES.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
