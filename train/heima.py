"""Trains Heima: a run a stage, each from the model or adapter of the one before, then what reads its thoughts.

python -m train.heima --config train/configs/small/heima.yaml

A file says what all stages share, and under `stages` what differs: a name (its folder in `out`), keys of `method`,
`training` and `worlds`, and a kind: heima, or interpreters or scorers, which read what the last heima stage left. --resume goes on where
the runs stopped; --only-eval true scores what they made: answers, how alike the interpreters' words are to the chains (text
metrics must be installed), what thoughts and chains are worth for the answer. `validation: {encoder: FOLDER}` adds BERTScore,
by a model in that folder; `{judge: MODULE:FUNCTION}` a judge of your own, (what was said, what is true) -> how alike.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from engine.backbones.base import Backbone
from engine.batches import expect_held_out
from engine.config import ConfigError, build, convert, function_of
from engine.container import VideoError
from engine.curriculum import LAST
from engine.evaluation import mean
from engine.insight.information import information
from engine.insight.reconstruction import by_section, expect_encoder, interpreted
from engine.layout import pack
from engine.methods.heima import TEXT, Heima, Interpreters
from engine.methods.method import Method
from engine.methods.method import run as run_forward
from engine.methods.scorers import Scorers, scored
from train import planned
from train.command import HeldOut, Run, Validation, arguments, held_out, opened, section, trained, validation

KINDS: dict[str, type[Heima]] = {"heima": Heima, "interpreters": Interpreters, "scorers": Scorers}


@dataclass(frozen=True)
class Stage:
    name: str
    kind: Literal["heima", "interpreters", "scorers"] = "heima"
    method: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    worlds: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring(Validation):
    """
    encoder, judge: of the words that interpreters say: the folder of BERTScore's encoder, and MODULE:FUNCTION, which is given
    what was said and what is true, and returns how alike they are.
    """

    encoder: str = ""
    judge: str = ""


@dataclass(frozen=True)
class Staged(Run):
    validation: Scoring = field(default_factory=Scoring)


@dataclass(frozen=True)
class Planned:
    """One stage, ready to run."""

    run: Run
    method: Method

    @property
    def name(self) -> str:
        return Path(self.run.training.out).name

    @property
    def best(self) -> Path:
        return Path(self.run.training.out) / "best"

    @property
    def held_out(self) -> HeldOut:
        if isinstance(self.method, Interpreters):
            return readable(self.run, self.method)
        if isinstance(self.method, Scorers):
            return worth(self.run, self.method)
        return validation(self.run, self.method)


def plan(values: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> list[Planned]:
    """The stages of a file, in their order. given: settings by section, which hold for every stage whatever the file says
    of it. Errors: ConfigError for what can't be run."""
    shared = {key: value for key, value in values.items() if key != "stages"}
    stages = convert(values.get("stages") or (), tuple[Stage, ...], "stages")
    if not stages or len({stage.name for stage in stages}) < len(stages):
        raise ConfigError("A file for Heima lists its stages, each with a name of its own.")
    own = {name: section(dict(given or {}), name) for name in ("training", "method", "worlds")}
    own["training"] = {name: value for name, value in own["training"].items() if name not in ("init", "adapter", "out")}
    start: dict[str, str] = {}  # what the stage before left
    planned = []
    for stage in stages:
        training = {**section(shared, "training"), **start, **stage.training, **own["training"]}
        if not training.get("out"):
            raise ConfigError("Say what to start from (init) and where to write (out).")
        training["out"] = str(Path(training["out"]) / stage.name)
        method = {**section(shared, "method"), **stage.method, **own["method"]}
        worlds = {"worlds": {**section(shared, "worlds"), **stage.worlds, **own["worlds"]}} if stage.worlds else {}
        run = build(Staged, {**shared, **worlds, "method": method, "training": training})
        planned.append(Planned(run, build(KINDS[stage.kind], run.method, "method.")))
        if stage.kind == "heima":
            start = {"adapter" if run.lora else "init": str(planned[-1].best)}
    if encoder := run.validation.encoder:
        expect_encoder(Path(encoder))
    return planned


