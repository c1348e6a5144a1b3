"""Coconut's and SIM-CoT-on-Coconut's numbers, met by Coconut through layout, pack, latents, Outcome and loss.

With an `aux` model the `base` one reasons and the other reads the steps off its thoughts; without, every model reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.samples import Sample
from engine.layout import Packed, pack
from engine.methods.coconut import LATENT, START, STOP, Coconut
from engine.methods.method import Outcome, run
from engine.methods.steps import DECODER, StepSupervision
from tests.conformance.folder import (
    IGNORED,
    Numerals,
    Watched,
    below,
    gradients,
    model,
    needed,
    numerals,
    parameters,
    read_json,
    told,
    where,
    whose,
)  # fmt: skip
from tests.conformance.quantities import Quantity, array, number, same, unchecked

TERMS = {"answer_loss": "answer", "aux_loss": "steps"}  # the folder's names -> the method's
INPUTS = ("input_ids", "attention_mask", "labels", "position_ids")


@dataclass(frozen=True)
class Case:
    """A stage of the curriculum with its batch, as the published collator made it."""

    given: dict[str, Any]
    samples: list[Sample]

    @property
    def name(self) -> str:
        return self.given["name"]

    @property
    def real(self) -> Tensor:
        """bool [batch, length]: the published batch's rows that aren't padding."""
        return torch.tensor(self.given["batch"]["attention_mask"]) > 0

    def method(self, steps: StepSupervision | None) -> Coconut:
        given = {key: self.given[key] for key in ("c_thought", "max_latent_stage", "pad_latent_to_max")}
        return Coconut(**given, epochs_per_stage=1, steps=steps)

    def packed(self, backbone: Watched, method: Coconut) -> Packed:
        rng = np.random.default_rng(0)
        layouts = [method.layout(sample, rng, epoch=self.given["stage"]) for sample in self.samples]
        return pack(layouts, backbone.encode, backbone.pad)


@dataclass(frozen=True)
class Pass:
    """A case's batch through one model, forward and backward."""

    name: str
    case: Case
    method: Coconut
    backbone: Watched
    out: Outcome
    fed: Tensor  # [batch, length, dim]: the embeddings as they went in
    total: Tensor
    terms: dict[str, Tensor]

    @property
    def packed(self) -> Packed:
        return self.out.packed

    @property
    def real(self) -> Tensor:
        return self.packed.node >= 0

    def parameters(self) -> dict[str, nn.Parameter]:
        if self.method.steps:
            return parameters(base=self.backbone.model, aux=self.out.companions[DECODER])
        return dict(self.backbone.model.named_parameters(remove_duplicate=False))

    def labels(self) -> Tensor:
        rows = self.packed.branches["answer"]
        labels = torch.full_like(self.packed.ids, IGNORED)
        labels[rows.sample, rows.row + 1] = rows.target
        return labels

    def thought(self, group: int) -> tuple[Tensor, Tensor]:
        """What the reader makes of every sample's thought: bool [samples, length], logits [samples, length, ids]."""
        readings = self.packed.readings[DECODER]
        chosen = readings.group == group
        real = readings.packed.node[chosen] >= 0
        length = int(real.sum(1).max())
        states = self.backbone.calls[-1][1][chosen]
        reader = replace(self.backbone, model=self.out.companions[DECODER])
        return real[:, :length], reader.logits(states[:, :length]).detach()


def check(folder: Path) -> list[Quantity]:
    """Every quantity of a folder, in the order of its cases."""
    given, inputs = read_json(folder / "config.json")["models"], read_json(folder / "inputs.json")
    numbers, arrays, found = told(folder, "cases")
    expected = numbers["cases"]
    models = {tag: model(folder, tag) for tag in given}
    reader = models.pop("aux", None)
    words = _words(inputs["special_ids"])
    names: list[str] = []
    for case in _cases(inputs):
        for tag, reasoner in models.items():
            name = f"{case.name}.{tag}" if reader is None else case.name
            at = _pass(name, case, Watched(reasoner, words, []), reader)
            given = expected.get(name, {})
            found += _inputs(at) + needed(name, given, "loss") + _numbers(at, given) + _arrays(at, below(arrays, name))
            names.append(name)
    found += [unchecked(name) for name in expected if name not in names]
    return found + [unchecked(key) for key in arrays if not key.startswith(tuple(f"{name}." for name in names))]


def _words(special: dict[str, Any]) -> Numerals:
    """The answers' ids begin with those of "###". What stands in a hole is replaced, so that any token will do."""
    end, hole = special["eos_and_pad"], special["latent"]
    ids = {START: special["start_latent"], LATENT: special["latent"], STOP: special["end_latent"], "<pause>": hole}
    return Numerals(ids, {"\n": [special["newline_id"]], "###": []}, pad_token_id=end, eos_token_id=end)


