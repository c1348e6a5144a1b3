"""Implicit-Video-Reasoning's numbers, met by PauseDistillation through pack, masks, one forward, Outcome and loss.

`expected.*` is what the released code computes: PauseDistillation.as_published(). `expected_independent.*` has the
right positions in the decoder pass too: the same without `compat`. Its numbers under transformers 5.23's own rule for
what follows a video are met with that rule's positions; the engine itself keeps to the rule of the model's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine import masks, objectives
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample
from engine.layout import Layout, Packed, Piece, Segment, Visual, pack
from engine.methods.method import Outcome, run
from engine.methods.pause import PauseDistillation
from tests.conformance.folder import IGNORED, Numerals, below, gradients, model, needed, numerals, read_json, told
from tests.conformance.quantities import Quantity, array, number, same, unchecked
from tests.rows import branch_rows

NAMES = {  # the folder's names for special tokens -> the engine's
    "pause": "<pause>", "begin_cot": "<COT>", "begin_ans": "<ANS>", "im_start": "<|im_start|>", "im_end": "<|im_end|>",
    "answer_start": "<answer>", "answer_end": "</answer>", "think_start": "<think>", "think_end": "</think>",
    "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
}  # fmt: skip
BRANCHES = {"decoder": "speak", "answer": "answer", "teacher": "teacher"}  # the folder's names -> the method's
TERMS = {"ce_decoder": "decode", "ce_answer": "answer", "ce_teacher": "teacher", "kd": "distil"}


class GivenPixels(Qwen25VL):
    """The backbone, taking patches as the published processor normalised them."""

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        return self.encode_pixels(patches, grids)


@dataclass(frozen=True)
class Golden:
    """One sample of a folder: the ids of its three sequences, and the same as the engine's sample and prompt.

    `lead` and `tail`: what the solution has before its last answer, and behind it.
    """

    given: dict[str, Any]
    sample: Sample
    prompt: Segment
    lead: Segment
    tail: Segment

    @property
    def name(self) -> str:
        return self.given["name"]

    def layout(self, method: PauseDistillation) -> Layout:
        """The method's own layout, behind the given prompt instead of the engine's, and with the given words around the answer."""
        count = self.given["num_pauses"]
        made = replace(method, pauses=(count, count)).layout(self.sample, np.random.default_rng(0))
        (own,) = {path[0] for path in made.branches.values()}

        def behind(segment: Segment) -> Segment:
            if segment is own:
                return self.prompt
            seen = segment.sees or ()
            return replace(segment, sees=tuple(map(behind, seen))) if own in seen else segment

        def around(path: tuple[Segment, ...]) -> tuple[Segment, ...]:
            for i, segment in enumerate(path):
                if segment.name == "answer":  # between its tags
                    return (*path[: i - 1], self.lead, *path[i - 1 : i + 2], self.tail, *path[i + 2 :])
            return path

        branches = {name: around(tuple(map(behind, path))) for name, path in made.branches.items()}
        return replace(made, branches=branches)


def _load(folder: Path) -> tuple[GivenPixels, list[Golden]]:
    config, inputs = read_json(folder / "config.json"), read_json(folder / "inputs.json")
    special = inputs["special_ids"]
    names = {ours: special[theirs] for theirs, ours in NAMES.items()}
    words = Numerals(names, {"\n": [special["newline"]]}, special["pad"], special["im_end"])
    pixels = load_file(folder / "inputs.safetensors")
    backbone = GivenPixels(model(folder, next(iter(config["models"]))), words)
    return backbone, [_golden(g, special, pixels.get(f"{g['name']}.pixel_values")) for g in inputs["samples"]]


def _golden(given: dict[str, Any], special: dict[str, int], pixels: Tensor | None) -> Golden:
    still = given["kind"] == "image"
    # transformers 4.52.4, which the numbers come from, cuts a fraction of a second off; unsaid, it takes a second.
    seconds = 0.0 if still else float(int(1.0 if given["second_per_grid_ts"] is None else given["second_per_grid_ts"]))
    visual = None if pixels is None else Visual(pixels, tuple(given["grid_thw"]), seconds, still)
    seen = {special[name] for name in ("vision_start", "image_token_id" if still else "video_token_id", "vision_end")}
    start, ids = given["prompt_len"], given["input_ids"]
    pieces: list[Piece] = []
    for is_seen, run_of_ids in groupby(ids["decoder"][:start], lambda i: i in seen):
        pieces.append(visual if is_seen and visual else numerals(run_of_ids))
    # Both end with im_end and a line break.
    spoken = ids["decoder"][ids["decoder"].index(special["begin_cot"], start) + 1 : -2]
    answered = ids["answer"][ids["answer"].index(special["begin_ans"], start) + 1 : -2]
    if spoken[:1] != [special["think_start"]] or spoken[-1] != special["think_end"]:
        raise ValueError(f"{spoken} should begin with {special['think_start']} and end with {special['think_end']}.")
    first, last = (len(answered) - 1 - answered[::-1].index(special[tag]) for tag in ("answer_start", "answer_end"))
    sample = Sample(visual, "", (), (numerals(spoken[1:-1]),), numerals(answered[first + 1 : last]))
    lead, tail = (Segment("target", (numerals(x),)) for x in (answered[:first], answered[last + 1 :]))
    return Golden(given, sample, Segment("context", tuple(pieces)), lead, tail)


@dataclass(frozen=True)
class Pass:
    """One packed forward of one sample, and where each of its sequences stands in it."""

    out: Outcome
    rows: dict[str, list[int]]  # by the folder's names
    total: Tensor
    terms: dict[str, Tensor]

    @property
    def packed(self) -> Packed:
        return self.out.packed

    def positions(self, sequence: str) -> Tensor:
        return self.packed.positions[:, 0, self.rows[sequence]]

    def logits(self, sequence: str, start: int) -> Tensor:
        return self.out.backbone.logits(self.out.hidden[-1][0, self.rows[sequence][start:]]).detach()

    def labels(self, sequence: str) -> list[int]:
        supervised = self.packed.branches[BRANCHES[sequence]]
        target = dict(zip(supervised.row.tolist(), supervised.target.tolist(), strict=True))
        rows = self.rows[sequence]
        return [IGNORED, *(target.get(row, IGNORED) for row in rows[:-1])]

    def predicting(self, sequence: str) -> tuple[list[int], Tensor]:
        """Where in the sequence the answer is predicted, and the states that predict it [layers, positions, dim]."""
        branch = self.out.branch(BRANCHES[sequence])
        chosen = branch.rows.name == branch.rows.names.index("answer")
        positions = [self.rows[sequence].index(row) for row in branch.rows.row[chosen].tolist()]
        states, _ = branch.predicting("answer")
        return positions, torch.stack(states).detach()


def _pass(backbone: Qwen25VL, golden: Golden, method: PauseDistillation, native: Sequence[str] = ()) -> Pass:
    """`native`: the sequences that have the positions of the installed transformers' own rule."""
    layout = golden.layout(method)
    packed = pack([layout], backbone.encode, backbone.pad)
    every = branch_rows(layout, backbone.encode)
    rows = {theirs: every[ours] for theirs, ours in BRANCHES.items()}
    for sequence in native:
        packed.positions[:, 0, rows[sequence]] = _native(backbone, golden, packed.ids[:, rows[sequence]])
    out = run(backbone, packed)
    total, terms = method.loss(out)
    return Pass(out, rows, total, terms)


