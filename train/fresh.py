"""Makes the untrained small model with its tokenizer: what the embedded runs start from.

python -m train.fresh runs/fresh
"""

import argparse

from engine.backbones import small
from engine.data.worlds import texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    model = small.fresh(small.tokenizer(texts()), options.seed, layers=options.layers, hidden=options.hidden)
    model.save(options.out)
    count = sum(p.numel() for p in model.model.parameters())
    print(f"{options.out}: {count / 1e6:.2f} M parameters, {len(model.tokenizer)} tokens")


if __name__ == "__main__":
    main()
