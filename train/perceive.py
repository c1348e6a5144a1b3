"""Teaches the small model's vision encoder first: what happens in a clip of one step, read linearly from its features.

Behind a language model that can't read yet, the encoder learns nothing for tens of thousands of clips; alone it needs a
few thousand. The linear map is thrown away.

python -m train.perceive runs/lookup/best runs/perceive
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine import worlds
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.worlds import WorldsSource, visual
from engine.layout import Visual


class Moments(Dataset):
    """Clips of one step with what is to be read off them: the text of the start, and of the event without its outcome."""

    def __getitem__(self, index: int) -> tuple[Visual, tuple[str, str]]:
        record = WorldsSource(difficulties=(1, 1)).record(index)
        return visual(record), told(record)


def told(record: worlds.Record) -> tuple[str, str]:
    start, event = record.steps[0].text, record.steps[1].text
    return start, event.partition(",")[0]


def vocabulary(clips: int = 3000) -> tuple[dict[str, int], dict[str, int]]:
    """Every start and every event that the worlds know, by the order in which they first come up."""
    found = [told(WorldsSource(difficulties=(1, 1)).record(i)) for i in range(clips)]
    starts, events = ({text: i for i, text in enumerate(dict.fromkeys(texts))} for texts in zip(*found, strict=True))
    return starts, events


def batches(steps: int, size: int, workers: int) -> Iterator[list[tuple[Visual, tuple[str, str]]]]:
    loader = DataLoader(Moments(), size, sampler=range(steps * size), collate_fn=list, num_workers=workers)
    return iter(loader)


def accuracy(logits: Tensor, wanted: Tensor) -> float:
    return float((logits.argmax(-1) == wanted).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("init", help="folder of the model to start from")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw clips")
    options = parser.parse_args()

    torch.manual_seed(0)
    backbone = Qwen25VL.load(options.init)
    starts, events = vocabulary()
    first = Moments()[0][0]
    width = backbone.encode_patches(first.patches, (first.grid,)).numel()  # every clip of one step is as long
    read_start, read_event = nn.Linear(width, len(starts)), nn.Linear(width, len(events))
    trained = [*backbone.model.model.visual.parameters(), *read_start.parameters(), *read_event.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    bar = tqdm(batches(options.steps, options.batch, options.workers), total=options.steps, desc="perceive")
    for batch in bar:
        patches, grids = torch.cat([clip.patches for clip, _ in batch]), tuple(clip.grid for clip, _ in batch)
        features = backbone.encode_patches(patches, grids).reshape(len(batch), -1)  # [batch, tokens * dim]
        start = torch.tensor([starts[text] for _, (text, _) in batch])
        event = torch.tensor([events[text] for _, (_, text) in batch])
        start_logits, event_logits = read_start(features), read_event(features)
        loss = F.cross_entropy(start_logits, start) + F.cross_entropy(event_logits, event)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(start=accuracy(start_logits, start), event=accuracy(event_logits, event))
    backbone.save(options.out)


if __name__ == "__main__":
    main()
