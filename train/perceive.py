"""Teaches the small model's vision encoder first: what each slice of a clip shows, read linearly from any of its tokens.

Behind a language model that can't read yet, the encoder learns nothing for tens of thousands of clips; alone it needs a
few thousand. Every token must tell the whole of its slice, so that the language model needs to look at one only. The
linear map is thrown away, and the features are brought to the size of the words' embeddings, beside which they will stand.

python -m train.perceive runs/lookup/best runs/start
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine import worlds
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.worlds import WorldsSource, frames
from engine.folders import as_a_whole
from engine.layout import Frames

STEPS = 4  # of every clip


class Clips(Dataset):
    """Training clips of equal length, with what their slices show: the start, and then an event each."""

    def __getitem__(self, index: int) -> tuple[Frames, list[str]]:
        record = WorldsSource(difficulties=(STEPS, STEPS)).record(index)
        return frames(record), told(record)


def told(record: worlds.Record) -> list[str]:
    """The start and the events without their outcomes; the last line, which names the option, is none."""
    return [step.text.partition(",")[0] for step in record.steps[:-1]]


def vocabulary(clips: int = 3000) -> dict[str, int]:
    """Every start and event that the worlds know, by the order in which they first come up."""
    records = (WorldsSource(difficulties=(STEPS, STEPS)).record(index) for index in range(clips))
    return {text: place for place, text in enumerate(dict.fromkeys(text for r in records for text in told(r)))}


@torch.no_grad()
def as_large_as_words(backbone: Qwen25VL, features: Tensor) -> None:
    """Scales the last layer of the encoder, so that `features` become as large as the words' embeddings."""
    words = backbone.model.get_input_embeddings().weight
    last = backbone.model.model.visual.merger.mlp[-1]
    ratio = words.square().mean().sqrt() / features.square().mean().sqrt()
    last.weight *= ratio
    last.bias *= ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("init", help="folder of the model to start from")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw clips")
    options = parser.parse_args()

    torch.manual_seed(0)
    backbone = Qwen25VL.load(options.init)
    known = vocabulary()
    read = nn.Linear(backbone.text_config.hidden_size, len(known))
    trained = [*backbone.model.model.visual.parameters(), *read.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    loader = DataLoader(
        Clips(), options.batch, sampler=range(options.steps * options.batch), collate_fn=list,
        num_workers=options.workers,
    )  # fmt: skip
    bar = tqdm(loader, desc="perceive")
    for clips in bar:
        cut = [backbone.cut(clip) for clip, _ in clips]
        features = backbone.encode_patches(torch.cat([v.patches for v in cut]), [v.grid for v in cut])
        slices = features.unflatten(0, (len(clips), cut[0].grid[0], -1))[:, : STEPS + 1]  # [batch, slices, tokens, dim]
        wanted = torch.tensor([[known[text] for text in texts] for _, texts in clips])
        logits = read(slices)
        each = wanted[:, :, None].expand(logits.shape[:-1])
        loss = F.cross_entropy(logits.flatten(0, 2), each.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(right=float((logits.argmax(-1) == each).float().mean()))
    as_large_as_words(backbone, features)
    backbone.model.bfloat16()  # as it is shipped
    with as_a_whole(Path(options.out)) as made:
        backbone.save(made)


if __name__ == "__main__":
    main()
