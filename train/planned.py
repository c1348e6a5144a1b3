"""What `--plan` prints: what a run would cost, told before it is begun. No weights are read, and nothing is written.

Samples are the data's own where the data is there; otherwise one of an assumed length, with the largest clip that the
configuration allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from engine.config import ConfigError
from engine.container import VideoError
from engine.curriculum import LAST
from engine.data.media import FilmedSource, PicturedSource
from engine.data.samples import Dialect, Sample, looked_at
from engine.footage import Footage
from engine.layout import Frames, Seen, pack
from engine.methods.heima import Heima, Interpreters
from engine.methods.method import Method
from engine.plan import CARDS, CHARACTERS, largest_frames, outline, outlined_companions, plan, table
from engine.training import expect_sound

if TYPE_CHECKING:
    from train.command import Asked, Run

QUESTION, CHAIN, ANSWER, STEPS = 60, 240, 4, 4  # tokens of the assumed sample, and its steps
TRIED = 32  # samples of the data
SIDE = 28  # a frame's sides are multiples of this


def words(tokens: int) -> str:
    return "x" * (CHARACTERS * tokens)


def assumed(run: Run, method: Method) -> Sample:
    """A sample that is as large as the configuration lets it be, with texts of an assumed length."""
    source, visual = run.source, None
    if isinstance(source, FilmedSource | PicturedSource):
        count = source.frames[1] if isinstance(source, FilmedSource) else 1
        height, width = largest_frames(source.pixels, SIDE)
        pixels = np.zeros((count, height, width, 3), np.uint8)
        visual = Frames(pixels, 0.5, still=isinstance(source, PicturedSource))
    names = method.sections if isinstance(method, Heima) else ()
    steps = len(names) or (STEPS if visual is None else 1)
    chain = (words(CHAIN // steps),) * steps
    dialect: Dialect = "chat" if visual is not None else "plain"
    return Sample(visual, words(QUESTION), (), chain, words(ANSWER), "free-form", dialect, names)


def found(run: Run) -> list[Sample]:
    """Samples of the data, fewer or none where it isn't there."""
    samples: list[Sample] = []
    try:
        for index in range(min(TRIED, run.training.batch)):
            samples.append(looked_at(run.source(index), opened))
    except (ConfigError, VideoError, OSError):
        return []
    return samples


def opened(shown: Seen) -> Seen:
    return shown.opened() if isinstance(shown, Footage) else shown


def show(run: Run, method: Method, asked: Asked, say: Callable[[str], None] = print) -> None:
    """Errors: ConfigError for a model whose shape isn't known, or a card."""
    if asked.card not in CARDS:
        raise ConfigError(f"card {asked.card}: choose one of {', '.join(CARDS)}.")
    config = replace(run.training, init=asked.shape or run.training.init)
    if isinstance(method, Interpreters):  # each as large as Heima's own language model
        method = replace(method, interpreter="")
    backbone = outline(config.init, method)
    samples = found(run)
    told = f"samples      {len(samples)} of the data" if samples else (
        f"samples      assumed: {QUESTION} tokens asked, {CHAIN} of chain, {ANSWER} of answer, the largest clip allowed"
    )  # fmt: skip
    if not samples:
        samples = [assumed(run, method)]
    samples = [looked_at(sample, backbone.see) for sample in samples]
    expect_sound(config)
    size = config.batch // config.accumulate
    chosen = (samples * math.ceil(size / len(samples)))[:size]
    layouts = [method.layout(sample, np.random.default_rng(i), LAST) for i, sample in enumerate(chosen)]
    passed = pack(layouts, backbone.encode, backbone.pad)
    companions = outlined_companions(backbone, method)
    made = plan(config, method, run.lora, backbone, companions, passed)
    say(told)
    say(table(made, asked.card, asked.share))