def _sample(given: dict[str, Any], special: dict[str, Any]) -> Sample:
    """Questions and steps without the line break that the engine writes after them, answers without their end."""

    def text(ids: list[int], last: int) -> str:
        if ids[-1] != last:
            raise ValueError(f"{ids} should end with {last}.")
        return numerals(ids[:-1])

    newline, end = special["newline_id"], special["eos_and_pad"]
    steps = tuple(text(step, newline) for step in given["steps_tokenized"])
    question, answer = text(given["question_tokenized"], newline), text(given["answer_tokenized"], end)
    return Sample(None, question, (), steps, answer, dialect="plain")


def _cases(inputs: dict[str, Any]) -> list[Case]:
    special = inputs["special_ids"]
    ends = [(given["question_tokenized"], given["answer_tokenized"]) for given in inputs["samples"]]
    found = []
    for given in inputs["cases"]:
        case = Case(given, [])
        for place, (ids, real) in enumerate(zip(torch.tensor(given["batch"]["input_ids"]), case.real, strict=True)):
            sample = inputs["samples"][whose(ids[real].tolist(), ends, place)]
            case.samples.append(_sample(sample, special))
        found.append(case)
    return found


def _pass(name: str, case: Case, backbone: Watched, reader: nn.Module | None) -> Pass:
    method = case.method(None if reader is None else StepSupervision())
    companions = nn.ModuleDict({} if reader is None else {DECODER: reader})
    for module in (backbone.model, companions):
        module.zero_grad(set_to_none=True)
    out = run(backbone, case.packed(backbone, method), method.feedback(companions), companions)
    fed = torch.cat([embeds for embeds, _ in backbone.calls], dim=1)
    total, terms = method.loss(out)
    total.backward()
    return Pass(name, case, method, backbone, out, fed, total, terms)


def _inputs(at: Pass) -> list[Quantity]:
    """The method's layout is the published collator's batch: on every row that isn't padding."""
    ours = {"input_ids": at.packed.ids, "labels": at.labels(), "position_ids": at.packed.positions[0]}
    found = []
    for key, given in at.case.given["batch"].items():
        name = f"{at.name}.{key}"
        if key in ours:
            found.append(same(name, torch.tensor(given)[at.case.real], ours[key][at.real]))
        elif key == "attention_mask":
            found.append(same(name, at.case.real.sum(1), at.real.sum(1)))
        elif key == "explainable_ids_list" and at.method.steps:
            found.append(same(name, *_explained(at, given)))
        else:
            found.append(unchecked(name))
    return found


def _explained(at: Pass, given: list[list[int]]) -> tuple[list[int], list[int]]:
    """The skipped steps, which the first thoughts must say, given and ours: without line breaks, ends and padding."""
    words = at.backbone.tokenizer
    between = {*words.encode("\n"), words.eos_token_id}
    readings = at.packed.readings[DECODER]
    rows, source = readings.packed.branches["read"], readings.source_sample
    sample = torch.zeros_like(readings.group).index_put((readings.packed.slot_sample,), source)[rows.sample]
    theirs: list[int] = []
    ours: list[int] = []
    for b, padded in enumerate(given):
        count = max((i + 1 for i, token in enumerate(padded) if token), default=0)
        steps = [token for token in padded[:count] if token not in between]
        said = [token for token in rows.target[sample == b].tolist() if token not in between]
        theirs += steps
        ours += said[: len(steps)]
    return theirs, ours


def _numbers(at: Pass, given: dict[str, Any]) -> list[Quantity]:
    found = []
    for key, value in given.items():
        name = f"{at.name}.{key}"
        if key == "loss":
            found.append(number(name, value, at.total.item()))
        elif TERMS.get(key) in at.terms:
            found.append(number(name, value, float(at.terms[TERMS[key]])))
        elif key == "aux_loss_per_thought" and at.method.steps:
            with torch.no_grad():
                found.append(array(name, torch.tensor(value), at.method.steps.per_slot(at.out)))
        elif key == "grad_norms":
            found += gradients(at.name, value, at.parameters())
        else:
            found.append(unchecked(name))
    return found


def _arrays(at: Pass, given: dict[str, Tensor]) -> list[Quantity]:
    found = []
    for key, value in given.items():
        name = f"{at.name}.{key}"
        if key == "logits":
            logits = at.backbone.logits(at.out.hidden[-1]).detach()
            theirs = value[at.case.real] if value.shape[:2] == at.case.real.shape else value
            found.append(array(name, theirs, logits[at.real]))
        elif key == "thought_embeds":
            found.append(array(name, value, at.fed[at.packed.latents]))
        elif key.startswith("aux_logits_thought") and at.method.steps:
            real, logits = at.thought(int(key.removeprefix("aux_logits_thought")))
            found.append(where(name, real, value[:, : real.shape[1]], logits))  # the published rows are padded further
        else:
            found.append(unchecked(name))
    return found
