"""Trains any method by name: by the script of this folder where there is one, else by its file in engine/methods (and its
class, where a file holds several).

python -m train pause --config train/configs/small/short.yaml
python -m train diversity --config train/configs/text/diversity.yaml
python -m train controls.Silent --config train/configs/small/short.yaml train/configs/small/filler.yaml --out runs/filler/short
"""

import runpy
import sys
from pathlib import Path

from engine.config import ConfigError
from engine.methods import find
from train.command import main


def scripts() -> list[str]:
    """The files of this folder that are run; what they share is only imported."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return [file.stem for file in files if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]


def run(words: list[str]) -> int:
    """Exit code 2 with one sentence for what is neither a script's name nor a method's."""
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    known = scripts()
    if not words or words[0].startswith("-"):
        print(f"Say first what to train: a method's file in engine/methods, or {', '.join(known)}.", file=sys.stderr)
        return 2
    name, *rest = words
    if name in known:
        sys.argv = words
        runpy.run_module(f"train.{name}", run_name="__main__", alter_sys=True)
        return 0
    try:
        method = find(name)
    except ConfigError as error:
        print(f"{error} The scripts are {', '.join(known)}.", file=sys.stderr)
        return 2
    return main(__doc__, method, rest)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
