"""Makes an untrained small model with its tokenizer: what the embedded runs start from.

python -m train.fresh runs/fresh                     # Qwen2.5-VL, for the video worlds
python -m train.fresh runs/gpt2 --family gpt2        # a language model, for the text worlds
"""

import argparse
from pathlib import Path
from typing import Literal

from engine.backbones import small
from engine.backbones.base import Backbone
from engine.data import text_worlds, worlds
from engine.folders import as_a_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--family", choices=("qwen2_5_vl", "gpt2", "llama"), default="qwen2_5_vl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    make(options.out, options.family, options.layers, options.hidden, options.seed)
    print(f"{options.out}: {options.family}, {options.layers} layers")


def make(out: str, family: Literal["qwen2_5_vl", "gpt2", "llama"], layers: int, hidden: int, seed: int = 0) -> None:
    """Writes an untrained model with its tokenizer to the folder `out`."""
    if family == "qwen2_5_vl":
        words = small.tokenizer(worlds.texts(), phrases=worlds.phrases())
        backbone: Backbone = small.fresh(words, seed, layers=layers, hidden=hidden)
    else:
        words = small.tokenizer(text_worlds.texts(), phrases=text_worlds.phrases())
        backbone = small.fresh_text(words, family, seed, layers=layers, hidden=hidden)
    with as_a_whole(Path(out)) as made:
        backbone.save(made)


if __name__ == "__main__":
    main()
