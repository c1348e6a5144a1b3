"""Trains a silent control, answer loss only: with slots (filler), or without (answer-only).

python -m train.silent --config train/configs/small/short.yaml train/configs/small/filler.yaml --out runs/filler/short
python -m train.silent --config train/configs/small/short.yaml train/configs/small/answer_only.yaml --out runs/answer-only/short
"""

import sys

from engine.methods.controls import Silent
from train.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, Silent))