def check(folder: Path) -> list[Quantity]:
    """Every quantity of a folder, in the order of its samples."""
    backbone, samples = _load(folder)
    numbers, arrays, found = told(folder, "samples")
    expected = numbers["samples"]
    right: dict[str, Any] = {}
    right_arrays: dict[str, Tensor] = {}
    if (folder / "expected_independent.json").is_file():
        numbers, right_arrays, missed = told(folder, "samples", stem="expected_independent")
        right, found = numbers["samples"], found + missed
    compat = PauseDistillation.as_published()
    for golden in samples:
        name = golden.name
        backbone.model.zero_grad(set_to_none=True)
        published = _pass(backbone, golden, compat)
        published.total.backward()
        with torch.no_grad():
            correct = _pass(backbone, golden, replace(compat, compat=False))
        found += _inputs(golden, published)
        found += needed(name, expected.get(name, {}), *TERMS, "total")
        found += _numbers(backbone, name, expected.get(name, {}), published)
        found += _arrays(golden, below(arrays, name), published, correct)
        if name in right:
            found += _independent(backbone, golden, right[name], below(right_arrays, name), correct)
    found += _batch(backbone, samples, expected, compat)
    names = [golden.name for golden in samples]
    found += [unchecked(name) for name in expected.keys() | right.keys() if name not in names]
    known = tuple(f"{name}." for name in names)
    return found + [unchecked(key) for key in arrays.keys() | right_arrays.keys() if not key.startswith(known)]


