"""Trains CODI: projected thoughts, taught by the written chain at one position.

python -m train.codi --config train/configs/text/codi.yaml
"""

import sys

from engine.methods.codi import Codi
from train.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, Codi))
