"""What `--plan` prints: what a run would cost, told before it is begun. No weights are read, and nothing is written.

Samples are the data's own where the data is there; otherwise one of an assumed length, with the clip or image that costs this
family most. Of a curriculum the stage is shown that needs most memory, and time is that of the steps of every stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from engine.backbones.base import Backbone
from engine.batches import epoch_of
from engine.config import ConfigError
from engine.container import VideoError
from engine.data.files import FileSource
from engine.data.media import FilmedSource, PicturedSource
from engine.data.samples import Dialect, Sample, looked_at
from engine.data.values import NoFile
from engine.footage import Footage
from engine.layout import Frames, Packed, Seen, pack
from engine.methods.heima import Heima, Interpreters
from engine.methods.method import Method
from engine.plan import CARDS, CHARACTERS, outline, outlined_companions, plan, table
from engine.recipe import Training, expect_fitting, expect_sound

if TYPE_CHECKING:
    from train.command import Asked, Run, Source

QUESTION, CHAIN, ANSWER, STEPS = 60, 240, 4, 4  # tokens of the assumed sample, and its steps
TRIED = 32  # samples of the data


def words(tokens: int) -> str:
    return "x" * (CHARACTERS * tokens)


def assumed(run: Run, method: Method, backbone: Backbone) -> Sample:
    """A sample that is as large as the configuration lets it be, with texts of an assumed length."""
    source, visual = run.source, None
    if backbone.sighted and isinstance(source, FilmedSource | PicturedSource):
        still = not isinstance(source, FilmedSource)
        count = source.frames[1] if isinstance(source, FilmedSource) else 1
        pixels = np.zeros((count, *backbone.costliest(source.pixels, still), 3), np.uint8)
        visual = Frames(pixels, 0.5, still)
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


def stages(config: Training, method: Method) -> list[tuple[int, int]]:
    """Of each stage of the curriculum that the run reaches on one GPU, its first epoch and how many steps it has."""
    firsts: list[tuple[int, int]] = []  # epoch, step
    for step in range(config.steps):
        epoch = epoch_of(step, config.batch, config.epoch)
        if not firsts or method.stage(epoch) != method.stage(firsts[-1][0]):
            firsts.append((epoch, step))
    ends = [step for _, step in firsts[1:]] + [config.steps]
    return [(epoch, end - step) for (epoch, step), end in zip(firsts, ends, strict=True)]


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
        samples = [assumed(run, method, backbone)]
        told = f"samples      assumed: {QUESTION} tokens asked, {CHAIN} of chain, {ANSWER} of answer"
        told += ", the largest clip allowed" * bool(samples[0].visuals)
    samples = [looked_at(sample, backbone.see) for sample in samples]
    expect_sound(config)
    expect_fitting(config, method, run.lora)
    size = config.batch // config.accumulate
    chosen = (samples * math.ceil(size / len(samples)))[:size]

    def passed(epoch: int) -> Packed:
        layouts = [method.layout(sample, np.random.default_rng(i), epoch) for i, sample in enumerate(chosen)]
        return pack(layouts, backbone.encode, backbone.pad)

    parts = stages(config, method)
    companions = outlined_companions(backbone, method)
    first = plan(config, method, run.lora, backbone, companions, passed(parts[0][0]))
    plans = [first, *(replace(first, passed=passed(epoch)) for epoch, _ in parts[1:])]
    most = max(range(len(plans)), key=lambda place: sum(plans[place].memory(1, False).values()))
    say(told)
    if len(plans) > 1:
        shown = method.stage(parts[most][0])
        say(f"curriculum   {len(plans)} stages, of which the one that needs most memory is below: stage {shown}")
    times = [
        steps * made.seconds(CARDS[asked.card], asked.share) for made, (_, steps) in zip(plans, parts, strict=True)
    ]
    say(table(plans[most], asked.card, asked.share, sum(times)))
