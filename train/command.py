"""What the training scripts share: a command line over the configuration's dataclasses, the source, the validation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from engine.backbones.base import Backbone
from engine.backbones.load import load
from engine.config import ConfigError, build, read_yaml
from engine.data.aokvqa import AokvqaSource, MultimodalCoconutSource
from engine.data.coconut_json import CoconutSource
from engine.data.codi_json import CodiSource
from engine.data.gsm8k_icot import Gsm8kIcotSource
from engine.data.llava_cot import LlavaCotSource
from engine.data.samples import letter
from engine.data.text_worlds import TextWorldsSource
from engine.data.video_r1 import VideoR1Source
from engine.data.worlds import WorldsSource
from engine.evaluation import Outcome, evaluate, mean
from engine.layout import Layout, pack
from engine.methods.method import COMPANIONS, Method
from engine.methods.method import run as run_forward
from engine.training import Training, Validate, train
from engine.video import VideoError

Source = (
    WorldsSource | TextWorldsSource | VideoR1Source | LlavaCotSource | AokvqaSource | MultimodalCoconutSource
    | CoconutSource | Gsm8kIcotSource | CodiSource
)  # fmt: skip


@dataclass(frozen=True)
class Validation:
    """Clips of the validation split answered by decoding while training goes on."""

    samples: int = 180
    batch: int = 60


@dataclass(frozen=True)
class Run:
    """A training configuration file."""

    method: dict
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    # The data: at most one of these; without any, the worlds.
    worlds: WorldsSource | None = None
    text_worlds: TextWorldsSource | None = None
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
        given = [getattr(self, f.name) for f in fields(self) if f.name not in ("method", "training", "validation")]
        chosen = [source for source in given if source is not None]
        if len(chosen) > 1:
            raise ConfigError("Name one source of data, not several.")
        return chosen[0] if chosen else WorldsSource()


def parse(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """--config, --resume, and one flag for each training setting."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; train/configs/ has one for each published recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in `out`")
    group = parser.add_argument_group("training settings (each overrides the file's)")
    for setting in fields(Training):
        flag = "--" + setting.name.replace("_", "-")
        group.add_argument(flag, metavar=str(setting.type).split("[")[0].upper(), help=f"{setting.metadata['help']} (default {setting.default})")  # fmt: skip
    return parser.parse_args(argv)


def main(
    description: str | None,
    method: type,
    argv: list[str] | None = None,
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values,
) -> int:
    """Runs a training script for one method's dataclass. Exit code 2 with one sentence for a bad configuration.

    translate: turns a file's keys into this project's.
    """
    arguments = vars(parse(description, argv))
    config, resume = arguments.pop("config"), arguments.pop("resume")
    overrides = {name: value for name, value in arguments.items() if value is not None}
    try:
        values = translate(read_yaml(config))
        values["training"] = {**values.get("training", {}), **overrides}
        run = build(Run, values)
        chosen: Method = build(method, run.method, "method.")
        source = run.source
        note = {type(source).__name__: asdict(source), "validation": asdict(run.validation)}
        if run.training.only_eval:
            print(json.dumps(evaluated(run.training, chosen, validation(run, chosen))))
        else:
            train(run.training, chosen, source, validation(run, chosen), resume, note)
    except (ConfigError, VideoError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def evaluated(config: Training, method: Method, validate: Validate) -> dict[str, float]:
    """Scores of the model at `init`, with the companions that lie beside it."""
    backbone = load(config.init, tokens=method.tokens)
    companions = method.companions(backbone)
    if len(companions):
        companions.load_state_dict(load_file(f"{config.init}/{COMPANIONS}"))
    return validate(backbone, companions.eval())


def validation(run: Run, method: Method) -> Validate:
    """Decodes the validation split: silently for a method with slots or <ANS>, with the written chain for one that writes it."""
    source = replace(run.source, split="validation")
    samples = [source(i) for i in range(run.validation.samples)]
    layouts = [method.layout(sample, np.random.default_rng(i)) for i, sample in enumerate(samples)]
    branches = set(layouts[0].branches)

    def validate(backbone: Backbone, companions: nn.ModuleDict) -> dict[str, float]:
        scores: dict[str, Any] = {}
        if "look" in branches:
            return letters_right(backbone, layouts)
        if "teacher" in branches:
            written = evaluate(backbone, samples, method, "explicit", 0, batch=run.validation.batch)
            scores |= {"explicit": mean([r.correct for r in written]), "explicit_steps": step_share(written)}
        if "answer" in branches:
            count, size = method.trained_slots, run.validation.batch
            silent = evaluate(backbone, samples, method, "silent", count, companions, size, "speak" in branches)
            scores["silent"] = mean([r.correct for r in silent])
            if "speak" in branches:
                scores["spoken_steps"] = step_share(silent)
        scores["accuracy"] = scores.get("silent", scores.get("explicit"))
        return scores

    return validate


@torch.no_grad()
def letters_right(backbone: Backbone, layouts: list[Layout]) -> dict[str, float]:
    """The share of option letters that the look-up predicts from everything before them, written and silent."""
    whole = run_forward(backbone, pack(layouts, backbone.encode, backbone.pad).to(backbone.device))
    out = whole.branch("look")
    letters = torch.tensor([backbone.text_ids(f" {letter(i)}")[0] for i in range(4)], device=backbone.device)
    asked = torch.isin(out.rows.target, letters)
    written = (out.logits().argmax(-1) == out.rows.target)[asked]
    silent = [whole.branch(name) for name in layouts[0].branches if name.startswith("silent")]
    said = [(b.logits().argmax(-1) == b.rows.target)[b.rows.name == b.rows.names.index("answer")] for b in silent]
    share = {"letters": float(written.float().mean()), "silent": float(torch.cat(said).float().mean())}
    return share | {"accuracy": min(share.values())}


def step_share(results: list[Outcome]) -> float:
    return mean([right for r in results if r.steps is not None for right in r.steps])
