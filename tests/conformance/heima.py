"""Heima's numbers, met by Heima and its Interpreters through layout, pack, read, Outcome and loss.

Batches and texts are rebuilt by the methods and held against the given ids and labels; only the interpreters' prompts,
which aren't in words, are given to them. Padding is whatever it is: nothing real sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import masks
from engine.backbones.load import around
from engine.backbones.text import TextLM
from engine.data.samples import Sample
from engine.layout import Packed, Piece, Readings, Special, pack
from engine.methods.heima import CONCLUSION, Heima, Interpreters, thinking_tokens
from engine.methods.method import Outcome, holes_filled, read, run
from tests.conformance.folder import (
    IGNORED,
    Numerals,
    below,
    gradients,
    model,
    needed,
    numerals,
    read_json,
    told,
    where,
)
from tests.conformance.quantities import Quantity, array, number, same, unchecked

OPENING = "<opening>"  # what every text begins with


@dataclass(frozen=True)
class Given(Interpreters):
    """Interpreters whose prompts are the folder's."""

    # (sample, section) -> what stands around the thought
    prompts: dict[tuple[Sample, str], tuple[str, str]] = field(default_factory=dict)

    def asked(
        self, sample: Sample, section: str, rng: np.random.Generator
    ) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        before, after = self.prompts[sample, section]
        return (Special(OPENING), before), (after,)


@dataclass(frozen=True)
class Folder:
    """The parts of a folder, as the engine takes them."""

    inputs: dict[str, Any]
    sections: tuple[str, ...]  # upper case, in their order
    per_section: int
    backbone: TextLM
    companions: nn.ModuleDict
    samples: list[Sample]
    prompts: dict[tuple[Sample, str], tuple[str, str]]

    @property
    def interpreters(self) -> Given:
        read = tuple(self.companions)
        return Given(len(self.sections), self.per_section, self.sections, interpreted=read, prompts=self.prompts)

    def packed(self, method: Heima) -> Packed:
        layouts = [method.layout(sample, np.random.default_rng(0)) for sample in self.samples]
        return pack(layouts, self.backbone.encode, self.backbone.pad)

    def run(self, method: Heima) -> tuple[Outcome, Tensor, dict[str, Tensor]]:
        """Forward and backward: -> outcome, total, terms."""
        for module in (self.backbone.model, self.companions):
            module.zero_grad(set_to_none=True)
        out = run(self.backbone, self.packed(method), companions=self.companions)
        total, terms = method.loss(out)
        total.backward()
        return out, total, terms


def check(path: Path) -> list[Quantity]:
    """Every quantity of a folder: the main model's stages, then its interpreters."""
    folder = _load(path)
    expected, arrays, found = told(path, "main", "interpreter", optional="step5_current_loss")
    known: list[str] = []
    for case in folder.inputs["main"]:
        name = case["name"]
        given = expected["main"].get(name, {})
        found += needed(f"main.{name}", given, "loss")
        found += _stage(folder, f"main.{name}", case, given, below(arrays, f"main.{name}"))
        known.append(name)
    found += [unchecked(f"main.{name}") for name in expected["main"] if name not in known]
    found += _interpreters(folder, expected, arrays)
    names = [f"main.{name}." for name in known] + [f"interpreter.{name.lower()}." for name in folder.companions]
    return found + [unchecked(key) for key in arrays if not key.startswith(tuple(names))]


def _load(path: Path) -> Folder:
    inputs = read_json(path / "inputs.json")
    special, count = inputs["special_ids"], inputs["num_thinking_tokens_per_stage"]
    whole = max(inputs["main"], key=lambda case: len(case["compressed_stages"]))
    sections = tuple(name.upper() for name in whole["compressed_stages"])
    ids, row = {OPENING: special["bos"]}, whole["tokens"][0]
    for name, mark in zip(sections, special["section_open"], strict=False):
        place = row.index(mark) + 1
        ids |= zip(thinking_tokens(name, count), row[place : place + count], strict=True)
    tags = list(zip((*sections, CONCLUSION), special["section_open"], special["section_close"], strict=True))
    phrases = {mark: [i] for name, start, end in tags for mark, i in ((f"<{name}>", start), (f"</{name}>", end))}
    backbone = TextLM(model(path, "main"), Numerals(ids, {**phrases, "\n": []}, special["pad"], special["eos"]))
    read = [name for name in sections if name.lower() in inputs["interpreter"]]
    companions = nn.ModuleDict({name: model(path, name.lower()) for name in read})
    samples = [_sample(row, sections, special["bos"]) for row in inputs["rows"]]
    prompts = {}
    for name in read:
        for row, sample, text in zip(inputs["rows"], samples, _texts(inputs, name), strict=True):
            thought = [ids[token] for token in thinking_tokens(name, count)]
            first = next(i for i in range(len(text)) if text[i : i + count] == thought)
            told = len(row[name.lower()]) + 1  # the section's text and the end
            prompts[sample, name] = numerals(text[1:first]), numerals(text[first + count : -told])
    return Folder(inputs, sections, count, backbone, companions, samples, prompts)


def _sample(row: dict[str, list[int]], sections: tuple[str, ...], opening: int) -> Sample:
    steps = tuple(numerals(row[name.lower()]) for name in sections)
    question, answer = numerals([opening, *row["question"]]), numerals(row["conclusion"])
    return Sample(None, question, (), steps, answer, dialect="plain", sections=sections)


def _texts(inputs: dict[str, Any], section: str) -> list[list[int]]:
    """An interpreter's texts without padding, which has no label."""
    given = inputs["interpreter"][section.lower()]
    pairs = zip(given["tokens"], given["labels"], strict=True)
    return [[token for token, label in zip(*row, strict=True) if label != IGNORED] for row in pairs]


