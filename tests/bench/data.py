"""What one data worker delivers against what a training step consumes: above 1, one worker is enough. And a file read again
from the cache of decoded frames against one that is decoded."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from engine.backbones import small
from engine.data.worlds import WorldsSource, texts
from engine.layout import pack
from engine.methods.method import run
from engine.methods.pause import PauseDistillation
from engine.video import Sampling, read
from tests.bench.measure import line, medians

CLIPS = 16
EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"


def bench() -> list[dict[str, Any]]:
    backbone = small.fresh(small.tokenizer(texts(300)), layers=12)
    backbone.model.train()
    source, method, numbers = WorldsSource(), PauseDistillation(), count()
    made = [source(i) for i in range(CLIPS)]

    def delivered() -> None:
        """As a worker does it: draw, lay out, cut, pack."""
        rng = np.random.default_rng(0)
        pack([method.layout(source(next(numbers)), rng) for _ in range(CLIPS)], backbone.encode, backbone.pad)

    packed = pack([method.layout(sample, np.random.default_rng(0)) for sample in made], backbone.encode, backbone.pad)

    def consumed() -> None:
        backbone.model.zero_grad(set_to_none=True)
        method.loss(run(backbone, packed))[0].backward()

    def files() -> None:
        for path in sorted(EXAMPLES.glob("*.mp4")):
            read(path, Sampling())

    drawn, trained, opened = medians(delivered, consumed, files, rounds=5)
    clips = len(list(EXAMPLES.glob("*.mp4")))
    unit = "seconds a clip"
    return [
        line("data", "worlds: training step over a worker", drawn / CLIPS, trained / CLIPS, None, unit, samples_per_second=CLIPS / drawn),
        line("data", "shipped mp4 files: training step over a worker", opened / clips, trained / CLIPS, None, unit, samples_per_second=clips / opened),
    ]  # fmt: skip