def readable(run: Run, method: Interpreters) -> HeldOut:
    """How likely the interpreters hold each section's text: the geometric mean over its tokens. No text is decoded."""
    samples = held_out(run)
    layouts = [method.layout(sample, np.random.default_rng(i)) for i, sample in enumerate(samples)]
    size = run.validation.batch

    @torch.no_grad()
    def validate(backbone: Backbone, companions: nn.ModuleDict, epoch: int) -> dict[str, float]:
        nats, tokens = dict.fromkeys(method.names, 0.0), dict.fromkeys(method.names, 0)
        for first in range(0, len(layouts), size):
            packed = pack(layouts[first : first + size], backbone.encode, backbone.pad).to(backbone.device)
            out = run_forward(backbone, packed, companions=companions)
            for name, readings in packed.readings.items():
                rows = readings.packed.branches["read"]
                count = int((rows.name == rows.names.index(TEXT)).sum())
                nats[name] += count * float(method.section_loss(out, name, TEXT))
                tokens[name] += count
        scores = {name: math.exp(-nats[name] / count) for name, count in tokens.items() if count}
        return {**scores, "accuracy": mean(list(scores.values()))}

    return HeldOut(samples, validate)


def worth(run: Run, method: Scorers) -> HeldOut:
    """What slots and chain are worth, in nats; the best scorers are those that hold the answers likeliest, all four together."""
    samples, size = held_out(run), run.validation.batch

    def validate(backbone: Backbone, companions: nn.ModuleDict, epoch: int) -> dict[str, float]:
        nats = scored(backbone, companions, method, samples, size)
        found = {name: part["value"] for name, part in asdict(information(nats)).items() if name != "samples"}
        return {**found, "accuracy": math.exp(-mean([float(each.mean()) for each in nats.values()]))}

    return HeldOut(samples, validate)


def scores(stages: list[Planned], asked: Scoring) -> dict[str, Any]:
    """What each finished stage scores on the validation split, what its interpreters say, what its thoughts are worth."""
    found: dict[str, Any] = {}
    judge = function_of(asked.judge, "validation.judge") if asked.judge else None
    for stage in stages:
        method, training = stage.method, stage.run.training
        if not stage.best.is_dir():
            print(f"{stage.best.parent} isn't trained yet.", file=sys.stderr)
            continue
        base = training.init if stage.run.lora or method.frozen else str(stage.best)
        adapter = training.adapter if method.frozen else str(stage.best) if stage.run.lora else ""
        backbone, companions = opened(base, adapter, method, stage.best, training.device)
        samples, size = held_out(stage.run), stage.run.validation.batch
        expect_held_out(backbone, method, samples)
        if isinstance(method, Interpreters):
            words = interpreted(backbone, companions, method, samples, size)
            said = by_section(words, encoder=asked.encoder or None, judge=judge)
            found[stage.name] = {name: asdict(each) for name, each in said.items()}
        elif isinstance(method, Scorers):
            found[stage.name] = asdict(information(scored(backbone, companions, method, samples, size)))
        else:
            found[stage.name] = stage.held_out.score(backbone, companions, LAST)
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 with one sentence for a bad configuration, or for files that can't be read or written."""
    try:
        asked = arguments(__doc__, argv)
        stages = plan(asked.values, asked.given)
        if asked.plan:
            first = stages[0].run.training  # what a later stage starts from isn't there yet, and has the same shape
            for stage in stages:
                print(f"\n{stage.name}")
                training = replace(stage.run.training, init=first.init, adapter="")
                planned.show(replace(stage.run, training=training), stage.method, asked)
            return 0
        if stages[0].run.training.only_eval:
            scoring = build(Scoring, section(asked.values, "validation"), "validation.")
            print(json.dumps(scores(stages, scoring), indent=1))
            return 0
        for stage in stages:
            trained(stage.run, stage.method, stage.held_out, asked.resume)
    except (ConfigError, VideoError, FloatingPointError, ModuleNotFoundError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