def _inputs(name: str, given: dict[str, Any], packed: Packed, branch: str) -> list[Quantity]:
    """The method's rows are the published ones. A label belongs to the row before it, so the first is nobody's."""
    real, rows = packed.node >= 0, packed.branches[branch]
    ours = {"tokens": packed.ids, "labels": torch.full_like(packed.ids, IGNORED)}
    ours["labels"][rows.sample, rows.row + 1] = rows.target
    theirs = {key: torch.tensor(given[key]) for key in ours}
    theirs["labels"][:, 0] = IGNORED
    width = max(real.shape[1], theirs["tokens"].shape[1])  # either may be padded further

    def padded(rows: Tensor, fill: int = IGNORED) -> Tensor:
        return functional.pad(rows, (0, width - rows.shape[1]), value=fill)

    tokens = [padded(x["tokens"])[padded(real, False)] for x in (theirs, ours)]
    labels = [padded(x["labels"]).flatten() for x in (theirs, ours)]
    return [same(f"{name}.tokens", *tokens), same(f"{name}.labels", *labels)]


def _stage(folder: Folder, name: str, case: dict, given: dict[str, Any], arrays: dict[str, Tensor]) -> list[Quantity]:
    """One batch of the main model, with the sections that `case` says compressed."""
    count = len(case["compressed_stages"])
    if tuple(stage.upper() for stage in case["compressed_stages"]) != folder.sections[:count]:
        return [unchecked(name)]
    out, total, _ = folder.run(Heima(count, folder.per_section, folder.sections))
    rows = len(out.packed.branches["answer"].row)
    found = _inputs(name, case, out.packed, "answer")
    counts = {"num_label_tokens_unshifted": rows, "num_label_tokens_shifted": rows}  # the first token is no label
    found += _numbers(name, given, {"loss": total.item(), **counts}, folder.backbone.model)
    for key, value in arrays.items():
        if key == "logits":
            logits = folder.backbone.logits(out.hidden[-1]).detach()
            found.append(where(f"{name}.{key}", out.packed.node >= 0, value, logits))
        else:
            found.append(unchecked(f"{name}.{key}"))
    return found


def _interpreters(folder: Folder, expected: dict[str, Any], arrays: dict[str, Tensor]) -> list[Quantity]:
    """What each section's reader makes of the states in the batch whose sections are all compressed."""
    whole, _, _ = folder.run(Heima(len(folder.sections), folder.per_section, folder.sections))
    branch = whole.branch("answer")
    current = len(branch.rows.row) * branch.cross_entropy("tokens").item()
    out, _, terms = folder.run(folder.interpreters)
    found = []
    for name in folder.companions:
        section, readings = name.lower(), out.packed.readings[name]
        title = f"interpreter.{section}"
        found += _inputs(title, folder.inputs["interpreter"][section], readings.packed, "read")
        rows = len(readings.packed.branches["read"].row)
        unshifted = rows + len(readings.group)  # a text's first token is a label too, which nothing predicts
        ours = {
            "loss": terms[name].item(), "loss_without_injection": _blind(folder, out, name),
            "num_label_tokens_unshifted": unshifted, "num_label_tokens_shifted": rows,
        }  # fmt: skip
        given = expected["interpreter"].get(section, {})
        found += needed(title, given, "loss") + _numbers(title, given, ours, folder.companions[name])
        found += _read(folder, out, readings, name, below(arrays, title))
        current += unshifted * terms[name].item()
    found += [
        unchecked(f"interpreter.{key}") for key in expected["interpreter"] if key.upper() not in folder.companions
    ]
    if "step5_current_loss" in expected:
        found.append(number("step5_current_loss", expected["step5_current_loss"], current))
    return found


def _numbers(name: str, given: dict[str, Any], ours: dict[str, Any], module: nn.Module) -> list[Quantity]:
    found = []
    for key, value in given.items():
        if key == "grad_norms":
            found += gradients(name, value, dict(module.named_parameters(remove_duplicate=False)))
        elif key in ours:
            kind = same if key.startswith("num_") else number
            found.append(kind(f"{name}.{key}", value, ours[key]))
        else:
            found.append(unchecked(f"{name}.{key}"))
    return found


@torch.no_grad()
def _blind(folder: Folder, out: Outcome, name: str) -> float:
    """The loss with the thinking tokens' ordinary embeddings left in their places."""
    reader, inner = around(folder.companions[name], folder.backbone.tokenizer), out.packed.readings[name].packed
    ordinary = reader.embed_ids(inner.ids)[inner.slot_sample, inner.slot_row]
    each, _, _ = read(out, reader, name, fed=lambda _: ordinary)
    return each.mean().item()


@torch.no_grad()
def _read(folder: Folder, out: Outcome, readings: Readings, name: str, arrays: dict[str, Tensor]) -> list[Quantity]:
    reader, inner = around(folder.companions[name], folder.backbone.tokenizer), readings.packed
    embeds = holes_filled(out, readings, reader)
    last = reader.forward(embeds, inner.positions, masks.additive(masks.visible(inner), embeds.dtype)).last
    states = out.hidden[-1][readings.source_sample, readings.source_row]
    found = []
    for key, value in arrays.items():
        title = f"interpreter.{name.lower()}.{key}"
        if key == "logits":
            found.append(where(title, inner.node >= 0, value, reader.logits(last)))
        elif key == "thinking_hidden":
            found.append(array(title, value, states.reshape(len(folder.samples), folder.per_section, -1)))
        else:
            found.append(unchecked(title))
    return found