def _inputs(golden: Golden, at: Pass) -> list[Quantity]:
    """The method's layout is the published one: the same ids, the same of them supervised."""
    found = []
    for sequence, ids in golden.given["input_ids"].items():
        rows = at.rows[sequence]
        found.append(same(f"{golden.name}.{sequence}.input_ids", ids, at.packed.ids[0, rows]))
        found.append(same(f"{golden.name}.{sequence}.labels", golden.given["labels"][sequence], at.labels(sequence)))
    return found


def _numbers(backbone: Qwen25VL, name: str, given: dict[str, Any], at: Pass) -> list[Quantity]:
    found = []
    for key, value in given.items():
        if key in TERMS:
            found.append(number(f"{name}.{key}", value, float(at.terms[TERMS[key]])))
        elif key == "total":
            found.append(number(f"{name}.total", value, at.total.item()))
        elif key.startswith("kd_positions_"):
            found.append(same(f"{name}.{key}", value, at.predicting(key.removeprefix("kd_positions_"))[0]))
        elif key == "decoder_positions_are_1d":
            positions = at.positions("decoder")
            plain = bool((positions == torch.arange(positions.shape[1])).all())
            found.append(same(f"{name}.{key}", value, plain))
        elif key == "grad_norms":
            found += gradients(name, value, dict(backbone.model.named_parameters(remove_duplicate=False)))
        else:
            found.append(unchecked(f"{name}.{key}"))
    return found


def _arrays(golden: Golden, given: dict[str, Tensor], published: Pass, correct: Pass) -> list[Quantity]:
    found = []
    for key, value in given.items():
        name = f"{golden.name}.{key}"
        sequence, _, what = key.partition(".")
        if key == "decoder_visible":
            rows = published.rows["decoder"]
            seen = masks.visible(published.packed)[0][rows][:, rows]
            found.append(same(name, value.bool(), seen))
        elif what == "position_ids":
            found.append(same(name, value, published.positions(sequence)))
        elif what == "position_ids_mrope":
            found.append(same(name, value, correct.positions(sequence)))
        elif what == "logits_from_prompt_end":
            found.append(array(name, value, published.logits(sequence, golden.given["prompt_len"])))
        elif what == "pause_hidden_last":
            start = golden.given["prompt_len"]
            rows = published.rows[sequence][start : start + golden.given["num_pauses"]]
            found.append(array(name, value, published.out.hidden[-1][0, rows].detach()))
        elif what == "kd_hidden":
            found.append(array(name, value, published.predicting(sequence)[1]))
        else:
            found.append(unchecked(name))
    return found


