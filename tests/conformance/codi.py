"""CODI's and SIM-CoT-on-CODI's numbers, met by Codi through layout, pack, latents, Outcome and loss.

The published step loss cuts texts by the first row's length; `simcot_reversed` shows it. That is met under `compat`
alone: without it the engine's losses don't depend on the order of the rows, and must be those of `simcot` for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.data.samples import Sample
from engine.layout import Packed, pack
from engine.methods.coconut import LATENT, START, STOP
from engine.methods.codi import PROJECTOR, PROMPT, Codi, projector
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
)
from tests.conformance.quantities import Quantity, array, number, same, unchecked
from tests.rows import branch_rows

VARIANT = re.compile(r"(codi|simcot)(?:_factor(\d+))?(?:_reversed)?")
LAYERS = {"fc1": "up", "fc2": "down", "ln": "norm"}  # the folder's projector -> the engine's
TERMS = {"ce_loss": "answer", "ref_ce_loss": "teacher", "distill_loss": "distil", "explain_loss": "steps"}
STEPS = StepSupervision(mean="tokens", missing="ignore", first_position=0)


@dataclass(frozen=True)
class Folder:
    """The parts of a folder, as the engine takes them."""

    inputs: dict[str, Any]
    backbone: Watched
    projector: nn.Module
    explain: nn.Module

    def method(self, variant: str) -> Codi | None:
        """As published, faults included; None for a variant that isn't known."""
        told = VARIANT.fullmatch(variant)
        if told is None:
            return None
        kind, factor = told.groups()
        steps = replace(STEPS, compat=True) if kind == "simcot" else None
        return Codi(num_latent=self.inputs["num_latent"], distill_factor=float(factor or 1), steps=steps)

    def batch(self, variant: str) -> str:
        """The batch that a variant was run on."""
        names = list(self.inputs["batches"])
        return next((name for name in names if variant.endswith(name)), names[0])

    def samples(self, batch: str) -> list[Sample]:
        """Whose row is whose is told by the teacher's sequence, which has all of it."""
        given, rows = self.inputs["batches"][batch], self.inputs["rows"]
        ends = [(row["question"], [*row["cot"], *row["answer"]]) for row in rows]
        written = _real(given["ref_input_ids"], given["ref_attention_mask"])
        return [_sample(rows[whose(ids, ends, place)], self.inputs) for place, ids in enumerate(written)]


@dataclass(frozen=True)
class Pass:
    """One batch, forward and backward, and where each of its sequences stands in the pack."""

    method: Codi
    out: Outcome
    fed: Tensor  # [batch, length, dim]: the embeddings as they went in
    total: Tensor
    terms: dict[str, Tensor]
    rows: list[dict[str, list[int]]]  # a sample: the folder's name of a sequence -> its rows

    @property
    def packed(self) -> Packed:
        return self.out.packed

    def ids(self, sequence: str) -> list[list[int]]:
        return [self.packed.ids[b, rows[sequence]].tolist() for b, rows in enumerate(self.rows)]

    def predicted(self, branch: str, sequence: str) -> list[list[int]]:
        """What each row of a sequence but the last must predict."""
        table = self.packed.branches[branch]
        columns = (table.sample.tolist(), table.row.tolist(), table.target.tolist())
        target = {(b, row): token for b, row, token in zip(*columns, strict=True)}
        return [[target.get((b, row), IGNORED) for row in rows[sequence][:-1]] for b, rows in enumerate(self.rows)]

    def answer_position(self, branch: str, sequence: str) -> list[int]:
        """Where in a sequence the answer's first token stands: behind the row that predicts it."""
        table = self.packed.branches[branch]
        chosen = table.name == table.names.index("answer")
        firsts = [int(table.row[chosen & (table.sample == b)].min()) for b in range(len(self.rows))]
        return [rows[sequence].index(first) + 1 for rows, first in zip(self.rows, firsts, strict=True)]

    def logits(self, sequence: str) -> Tensor:
        """[batch, rows, ids]; zeros behind a shorter sample's rows."""
        each = [self.out.backbone.logits(self.out.hidden[-1][b, r[sequence]]) for b, r in enumerate(self.rows)]
        return nn.utils.rnn.pad_sequence(each, batch_first=True).detach()

    def thoughts(self) -> Tensor:
        """z_0 .. z_N as they were fed, and the last as it would be: [batch, N + 1, dim]."""
        last = [self.out.hidden[-1][b, rows["latents"][-1]] for b, rows in enumerate(self.rows)]
        fed = [self.fed[b, rows["latents"]] for b, rows in enumerate(self.rows)]
        unused = self.out.companions[PROJECTOR](torch.stack(last)[:, None]).detach()
        return torch.cat([torch.stack(fed), unused], dim=1)

    def explained(self) -> list[list[list[int]]]:
        """What each thought of each sample must say; nothing where it has no step."""
        readings = self.packed.readings[DECODER]
        told = readings.packed.branches["read"]
        source = torch.zeros_like(readings.group)
        source[readings.packed.slot_sample] = readings.source_sample
        said: list[list[list[int]]] = [[[] for _ in range(self.method.num_latent + 1)] for _ in self.rows]
        for reading, token in zip(told.sample.tolist(), told.target.tolist(), strict=True):
            said[int(source[reading])][int(readings.group[reading])].append(token)
        return said


