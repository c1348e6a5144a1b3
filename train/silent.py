"""Trains a silent control, answer loss only: with slots (filler), or without (answer-only).

python -m train.silent --config train/configs/small/filler.yaml
python -m train.silent --config train/configs/small/answer_only.yaml
"""

import sys

from engine.methods.controls import Silent
from train.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, Silent))
