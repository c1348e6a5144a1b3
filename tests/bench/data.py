"""What one data worker delivers against what a training step consumes: above 1, one worker is enough. And a file's frames kept
from an earlier reading against decoding it anew."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from engine.batches import Batches
from engine.data.worlds import WorldsSource
from engine.footage import Footage
from engine.methods.method import run
from engine.methods.pause import PauseDistillation
from engine.video import Sampling
from tests.bench.measure import line, medians, untrained

CLIPS = 16
EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"


def bench() -> list[dict[str, Any]]:
    backbone, method, steps = untrained(), PauseDistillation(), count(1)
    backbone.model.train()
    batches = Batches(WorldsSource(), method, backbone, size=CLIPS, passes=1, seed=0)
    (packed,) = batches[0]

    def consumed() -> None:
        backbone.model.zero_grad(set_to_none=True)
        method.loss(run(backbone, packed))[0].backward()

    with tempfile.TemporaryDirectory() as folder:
        clips = [Footage(path, Sampling()) for path in sorted(EXAMPLES.glob("*.mp4"))]
        kept = [Footage(clip.path, clip.sampling, cache=folder, cache_bytes=2**30) for clip in clips]
        taken = medians(
            lambda: batches[next(steps)],  # as a worker does it: draw, lay out, cut, pack
            consumed,
            lambda: [backbone.see(clip) for clip in clips],
            lambda: [backbone.see(clip) for clip in kept],
            rounds=5,
        )
    counts = (CLIPS, CLIPS, len(clips), len(clips))
    drawn, trained, decoded, again = (seconds / count for seconds, count in zip(taken, counts, strict=True))
    unit = "seconds a clip"
    return [
        line("data", "worlds: training step over a worker", drawn, trained, None, unit, samples_per_second=1 / drawn),
        line("data", "shipped mp4 files: training step over a worker", decoded, trained, None, unit, samples_per_second=1 / decoded),
        line("data", "shipped mp4 files: decoded anew over kept frames", again, decoded, None, unit, samples_per_second=1 / again),
    ]  # fmt: skip
