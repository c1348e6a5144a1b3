"""Trains the explicit control: the chain of thought written out, then the answer.

python -m train.explicit --config train/configs/small/short.yaml train/configs/small/explicit.yaml --out runs/explicit/short
"""

import sys

from engine.methods.controls import Explicit
from train.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, Explicit))
