"""Teaches a projector to say what a slice of a clip shows, in the embeddings of the language model's own words.

Behind a projector that says nothing yet, a language model learns to do without its eyes. Here the projector alone learns, each
of a slice's tokens one token of the event's words, which takes minutes: the tower stays as it is, so that each frame is looked
at once, and the worlds show few frames that differ. The language model is not even run.

python -m train.align runs/lite0/start runs/lite0/aligned
"""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from engine import worlds
from engine.backbones.llama_lite0 import LlamaLite0
from engine.data.worlds import WorldsSource, frames
from engine.folders import as_a_whole

STEPS = 4  # of every clip
NOTHING = "nothing more"  # what a clip shows after its last event


@dataclass(frozen=True)
class Looked:
    """Clips of equal length, their frames looked at."""

    maps: Tensor  # the tower's, of the frames that differ: bfloat16 [different, channels, height, width]
    frames: Tensor  # [clips, frames]: a clip's maps
    words: Tensor  # [clips, slices x tokens]: what its slices' tokens are to say

    def some(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """-> (maps of all their frames, ids)"""
        return self.maps[self.frames[clips].flatten()].float(), self.words[clips].flatten()


def told(record: worlds.Record) -> list[str]:
    """What the slices show: the start, the events without their outcomes, and the end."""
    return [*(step.text.partition(",")[0] for step in record.steps[:-1]), NOTHING]


def spelled(backbone: LlamaLite0, text: str) -> list[int]:
    """A text's tokens, as many as a slice has: the first of them, or as many line breaks behind them as it takes."""
    count = backbone.model.config.slice_tokens
    return (backbone.text_ids(text) + backbone.text_ids("\n") * count)[:count]


def looked(backbone: LlamaLite0, source: WorldsSource, clips: int) -> Looked:
    """The source's first clips."""
    maps: list[Tensor] = []
    known: dict[bytes, int] = {}
    rows, words = [], []
    for index in tqdm(range(clips), desc=f"look at {source.split}"):
        record = source.record(index)
        patches = backbone.cut(frames(record)).patches
        names = [hashlib.blake2b(patch.numpy().tobytes(), digest_size=16).digest() for patch in patches]
        if new := {name: place for place, name in enumerate(names) if name not in known}:
            maps.append(backbone.model.maps(backbone.pixels(patches[list(new.values())])).bfloat16())
            known |= {name: len(known) + number for number, name in enumerate(new)}
        rows.append([known[name] for name in names])
        words.append([token for text in told(record) for token in spelled(backbone, text)])
    return Looked(torch.cat(maps), torch.tensor(rows), torch.tensor(words))


@torch.no_grad()
def said_right(backbone: LlamaLite0, shown: Looked) -> float:
    """The share of slices all of whose tokens, of all words' embeddings, lie nearest to their own."""
    maps, words = shown.some(torch.arange(len(shown.frames)))
    table = backbone.model.get_input_embeddings().weight
    nearest = torch.cdist(backbone.model.model.vision_projector(maps), table).argmin(-1)
    right = (nearest == words).unflatten(0, (-1, backbone.model.config.slice_tokens)).all(-1)
    return float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("init", help="folder of the model to start from")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--families", nargs="+", default=["cups"])
    parser.add_argument("--clips", type=int, default=1500, help="to learn from")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="clips a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    backbone = LlamaLite0.load(options.init, tokens=())
    table = backbone.model.get_input_embeddings().weight.detach()
    projector = backbone.model.model.vision_projector
    source = WorldsSource(families=tuple(options.families), difficulties=(STEPS, STEPS))
    shown = looked(backbone, source, options.clips)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=options.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    bar = tqdm(range(options.steps), desc="align")
    for _ in bar:
        maps, words = shown.some(torch.randint(len(shown.frames), (options.batch,)))
        loss = F.mse_loss(projector(maps), table[words]) / table[words].var()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=float(loss.detach()))
    held_out = looked(backbone, WorldsSource("validation", source.families, source.difficulties), 60)
    print(f"Of held-out clips' slices, {said_right(backbone, held_out):.1%} are said right, word by word.")
    backbone.shorten()
    with as_a_whole(Path(options.out)) as made:
        backbone.save(made)


if __name__ == "__main__":
    main()
