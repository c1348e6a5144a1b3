"""Trains any method of engine/methods by the name of its file (and its class, where a file holds several).

python -m train pause --config train/configs/small/pause.yaml
python -m train controls.Silent --config train/configs/small/filler.yaml
"""

import sys

from engine.config import ConfigError
from engine.methods import find
from train.command import main


def run(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        print(__doc__)
        return 0 if words else 2
    try:
        method = find(words[0])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return main(__doc__, method, words[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
