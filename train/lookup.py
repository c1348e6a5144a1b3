"""Warms up a fresh small model on finding an option's letter, in text alone.

python -m train.lookup --config train/configs/small/lookup.yaml
"""

import sys

from engine.methods.lookup import Lookup
from train.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, Lookup))
