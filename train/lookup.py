"""Warms up a fresh small model on finding an option's letter, in text alone.

python -m train.lookup --config train/configs/small/lookup.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from engine.backbones.base import Backbone
from engine.data.samples import letter
from engine.layout import Layout, pack
from engine.methods.lookup import Lookup
from engine.methods.method import Method, run
from train.command import HeldOut, Run, held_out, main


def validation(config: Run, method: Method) -> HeldOut:
    """Nothing is decoded: what counts is which letters are predicted."""
    samples = held_out(config)
    layouts = [method.layout(sample, np.random.default_rng(i)) for i, sample in enumerate(samples)]

    def validate(backbone: Backbone, companions: nn.ModuleDict, epoch: int) -> dict[str, float]:
        return letters_right(backbone, layouts)

    return HeldOut(samples, validate)


@torch.no_grad()
def letters_right(backbone: Backbone, layouts: Sequence[Layout]) -> dict[str, float]:
    """The share of option letters that the look-up predicts from everything before them, written and silent."""
    whole = run(backbone, pack(layouts, backbone.encode, backbone.pad).to(backbone.device))
    out = whole.branch("look")
    letters = torch.tensor([backbone.text_ids(f" {letter(i)}")[0] for i in range(4)], device=backbone.device)
    asked = torch.isin(out.rows.target, letters)
    written = (out.logits().argmax(-1) == out.rows.target)[asked]
    silent = [whole.branch(name) for name in layouts[0].branches if name.startswith("silent")]
    said = [(b.logits().argmax(-1) == b.rows.target)[b.rows.name == b.rows.names.index("answer")] for b in silent]
    share = {"letters": float(written.float().mean()), "silent": float(torch.cat(said).float().mean())}
    return share | {"accuracy": min(share.values())}


if __name__ == "__main__":
    sys.exit(main(__doc__, Lookup, validated=validation))
