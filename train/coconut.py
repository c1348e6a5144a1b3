"""Trains Coconut, and Multimodal CoCoNuT over clips: a curriculum of thoughts that are fed back.

python -m train.coconut --config train/configs/text/coconut.yaml
"""

import sys

from engine.methods.coconut import Coconut
from train.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, Coconut))
