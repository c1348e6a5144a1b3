"""What the worlds' questions give away without their clips as they move: the explicit control, trained alike on less.

    python -m train.baselines --out runs/baselines      # all four, one after another

Each is shown, in training and in the test: nothing, the last frame, one frame at random, the frames in random order. If the
worlds ask for what happens over time, none comes far above chance.
"""

import json
import sys
from pathlib import Path

from engine.benchmark import WRITTEN, Benchmark, measure
from train.small import CONFIGS, EXPECTED, MODELS, START, arguments, workshop

SHOWN = ("blind", "last", "single", "shuffled")
SCORES = EXPECTED.with_name("baselines.json")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--shown", nargs="+", choices=SHOWN, default=list(SHOWN), help="which (default: all)")
    options = parser.parse_args()
    at, (script, stages) = workshop(options), MODELS["explicit"]

    def trained(shown: str) -> Path:
        more = (CONFIGS / "explicit.yaml", "--set", f"worlds.corrupt={shown}")
        return at.stages(script, shown, START, stages, *more) / "best"

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
