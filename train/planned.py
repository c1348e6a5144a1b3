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
from engine.data.files import FileSource, NoFile
from engine.data.media import FilmedSource, PicturedSource
from engine.data.samples import Dialect, Sample, looked_at
from engine.footage import Footage
from engine.layout import Frames, Seen, pack
from engine.methods.heima import Heima, Interpreters
from engine.methods.method import Method
from engine.plan import CARDS, CHARACTERS, largest_frames, outline, outlined_companions, plan, table
from engine.training import expect_fitting, expect_sound

if TYPE_CHECKING:
    from train.command import Asked, Run, Source

QUESTION, CHAIN, ANSWER, STEPS = 60, 240, 4, 4  # tokens of the assumed sample, and its steps
TRIED = 32  # samples of the data
SIDE = 28  # a frame's sides are multiples of this


def words(tokens: int) -> str:
    return "x" * (CHARACTERS * tokens)


def assumed(run: Run, method: Method, sighted: bool) -> Sample:
    """A sample that is as large as the configuration lets it be, with texts of an assumed length. sighted: the model takes
    clips."""
    source, visual = run.source, None
    if sighted and isinstance(source, FilmedSource | PicturedSource):
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
    """Samples of the data, fewer or none where it isn't there. Errors: ConfigError for a row that can't be used."""
    samples: list[Sample] = []
    try:
        for index in range(min(TRIED, run.training.batch)):
            samples.append(looked_at(run.source(index), opened))
    except ConfigError:
        if not absent(run.source):
            raise
        return []
    except (VideoError, OSError):
        return []
    return samples


def absent(source: Source) -> bool:
    """Whether the data's file isn't there, or else clips and images that it names, and nothing else is wrong with it."""
    if not isinstance(source, FileSource) or not source.path.is_file():
        return isinstance(source, FileSource)
    kinds = {type(each) for *_, each in source.each()}
    return NoFile in kinds and kinds <= {NoFile, Sample}


def opened(shown: Seen) -> Seen:
    return shown.opened() if isinstance(shown, Footage) else shown


def show(run: Run, method: Method, asked: Asked, say: Callable[[str], None] = print) -> None:
    """Errors: ConfigError for a model whose shape isn't known, for a card, and for data that is there and can't be used."""
    if asked.card not in CARDS:
        raise ConfigError(f"card {asked.card}: choose one of {', '.join(CARDS)}.")
    config = replace(run.training, init=asked.shape or run.training.init)
    if isinstance(method, Interpreters):  # each as large as Heima's own language model
        method = replace(method, interpreter="")
    backbone = outline(config.init, method)
    samples = found(run)
    told = f"samples      {len(samples)} of the data"
    if not samples:
        samples = [assumed(run, method, backbone.sighted)]
        told = f"samples      assumed: {QUESTION} tokens asked, {CHAIN} of chain, {ANSWER} of answer"
        told += ", the largest clip allowed" * bool(samples[0].visuals)
    samples = [looked_at(sample, backbone.see) for sample in samples]
    expect_sound(config)
    expect_fitting(config, method, run.lora)
    size = config.batch // config.accumulate
    chosen = (samples * math.ceil(size / len(samples)))[:size]
    layouts = [method.layout(sample, np.random.default_rng(i), LAST) for i, sample in enumerate(chosen)]
    passed = pack(layouts, backbone.encode, backbone.pad)
    companions = outlined_companions(backbone, method)
    made = plan(config, method, run.lora, backbone, companions, passed)
    say(told)
    say(table(made, asked.card, asked.share))