def check(path: Path) -> list[Quantity]:
    """Every quantity of a folder: its batches, then its variants."""
    folder = _load(path)
    numbers, arrays, missed = told(path, "variants")
    expected = numbers["variants"]
    found = missed + _inputs(folder)
    for variant, given in expected.items():
        method = folder.method(variant)
        if method is None:
            found.append(unchecked(variant))
            continue
        at = _pass(folder, method, folder.samples(folder.batch(variant)))
        found += needed(variant, given, "loss") + _numbers(folder, variant, given, at)
        found += _arrays(folder, variant, below(arrays, variant), at)
        if method.steps:
            found += _by_default(folder, variant, replace(method, steps=STEPS), expected)
    return found + [unchecked(key) for key in arrays if key.partition(".")[0] not in expected]


def _load(path: Path) -> Folder:
    config, inputs = read_json(path / "config.json"), read_json(path / "inputs.json")
    special = inputs["special_ids"]
    # What stands in a latent's place and in a hole is replaced, so that any token will do.
    ids = {START: special["bot"], STOP: special["eot"], LATENT: special["pad"], "<pause>": special["pad"]}
    words = Numerals(ids, {"\n": [], PROMPT: inputs["answer_prompt"]}, special["pad"], special["eos"])
    weights = load_file(path / config["prj"]["weights"])
    inner, dim = weights["fc1.weight"].shape
    made = projector(dim, inner, 0.0)
    made.load_state_dict({f"{LAYERS[k.partition('.')[0]]}.{k.partition('.')[2]}": v for k, v in weights.items()})
    return Folder(inputs, Watched(model(path, "base"), words, []), made, model(path, "explain"))


def _sample(row: dict[str, list[int]], inputs: dict[str, Any]) -> Sample:
    """One row of a folder; a step of the chain ends with its mark."""
    steps: list[list[int]] = [[]]
    for token in row["cot"]:
        steps[-1].append(token)
        if token == inputs["special_ids"]["step_end"]:
            steps.append([])
    answer = row["answer"][len(inputs["answer_prompt"]) : -1]
    texts = tuple(numerals(step) for step in steps if step)
    return Sample(None, numerals(row["question"]), (), texts, numerals(answer), dialect="plain")


def _real(rows: list[list[int]], mask: list[list[int]]) -> list[list[int]]:
    return [[i for i, real in zip(ids, reals, strict=True) if real] for ids, reals in zip(rows, mask, strict=True)]


def _pass(folder: Folder, method: Codi, samples: list[Sample]) -> Pass:
    backbone, companions = folder.backbone, nn.ModuleDict({PROJECTOR: folder.projector, DECODER: folder.explain})
    for module in (backbone.model, companions):
        module.zero_grad(set_to_none=True)
    backbone.calls.clear()
    layouts = [method.layout(sample, np.random.default_rng(0)) for sample in samples]
    out = run(backbone, pack(layouts, backbone.encode, backbone.pad), method.feedback(companions), companions)
    fed = torch.cat([embeds for embeds, _ in backbone.calls], dim=1)
    total, terms = method.loss(out)
    total.backward()
    rows = []
    for layout, node, latents in zip(layouts, out.packed.node, out.packed.latents, strict=True):
        shift = int((node >= 0).int().argmax())
        student, teacher = ([shift + r for r in branch_rows(layout, backbone.encode)[b]] for b in ("answer", "teacher"))
        first, last = (student.index(r) for r in latents.nonzero()[[0, -1], 0].tolist())
        parts = {"encoder": student[:first], "latents": student[first : last + 1], "decoder": student[last + 1 :]}
        rows.append({**parts, "ref": teacher})
    return Pass(method, out, fed, total, terms, rows)


