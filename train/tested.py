"""What a finished run answers to the test problems, and what its slots hold; asked once, and kept. Trains nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import latents
from engine.backbones.base import Backbone
from engine.config import ConfigError
from engine.curriculum import step_groups
from engine.data.samples import Sample
from engine.data.text_worlds import TextWorldsSource
from engine.data.worlds import WorldsSource
from engine.evaluation import How, Outcome, evaluate, mean
from engine.folders import write_whole
from engine.insight.similarity import collapse, vocabulary
from engine.layout import Layout, pack
from engine.methods.method import Method
from engine.resume import start_of
from train.command import opened
from train.publish import seconds
from train.trials import Table, Trial, differing, settings_of

RESULT = "test.json"  # in a run's folder
SIGNS = "+-*/"
OPERATORS = re.compile(rf"[{re.escape(SIGNS)}]")


def real_problems(table: Table) -> list[Sample]:
    """GSM8K's, where the table names a file. Errors: ConfigError for one that can't be read."""
    if table.gsm8k is None:
        return []
    source = replace(table.gsm8k, split="test")
    return [source(i) for i in range(len(source))]


def tested_as(count: int, batch: int, real: Sequence[Sample]) -> dict[str, Any]:
    """What tells one test from another."""
    return {"samples": count, "batch": batch, "real": hashlib.sha256(repr(real).encode()).hexdigest() if real else ""}


def tested(wanted: Trial, count: int, batch: int, real: Sequence[Sample]) -> dict[str, Any]:
    """What a finished run answers to the test problems, and to real ones: as its folder says, or asked now."""
    final, place = wanted.final, wanted.folder / RESULT
    state = {"best": json.loads((final.best / "scores.json").read_text()), **tested_as(count, batch, real)}
    if place.exists() and (known := json.loads(place.read_text()))["state"] == state:
        return known
    source, method = final.run.source, final.method
    assert isinstance(source, WorldsSource | TextWorldsSource)  # `trial` makes no other
    test = replace(source, split="test", seed=0)
    records = [test.record(i) for i in range(count)]
    asked = [(record.family, record.difficulty, test(i)) for i, record in enumerate(records)]
    base, adapter = (final.run.training.init, str(final.best)) if final.run.lora else (str(final.best), "")
    backbone, companions = opened(base, adapter, method, final.best, final.run.training.device)
    how: How = "silent" if method.silent else "explicit"

    def answered(samples: Sequence[Sample]) -> list[Outcome]:
        return evaluate(backbone, samples, method, how, method.trained_slots, companions, batch)

    results = answered([sample for *_, sample in asked])
    if real:
        asked += [("GSM8K", len(sample.steps), sample) for sample in real]
        results += answered(real)
    answers = {
        "world": [world for world, _, _ in asked],
        "k": [k for _, k, _ in asked],
        "correct": [int(each.correct) for each in results],
        "generated_tokens": [each.generated_tokens for each in results],
        "seconds": [round(each.seconds, 6) for each in results],
    }
    held = {}
    if method.trained_slots > 1:
        for world in test.families:
            chosen = [sample for own, _, sample in asked if own == world]
            held[world] = what_slots_hold(backbone, companions, method, chosen, batch)
    took = sum(seconds(Path(stage.run.training.out)) for stage in wanted.learnt)
    found = {"state": state, "slots": results[0].slots, "training_seconds": took, "held": held, "answers": answers}
    first = wanted.learnt[0].run.training
    found |= {"stages": [settings_of(stage) for stage in wanted.learnt], "start": start_of(first.init, first.adapter)}
    write_whole(place, json.dumps(found))
    return found


def kept(wanted: Trial, place: Path, table: Table, real: Sequence[Sample]) -> dict[str, Any] | None:
    """A run's result from a folder of such; None where that has none of it. Errors: ConfigError for a file that can't be read,
    and for one of a run that was made, started or tested otherwise."""
    file, stages = place / f"{wanted.name}.json", wanted.learnt
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        made, start, state = found["stages"], found["start"], found["state"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{file} holds no result of a run: move it away.") from None
    based = ("init", "adapter") if table.base else ("adapter",)
    others = [differing(saved, stage, *based) for saved, stage in zip(made, stages, strict=False)]
    others += ["number of stages"] * (len(made) != len(stages))
    if any(others):
        raise ConfigError(f"{file} is of a run with another {next(filter(None, others))}: move it away, or set that back.")  # fmt: skip
    first = stages[0].run.training
    if Path(first.init).is_dir() and start != start_of(first.init, first.adapter):
        raise ConfigError(f"{file} is of a run that started from other weights than {first.init} holds now: move it away.")  # fmt: skip
    if {**state, "best": {}} != {**tested_as(table.samples, table.batch, real), "best": {}}:
        raise ConfigError(f"{file} is of a run that was tested on other problems: move it away.")
    return found


def keep(found: Mapping[str, Any], wanted: Trial, place: Path) -> None:
    """A result where `kept` finds it."""
    write_whole(place / f"{wanted.name}.json", json.dumps(found) + "\n")


@torch.no_grad()
def what_slots_hold(
    backbone: Backbone, companions: nn.ModuleDict, method: Method, samples: Sequence[Sample], batch: int
) -> dict[str, float | None]:
    """SIM-CoT's measures, means over samples: how alike the thoughts are, and whether they name their steps' operators.

    A slot's thought is what it is fed; of one that rides the prefill, its own last state.
    """
    feedback, count = method.feedback(companions), method.trained_slots
    words = vocabulary(backbone.model.get_input_embeddings().weight)
    measured: dict[str, list[float]] = {"cosine": [], "effective_rank": [], "centre": []}
    said = []
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        layouts = [Layout({"think": (method.context(sample), *method.thinking(count))}) for sample in part]
        packed = pack(layouts, backbone.encode, backbone.pad).to(backbone.device)
        last = latents.forward(backbone, packed, feedback)[-1]
        fed_back = packed.latents[packed.slot_sample, packed.slot_row]
        states = last[packed.slot_sample, packed.slot_row - fed_back.long()].unflatten(0, (len(part), count))
        found = collapse((feedback(states) if fed_back.all() else states)[None], words)
        for name, values in measured.items():
            values += found[name][0].tolist()
        said.append(backbone.logits(states))
    whole = torch.cat(said)  # [samples, slots, vocabulary]
    wanted = [operators(sample.steps, count, method.slots_a_step) for sample in samples]
    return {name: mean(values) for name, values in measured.items()} | {
        "operator": share_named(backbone, whole, wanted),
        "by_chance": share_named(backbone, whole, wanted[1:] + wanted[:1]),  # another problem's
    }


def operators(steps: tuple[str, ...], slots: int, each: int = 1) -> list[str]:
    """The operator of the step that each slot stands for, `each` slots a step; "" where it stands for none, or for several."""
    found = [set(OPERATORS.findall(group or "")) for group in step_groups(steps, slots // each, "ignore", "")]
    return ["".join(signs) if len(signs) == 1 else "" for signs in found for _ in range(each)]


def share_named(backbone: Backbone, said: Tensor, wanted: Sequence[Sequence[str]]) -> float | None:
    """Of the slots that stand for an operator, the share whose lens holds it likelier than the others.

    said: logits [samples, slots, vocabulary].
    """
    chosen = [(i, k, SIGNS.index(sign)) for i, row in enumerate(wanted) for k, sign in enumerate(row) if sign]
    if not chosen:
        return None
    sample, slot, true = zip(*chosen, strict=True)
    tokens = [backbone.text_ids(sign)[0] for sign in SIGNS]
    likeliest = said[list(sample), list(slot)][:, tokens].argmax(-1)
    return mean([found == sign for found, sign in zip(likeliest.tolist(), true, strict=True)])
