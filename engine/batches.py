"""What one step of training is fed: samples decided by (seed, step) alone, packed in worker processes.

Clips that can't be read are told, and stop the run or are drawn anew. Knows neither optimizers nor folders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.backbones.base import Backbone
from engine.config import ConfigError
from engine.container import VideoError
from engine.curriculum import LAST
from engine.data.samples import Sample, ending, looked_at
from engine.layout import Layout, Packed, pack, packed_length, remembered
from engine.methods.method import Method

SPARES = 7  # clips that are tried in the place of one
BEYOND = 2**40  # the first index of those: further than any run comes


@dataclass(frozen=True)
class Unread:
    """A clip that couldn't be read, whose place in the round another has taken."""

    sample: int  # index
    why: str


@dataclass(frozen=True)
class Batches(Dataset):
    """The samples of one step, packed into `passes` forwards. Made in worker processes; the same on every machine.

    Samples are sorted by length before they are divided, so that little is padding. `spares`: where a clip can't be read,
    so many others are tried, and which they are is decided by the sample's index: a step has as many samples as any other.
    """

    source: Callable[[int], Sample]
    method: Method
    backbone: Backbone
    size: int
    passes: int
    seed: int
    epoch: int = 0
    rank: int = 0
    ranks: int = 1
    spares: int = 0

    def __getitem__(self, step: int) -> list[Packed]:
        return self.made(step)[0]

    def made(self, step: int) -> tuple[list[Packed], list[Unread]]:
        """The passes, and which samples others stand in for. Errors: VideoError for a clip, and its spares, that can't be read;
        ConfigError for a sample that is longer than the model's positions."""
        first = (step * self.ranks + self.rank) * self.size
        indices = range(first, first + self.size)
        epoch = epoch_of(step, self.size * self.ranks, self.epoch)
        unread: list[Unread] = []
        samples = [self.readable(i, unread) for i in indices]
        layouts = [
            self.method.layout(sample, np.random.default_rng([self.seed, i, 1]), epoch)
            for i, sample in zip(indices, samples, strict=True)
        ]
        encode = remembered(self.backbone.encode)
        lengths = [packed_length(layout, encode) for layout in layouts]
        order = sorted(range(self.size), key=lengths.__getitem__)
        part = self.size // self.passes
        parts = [order[i : i + part] for i in range(0, self.size, part)]
        passes = [pack([layouts[i] for i in p], encode, self.backbone.pad) for p in parts]
        if most := self.backbone.most_positions:
            ends = (packed.positions.amax((0, 2)) + 1 for packed in passes)  # a [samples] each
            for i, needed in zip(order, torch.cat(list(ends)).tolist(), strict=True):
                _expect_room(samples[i].where or f"sample {indices[i]}", needed, most)
        return passes, unread

    def readable(self, index: int, unread: list[Unread]) -> Sample:
        """A sample with its clip cut for the model; to `unread` is added what couldn't be read before it."""
        for place in (index, *range(BEYOND + index * self.spares, BEYOND + (index + 1) * self.spares)):
            try:
                return looked_at(self.source(place), self.backbone.see)
            except VideoError as error:
                if not self.spares:
                    raise
                unread.append(Unread(index, str(error)))
        raise VideoError(
            f"{self.spares + 1} consecutive clips are unreadable, so this isn't bad luck. {unread[-1].why}"
        )


def expect_held_out(backbone: Backbone, method: Method, samples: Sequence[Sample]) -> None:
    """Errors: ConfigError for a sample that is longer than the model's positions: written out as in the curriculum's last stage,
    or asked silently."""
    if not (most := backbone.most_positions):
        return
    for index, sample in enumerate(samples):
        seen = looked_at(sample, backbone.see)
        layouts = [method.layout(seen, np.random.default_rng(index), LAST)]
        if method.silent:
            thought = method.thinking(method.trained_slots)
            layouts.append(Layout({"asked": (method.context(seen), *thought, ending(seen))}))
        packed = pack(layouts, backbone.encode, backbone.pad)
        _expect_room(sample.where or f"validation sample {index}", int(packed.positions.max()) + 1, most)


def _expect_room(name: str, needed: int, most: int) -> None:
    """Errors: ConfigError for a sample of this name that needs more positions than there are."""
    if needed > most:
        raise ConfigError(f"{name} needs {needed:,} positions, but this model has {most:,}: remove the row.")


def epoch_of(step: int, samples: int, epoch: int) -> int:
    """The epoch of a step of `samples` samples, where one has `epoch` of them."""
    return step * samples // epoch if epoch else 0


@dataclass(frozen=True)
class _Made(Dataset):
    """What a worker hands over. Sentences for the user come back as they are: raised there, they'd bring a traceback."""

    batches: Batches

    def __getitem__(self, step: int) -> tuple[list[Packed], list[Unread]] | ConfigError | VideoError:
        try:
            return self.batches.made(step)
        except (ConfigError, VideoError) as error:
            return error


def _without_weights(dataset: Batches) -> Batches:
    """As it is sent to workers: they cut and encode, for which the tokenizer and the model's configuration are enough."""
    model = SimpleNamespace(config=dataset.backbone.model.config)
    return replace(dataset, backbone=replace(dataset.backbone, model=model))


def _first(items: list[Any]) -> Any:
    return items[0]


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def batches(
    dataset: Batches, start: int, stop: int, workers: int, report: Callable[[int, list[Unread]], None] | None = None
) -> Iterator[list[Packed]]:
    """The steps' passes. report: is told the step, and what couldn't be read for it, when the step's turn comes.

    Errors: what `Batches.made` raises; RuntimeError for a worker that died.
    """
    loader = DataLoader(
        _Made(_without_weights(dataset)),
        batch_size=1,
        sampler=range(start, stop),
        collate_fn=_first,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
    )
    for step, made in enumerate(_received(loader), start):
        if isinstance(made, Exception):
            raise made
        passes, unread = made
        if unread and report:
            report(step, unread)
        yield passes


def _received(loader: DataLoader) -> Iterator[Any]:
    """What the workers hand over. torch tells of a dead one, unless it died while its batch was being fetched."""
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"A data worker died while it handed over its batch ({error}).") from error


def unread_before(log: Path, step: int) -> set[tuple[int, Unread]]:
    """What a run's log says couldn't be read up to a step. Steps that a kill undid are taken again, and stand there twice."""
    found = set()
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # torn by a kill
            told = json.loads(line)
            if "unreadable" in told and told["step"] <= step:
                found.add((told["step"], Unread(told["sample"], told["unreadable"])))
    return found
