"""Trains any method by name: by the script of this folder where there is one, else by its file in engine/methods (and its
class, where a file holds several).

python -m train pause --config train/configs/small/short.yaml
python -m train diversity --config train/configs/text/diversity.yaml
python -m train controls.Silent --config train/configs/small/short.yaml train/configs/small/filler.yaml --out runs/filler/short
"""

import runpy
import sys
from importlib.util import find_spec

from engine.config import ConfigError
from engine.methods import find
from train.command import main


def run(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        print(__doc__)
        return 0 if words else 2
    name, *rest = words
    if name.isidentifier() and find_spec(f"train.{name}"):
        sys.argv = words
        runpy.run_module(f"train.{name}", run_name="__main__", alter_sys=True)
        return 0
    try:
        method = find(name)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return main(__doc__, method, rest)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