def _independent(
    backbone: Qwen25VL, golden: Golden, given: dict[str, Any], arrays: dict[str, Tensor], correct: Pass
) -> list[Quantity]:
    """The numbers that no published code gives: mRoPE positions in the decoder pass too."""
    name = golden.name
    right = {key: float(correct.terms[term]) for key, term in TERMS.items()} | {"total": correct.total.item()}
    found = []
    for part, value in given.items():
        if part == "native_5_23_positions_agree_with_4_52":
            found.append(same(f"{name}.{part}", value, _native_agrees(backbone, golden, correct)))
        elif part == "decoder_with_mrope":
            found += [_named(f"{name}.{part}.{key}", number, x, right.get(key)) for key, x in value.items()]
        elif part == "with_5_23_positions":
            native = _with_native(backbone, golden)
            found += [_named(f"{name}.{part}.{key}", number, x, native.get(key)) for key, x in value.items()]
        else:
            found.append(unchecked(f"{name}.{part}"))
    for key, value in arrays.items():
        if key == "decoder_with_mrope.logits_from_prompt_end":
            found.append(array(f"{name}.{key}", value, correct.logits("decoder", golden.given["prompt_len"])))
        else:
            found.append(unchecked(f"{name}.{key}"))
    return found


def _named(name: str, compare: Any, expected: float, got: float | None) -> Quantity:
    return unchecked(name) if got is None else compare(name, expected, got)


def _native(backbone: Qwen25VL, golden: Golden, ids: Tensor) -> Tensor:
    """The installed transformers' own positions of one sequence: ids [1, length] -> [3, length]."""
    config, visual, seconds = backbone.model.config, golden.sample.visual, golden.given["second_per_grid_ts"]
    extra = {}
    if visual is not None:
        extra["image_grid_thw" if visual.still else "video_grid_thw"] = torch.tensor([visual.grid])
    if seconds is not None:
        extra["second_per_grid_ts"] = torch.tensor([seconds])
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    return backbone.model.model.get_rope_index(ids, kinds, **extra)[0][:, 0]


def _native_agrees(backbone: Qwen25VL, golden: Golden, correct: Pass) -> bool:
    """Whether the installed transformers' own positions are the engine's on every sequence."""
    return all(
        torch.equal(_native(backbone, golden, correct.packed.ids[:, rows]), correct.positions(sequence))
        for sequence, rows in correct.rows.items()
    )


@torch.no_grad()
def _with_native(backbone: Qwen25VL, golden: Golden) -> dict[str, float]:
    """The losses under those positions, by the folder's names; the decoder pass's with them, and with its plain ones."""
    compat = PauseDistillation.as_published()
    plain = _pass(backbone, golden, compat, ("answer", "teacher"))
    right = _pass(backbone, golden, replace(compat, compat=False), tuple(BRANCHES))
    return {key: float(right.terms[term]) for key, term in TERMS.items() if key != "ce_decoder"} | {
        "ce_decoder_mrope": float(right.terms["decode"]),
        "total_decoder_mrope": right.total.item(),
        "total_decoder_1d": plain.total.item(),
    }


def _batch(
    backbone: Qwen25VL, samples: list[Golden], expected: dict[str, Any], method: PauseDistillation
) -> list[Quantity]:
    """All samples, all branches, in one forward: each sample's losses, and the batch's total."""
    with torch.no_grad():
        layouts = [golden.layout(method) for golden in samples]
        out = run(backbone, pack(layouts, backbone.encode, backbone.pad))
        total, _ = method.loss(out)
        found = []
        for sequence, ours in BRANCHES.items():
            branch = out.branch(ours)
            rows = branch.rows
            each = objectives.sample_mean(
                objectives.token_loss(branch.logits(), rows.target), rows.sample, branch.batch
            )
            for golden, loss in zip(samples, each.tolist(), strict=True):
                given = expected.get(golden.name, {}).get(f"ce_{sequence}")
                found += [] if given is None else [number(f"batch.{golden.name}.ce_{sequence}", given, loss)]
    totals = [expected.get(golden.name, {}).get("total") for golden in samples]
    return found if None in totals else [*found, number("batch.total", sum(totals) / len(totals), total.item())]
