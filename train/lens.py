"""Trains a model's tuned lens: one affine map a layer, so that what every layer holds can be read in the model's own words.

The model is held fast; its states come from the training worlds, laid out as its method trains. The lens is saved beside it,
and what is printed is the mean distance (nats) of each layer from the model's last, at the slots of validation clips.

python -m train.lens assets/small/pause --steps 400
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import generate
from engine.curriculum import LAST
from engine.data.worlds import WorldsSource
from engine.insight.lens import TunedLens, divergence, logits, loss
from engine.layout import pack
from engine.methods.method import run
from engine.models import Model, load


@torch.no_grad()
def states(model: Model, step: int, clips: int, rows: int, seed: int) -> Tensor:
    """Of a step's clips, at `rows` tokens drawn among those that show no picture: [layers + 1, rows, dim]."""
    source, backbone = WorldsSource(seed=seed), model.backbone
    layouts = [
        model.method.layout(source(i), np.random.default_rng([seed, i, 1]), LAST)
        for i in range(step * clips, (step + 1) * clips)
    ]
    packed = pack(layouts, backbone.encode, backbone.pad).to(backbone.device)
    hidden = run(backbone, packed, model.method.feedback(model.companions), model.companions).hidden
    words = packed.node >= 0
    words[packed.visual_sample, packed.visual_row] = False
    sample, row = words.nonzero().unbind(1)
    drawn = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed + step))[:rows].to(row.device)
    return torch.stack([layer[sample[drawn], row[drawn]] for layer in hidden]).float()


@torch.no_grad()
def distances(model: Model, lens: TunedLens, clips: int) -> dict[str, list[float]]:
    """Mean divergence of each layer from the last, at the slots of validation clips, by the plain and the tuned lens."""
    source = WorldsSource(split="validation")
    thinking = model.method.thinking(model.method.trained_slots)
    samples, feedback = [source(i) for i in range(clips)], model.method.feedback(model.companions)
    thoughts = generate.think(model.backbone, samples, thinking, feedback, model.method.context)
    kinds: dict[str, TunedLens | None] = {"plain": None, "tuned": lens}
    return {
        name: divergence(logits(model.backbone, thoughts.states, kind)).mean((1, 2)).tolist()
        for name, kind in kinds.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model; the lens is written into it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--clips", type=int, default=16, help="clips a step")
    parser.add_argument("--rows", type=int, default=512, help="tokens a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    options = parser.parse_args(argv)
    try:
        if not Path(options.model).is_dir():
            raise ValueError(f"There is no folder {options.model} to write the lens into.")
        model = load(options.model, device=options.device)
        if not model.method.silent or not model.method.trained_slots:
            raise ValueError(f"{options.model} has no slots that a lens could be held to.")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    lens = TunedLens(model.layers, model.backbone.text_config.hidden_size).to(model.backbone.device)
    model.backbone.model.requires_grad_(False)
    optimizer = torch.optim.Adam(lens.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(options.steps, 1))
    for step in (bar := tqdm(range(options.steps), desc="lens")):
        lowered = loss(model.backbone, lens, states(model, step, options.clips, options.rows, options.seed))
        optimizer.zero_grad()
        lowered.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(nats=f"{float(lowered.detach()):.3f}")
    lens.save(options.model)
    print(json.dumps(distances(model, lens, 60)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