def _inputs(folder: Folder) -> list[Quantity]:
    """The method's layout is the published batch, on every row that isn't padding."""
    found = []
    explained = {key.removeprefix("explain_slots_"): key for key in folder.inputs if key.startswith("explain_slots_")}
    for batch, given in folder.inputs["batches"].items():
        at = _pass(folder, Codi(num_latent=folder.inputs["num_latent"], steps=STEPS), folder.samples(batch))
        decoded = [[label != IGNORED for label in labels] for labels in given["labels"]]
        real = {"encoder": given["encoder_attention_mask"], "ref": given["ref_attention_mask"], "decoder": decoded}
        for key, value in given.items():
            name, sequence = f"{batch}.{key}", key.partition("_")[0]
            if key.endswith("_input_ids"):
                found.append(same(name, _flat(_real(value, real[sequence])), _flat(at.ids(sequence))))
            elif key.endswith("_attention_mask"):
                found.append(same(name, [sum(row) for row in value], [len(ids) for ids in at.ids(sequence)]))
            elif key == "labels":  # the first one is nobody's to predict
                theirs = [row[1:] for row in _real(value, decoded)]
                found.append(same(name, _flat(theirs), _flat(at.predicted("answer", "decoder"))))
            elif key == "ref_labels":
                theirs = [row[1:] for row in _real(value, real["ref"])]
                found.append(same(name, _flat(theirs), _flat(at.predicted("teacher", "ref"))))
            elif key == "ref_answer_position":
                found.append(same(name, value, at.answer_position("teacher", "ref")))
            elif key == "model_answer_position":
                found.append(same(name, value, at.answer_position("answer", "decoder")))
            else:
                found.append(unchecked(name))
        if batch in explained:
            pad = [folder.inputs["special_ids"]["pad"]]  # stands for a slot without a step
            ours = [[ids or pad for ids in sample] for sample in at.explained()]
            found.append(
                same(explained.pop(batch), _flat(_flat(folder.inputs[f"explain_slots_{batch}"])), _flat(_flat(ours)))
            )
    return found + [unchecked(key) for key in explained.values()]


def _flat(rows: list[Any]) -> list[Any]:
    return [item for row in rows for item in row]


def _ours(at: Pass) -> dict[str, float]:
    """The terms by the folder's names, where distillation has its factor in it."""
    ours = {theirs: float(at.terms[name]) for theirs, name in TERMS.items() if name in at.terms}
    return ours | {"distill_loss": at.method.distill_factor * ours["distill_loss"], "loss": at.total.item()}


def _per_slot(at: Pass) -> list[float]:
    if at.method.steps is None:
        return []
    with torch.no_grad():
        return at.method.steps.per_slot(at.out, at.out.companions[PROJECTOR]).tolist()


def _numbers(folder: Folder, variant: str, given: dict[str, Any], at: Pass) -> list[Quantity]:
    ours, found = _ours(at), []
    for key, value in given.items():
        name = f"{variant}.{key}"
        if key in ours:
            found.append(number(name, value, ours[key]))
        elif key == "explain_loss_per_slot":
            found.append(array(name, torch.tensor(value), torch.tensor(_per_slot(at))))
        elif key == "loss_fn_calls_in_order":
            calls = [*_per_slot(at), ours["ce_loss"], ours["ref_ce_loss"]]
            found.append(array(name, torch.tensor(value), torch.tensor(calls)))
        elif key == "grad_norms":
            known = parameters(base=folder.backbone.model, prj=folder.projector, explain=folder.explain)
            for theirs, name_ in LAYERS.items():
                known |= {k.replace(f"prj.{name_}.", f"prj.{theirs}."): p for k, p in known.items()}
            found += gradients(variant, value, known)
        else:
            found.append(unchecked(name))
    return found


def _arrays(folder: Folder, variant: str, given: dict[str, Tensor], at: Pass) -> list[Quantity]:
    found = []
    for key, value in given.items():
        if key == "student_logits":
            labels = torch.tensor(folder.inputs["batches"][folder.batch(variant)]["labels"])
            found.append(where(f"{variant}.{key}", labels != IGNORED, value, at.logits("decoder")))
        elif key == "latents":
            found.append(array(f"{variant}.{key}", value, at.thoughts()))
        else:
            found.append(unchecked(f"{variant}.{key}"))
    return found


def _by_default(folder: Folder, variant: str, method: Codi, expected: dict[str, Any]) -> list[Quantity]:
    """Without `compat`, rows in any order give the published losses of the order in which nothing is cut."""
    whole = variant.removesuffix("_reversed")
    first, *others = _pass(folder, method, folder.samples(folder.batch(whole))).explained()
    if whole not in expected or any(len(x) > len(first[slot]) + 1 for said in others for slot, x in enumerate(said)):
        return []
    ours = _ours(_pass(folder, method, folder.samples(folder.batch(variant))))
    return [number(f"{variant}.by_default.{k}", expected[whole][k], ours[k]) for k in ours if k in expected[whole]]
