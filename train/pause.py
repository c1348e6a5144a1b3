"""Trains Implicit-Video-Reasoning: pauses taught by a written chain.

python -m train.pause --config train/configs/small/short.yaml
"""

import sys

from engine.methods.pause import PauseDistillation
from train.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, PauseDistillation))
