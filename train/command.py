"""What the training scripts share: a command line over the configuration's dataclasses, the source, the validation."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from torch import nn

from engine import adapters
from engine.adapters import Lora
from engine.backbones.base import Backbone
from engine.backbones.load import here, load
from engine.batches import expect_held_out
from engine.config import ConfigError, build, read_yaml
from engine.container import VideoError
from engine.curriculum import LAST
from engine.data.aokvqa import AokvqaSource, MultimodalCoconutSource
from engine.data.coconut_json import CoconutSource
from engine.data.codi_json import CodiSource
from engine.data.files import FileSource
from engine.data.gsm8k_icot import Gsm8kIcotSource
from engine.data.jsonl import JsonlSource
from engine.data.llava_cot import LlavaCotSource
from engine.data.samples import Sample, looked_at
from engine.data.text_worlds import TextWorldsSource
from engine.data.video_r1 import VideoR1Source
from engine.data.worlds import WorldsSource
from engine.evaluation import Outcome, evaluate, mean
from engine.methods.method import MOST_SLOTS, Method
from engine.recipe import Training
from engine.training import Validate, train
from train import planned

Source = (
    WorldsSource | TextWorldsSource | JsonlSource | VideoR1Source | LlavaCotSource | AokvqaSource | MultimodalCoconutSource
    | CoconutSource | Gsm8kIcotSource | CodiSource
)  # fmt: skip


@dataclass(frozen=True)
class Validation:
    """Clips of the validation split answered by decoding while training goes on."""

    samples: int = 180
    batch: int = 60

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1:
            raise ConfigError("validation: take at least one sample, and one at a time.")


@dataclass(frozen=True)
class Run:
    """A training configuration file."""

    method: dict
    training: Training = field(default_factory=Training)
    lora: Lora | None = None  # without it, every weight is trained
    validation: Validation = field(default_factory=Validation)
    # The data: at most one of these; without any, the worlds.
    worlds: WorldsSource | None = None
    text_worlds: TextWorldsSource | None = None
    jsonl: JsonlSource | None = None
    video_r1: VideoR1Source | None = None
    llava_cot: LlavaCotSource | None = None
    aokvqa: AokvqaSource | None = None
    multimodal_coconut: MultimodalCoconutSource | None = None
    coconut_json: CoconutSource | None = None
    gsm8k_icot: Gsm8kIcotSource | None = None
    codi_json: CodiSource | None = None

    @property
    def source(self) -> Source:
        """Errors: ConfigError for two sources."""
        chosen = [given for f in fields(self) if isinstance(given := getattr(self, f.name), Source)]
        if len(chosen) > 1:
            raise ConfigError("Name one source of data, not several.")
        return chosen[0] if chosen else WorldsSource()


@dataclass(frozen=True)
class Asked:
    """A training script's command line."""

    values: dict[str, Any]  # the files', then the settings given
    given: dict[str, Any]  # the settings given alone, by section
    resume: bool
    plan: bool
    card: str
    share: float  # of the card's peak
    shape: str


def arguments(
    description: str | None,
    argv: list[str] | None,
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values,
) -> Asked:
    """--config, --resume, --plan, and one flag for each training setting.

    Of several files, a later one's sections stand in place of an earlier one's: a stage, then the method that it trains.
    translate: turns a file's keys into this project's. Errors: ConfigError for a file that can't be read.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", action="extend", metavar="YAML", help="train/configs/ has one for each published recipe; of several, a later one's sections replace an earlier one's")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", metavar="SECTION.KEY=VALUE", help="one setting of the file's each, such as worlds.corrupt=blind, method.pauses=4,16 or method.steps.layers=1")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in `out`")
    ahead = parser.add_argument_group("before a GPU is rented")
    ahead.add_argument("--plan", action="store_true", help="print parameters, tokens, memory and time a step, and stop; no weights are read")  # fmt: skip
    ahead.add_argument("--card", default="H100", help="H100, H200, A100, 4090 or CPU (default H100)")
    ahead.add_argument("--peak-share", type=float, default=0.4, help="of the card's peak that is assumed (default 0.4)")
    ahead.add_argument("--shape", default="", help="whose shape: a folder with a config.json, a JSON file, or a published model's name (default: init)")  # fmt: skip
    group = parser.add_argument_group("training settings (each overrides the file's)")
    hints = get_type_hints(Training)
    for setting in fields(Training):
        flag = "--" + setting.name.replace("_", "-")
        group.add_argument(flag, metavar=form(hints[setting.name]), help=f"{setting.metadata['help']} (default {setting.default})")  # fmt: skip
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    values: dict[str, Any] = {}
    for path in given.pop("config"):
        values |= read_yaml(path)
    assignments = given.pop("set", [])
    resume, wanted, card, share, shape = map(given.pop, ("resume", "plan", "card", "peak_share", "shape"))
    if not 0 < share <= 1:
        raise ConfigError(f"--peak-share {share:g}: it is a share, above 0 and at most 1.")
    values = translate(values)
    own: dict[str, Any] = {}
    for assignment in assignments:
        own = changed(own, assignment)
    own["training"] = section(own, "training") | given
    for name, settings in own.items():
        values[name] = over(section(values, name), settings)
    return Asked(values, own, resume, wanted, card, share, shape)


def form(hint: Any) -> str:
    """How a setting of this type is written: its choices, a value for each place, or its type."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return ",".join(map(form, get_args(hint))) or hint.__name__.upper()


def changed(values: dict[str, Any], assignment: str) -> dict[str, Any]:
    """The values with one of them changed: SECTION.KEY=VALUE, or a section in a section. Errors: ConfigError for another form."""
    name, equals, text = assignment.partition("=")
    places = name.split(".")
    if len(places) < 2 or not all(places) or not equals:
        raise ConfigError(f"--set {assignment}: write SECTION.KEY=VALUE, such as worlds.corrupt=blind.")
    settings: Any = text
    for place in reversed(places):
        settings = {place: settings}
    return over(values, settings)


def over(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values with some of them changed, in sections of theirs too."""
    deep = {
        key: over(values[key], change)
        for key, change in changes.items()
        if isinstance(change, dict) and isinstance(values.get(key), dict)
    }
    return values | changes | deep


def processes() -> int:
    """How many learn one model together, as torchrun and accelerate tell each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A section's settings, none where it is empty or missing. Errors: ConfigError for one that is a list or a single value."""
    held = values.get(name) or {}
    if not isinstance(held, dict):
        raise ConfigError(f"{name} must hold keys and values, not {type(held).__name__}.")
    return held


@dataclass(frozen=True)
class HeldOut:
    """The samples that a run is validated on, and what scores a model on them."""

    samples: Sequence[Sample]
    score: Validate


def main(
    description: str | None,
    method: type,
    argv: list[str] | None = None,
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values,
    validated: Callable[[Run, Method], HeldOut] | None = None,
) -> int:
    """Runs a training script for one method's dataclass. validated: what scores it (default: `validation`). Exit code 2 with one
    sentence for a bad configuration, or for files that can't be read or written."""
    try:
        asked = arguments(description, argv, translate)
        held = validated or validation
        run = build(Run, asked.values)
        chosen: Method = build(method, run.method, "method.")
        if (most := chosen.slot_range[1]) > MOST_SLOTS:
            raise ConfigError(f"{most:,} slots: train with {MOST_SLOTS} at most, more can't be asked for.")
        if asked.plan:
            planned.show(run, chosen, asked)
        elif run.training.only_eval:
            print(json.dumps(evaluated(run.training, chosen, held(run, chosen))))
        else:
            trained(run, chosen, held(run, chosen), asked.resume)
    except (ConfigError, VideoError, FloatingPointError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def trained(run: Run, method: Method, held: HeldOut, resume: bool) -> Path:
    """Carries a configuration out -> the folder of its best model or adapter. Errors: ConfigError before anything is written."""
    source = run.source
    first = source(0)  # reads all there is to train on
    note = {type(source).__name__: asdict(source), "validation": asdict(run.validation)}
    told = {"dialect": first.dialect, **source.looks}
    return train(run.training, method, source, held.score, resume, note, run.lora, told, held.samples)


def evaluated(config: Training, method: Method, held: HeldOut) -> dict[str, float]:
    """Scores of the model at `init`, under its adapter if one is named, with the companions that lie beside it."""
    place = Path(config.adapter or config.init)
    backbone, companions = opened(config.init, config.adapter, method, place, config.device)
    expect_held_out(backbone, method, held.samples)
    return held.score(backbone, companions, LAST)


def opened(init: str, adapter: str, method: Method, place: Path, device: str = "cpu") -> tuple[Backbone, nn.ModuleDict]:
    """A model with its adapter merged in, if one is named, and its companions from the folder `place`.

    device: auto = the first of cuda, mps and cpu that is here. Errors: ConfigError for one that isn't.
    """
    device = here(device)
    backbone = load(init, device, tokens=method.tokens)
    if adapter:
        adapters.merge(backbone.model, adapter)
    companions = method.companions(backbone)
    adapters.load_companions(place, companions)
    return backbone, companions.to(device)


def held_out(run: Run) -> list[Sample]:
    """The validation's samples, each once. Errors: VideoError for one whose file doesn't open, before hours of training."""
    source, count = replace(run.source, split="validation"), run.validation.samples
    if isinstance(source, FileSource):  # worlds have no end
        count = min(count, len(source))
    samples = [source(i) for i in range(count)]
    return [looked_at(sample, planned.opened) for sample in samples]


def validation(run: Run, method: Method) -> HeldOut:
    """Decodes the validation split: silently for a method with slots or <ANS>, with the written chain for one that writes it.
    Errors: ConfigError for a method none of whose branches can be decoded."""
    samples = held_out(run)
    layouts = [method.layout(sample, np.random.default_rng(i)) for i, sample in enumerate(samples)]
    branches = set(layouts[0].branches)
    if not branches & {"teacher", "answer" if method.silent else "teacher"}:
        wanted = "answer (silently) or teacher (by its chain)" if method.silent else "teacher, since it isn't silent"
        raise ConfigError(f"The method's branches are {', '.join(sorted(branches))}: for validation call one {wanted}.")
    looked: list[Sample] = []  # at the first validation, so that files are read once

    def validate(backbone: Backbone, companions: nn.ModuleDict, epoch: int) -> dict[str, float]:
        scores: dict[str, Any] = {}
        if not looked:
            looked.extend(looked_at(sample, backbone.see) for sample in samples)
        if "teacher" in branches or not method.silent:
            written = evaluate(backbone, looked, method, "explicit", 0, batch=run.validation.batch)
            scores |= {"explicit": mean([r.correct for r in written]), "explicit_steps": step_share(written)}
        if "answer" in branches and method.silent:
            count, size = method.slots_at(epoch), run.validation.batch
            silent = evaluate(backbone, looked, method, "silent", count, companions, size, "speak" in branches)
            scores["silent"] = mean([r.correct for r in silent])
            if "speak" in branches:
                scores["spoken_steps"] = step_share(silent)
        scores["accuracy"] = scores.get("silent", scores.get("explicit"))
        return scores

    return HeldOut(samples, validate)


def step_share(results: list[Outcome]) -> float:
    return mean([right for r in results if r.steps is not None for right in r.steps])
