"""One clip's thoughts seen from inside, for the page: what each slot says, where it looked, whether it matters.

Everything goes on from what thinking left in the cache. Knows neither pages nor files, and not whether an answer is true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import generate
from engine.data.samples import Sample, letter
from engine.generate import Thoughts, Written
from engine.insight import attention, lens, similarity, spoken
from engine.insight import replace as matter
from engine.insight.attention import Looked
from engine.insight.subject import Subject
from engine.layout import Frames, Special

UNTOUCHED = "as they are"
MOST_PICTURES = 12  # slices whose pictures are kept


@dataclass(frozen=True)
class Inside:
    """All on the CPU; empty or None where the model, or the question, has no such thing."""

    alone: tuple[str, ...]  # what each slot says when nothing else is seen
    taught: tuple[str, ...]  # what the step decoder that taught the slots (SIM-CoT) says of each
    looked: Looked | None  # means over layers and heads; rows: the slots, then the markers, the last of which predicts
    pictures: np.ndarray  # uint8 [pictures, height, width, 3]: the middle frame of slices `pictured`
    pictured: tuple[int, ...]
    moments: tuple[float, ...]  # seconds from the clip's start to the middle of each of these slices
    changes: Mapping[str, tuple[float, ...]]  # each option's probability under each change; the first changes nothing
    donors: Mapping[str, tuple[float, ...]]  # and what the clips say themselves whose slots were put in
    fewer: tuple[tuple[float, ...], ...]  # the same with the first 0, 1, .. slots only
    words: list[list[list[tuple[str, float]]]]  # [layers + 1][slots]: the likeliest tokens, by the lens
    tuned: bool  # by the tuned lens, or the plain one
    steps: Tensor | None  # [layers + 1, steps, dim]: states at the ends of the written chain's steps
    collapse: Mapping[str, Tensor]  # `similarity.collapse`: a [layers + 1] each


@torch.no_grad()
def look(
    subject: Subject, sample: Sample, thoughts: Thoughts, said: str, chain: Written | None, donors: Mapping[str, Sample],
    heed: Callable[[], None] = generate.unheeded,
) -> Inside | None:  # fmt: skip
    """thoughts: of this sample alone; said: its thoughts as they were spoken; heed: is called before each part and each token,
    and ends the looking by raising. None where there are no slots."""
    if not thoughts.count:
        return None
    backbone, method = subject.backbone, subject.method
    lines = len(said.splitlines())
    told = spoken.taught(backbone, method, subject.companions, thoughts, lines, heed=heed)[0] if lines else []
    heed()
    looked, pictures, pictured, moments = _looked(subject, sample, thoughts)
    shares, own, fewer = _changed(subject, sample, thoughts, donors, heed)
    heed()
    said_by_layers = lens.words(backbone, lens.logits(backbone, thoughts.states[:, 0], subject.tuned))
    heed()
    words = similarity.vocabulary(backbone.model.get_input_embeddings().weight)
    held = similarity.collapse(thoughts.states[:, 0].float(), words)
    heed()
    return Inside(
        tuple(spoken.alone(backbone, thoughts, heed=heed)[0]) if subject.method.speaks else (),
        tuple(told),
        looked, pictures, pictured, moments, shares, own, fewer, said_by_layers, subject.tuned is not None,
        spoken.step_states(backbone, chain).float().cpu() if chain else None, held,
    )  # fmt: skip


Shares = dict[str, tuple[float, ...]]


def _changed(
    subject: Subject, sample: Sample, thoughts: Thoughts, donors: Mapping[str, Sample], heed: Callable[[], None]
) -> tuple[Shares, Shares, tuple[tuple[float, ...], ...]]:  # fmt: skip
    """The replacement test and the test with fewer slots, in one pass behind the cached prefix."""
    if not sample.options:
        return {}, {}, ()
    backbone, method = subject.backbone, subject.method
    letters = [letter(i) for i in range(len(sample.options))]
    contents, theirs = {}, {}
    for name, donor in donors.items():
        heed()
        other = subject.think([donor])
        contents[name] = matter.held(backbone, other)
        theirs[name] = tuple(
            generate.option_probabilities(backbone, other, letters, [*map(Special, method.lead)])[0].tolist()
        )
    heed()
    changes = matter.changes(matter.held(backbone, thoughts), contents)
    every = [*changes, *matter.first_ones(thoughts.count)]
    shares = matter.probabilities(backbone, thoughts, every, letters, matter.marks(method))[:, 0].tolist()
    named = {change.name: tuple(row) for change, row in zip(changes, shares)}
    return named, theirs, tuple(map(tuple, shares[len(changes) :]))


def _looked(
    subject: Subject, sample: Sample, thoughts: Thoughts
) -> tuple[Looked | None, np.ndarray, tuple[int, ...], tuple[float, ...]]:  # fmt: skip
    """Attention to the clip, with the middle frame of every slice, or of as many as may be shown, and its moment."""
    clip = sample.visual
    if not isinstance(clip, Frames):
        return None, np.empty(0), (), ()
    try:
        looked = attention.looked(subject.backbone, thoughts, [sample], subject.method.lead)[0]
    except ValueError:  # a picture whose tiles are no grid
        return None, np.empty(0), (), ()
    slices = looked.patches.shape[-3]
    shown = np.linspace(0, slices - 1, min(slices, MOST_PICTURES)).round().astype(int)
    count = len(clip.pixels)
    each = max(1, round(looked.seconds / clip.seconds))  # frames of a slice; the last may have fewer
    first, end = shown * each, (shown * each + each).clip(max=count)
    middle = ((first + end) // 2).clip(max=count - 1)
    # Layers and heads are many, and their mean is all that is shown.
    patches, slots = (each.float().mean((0, 1), keepdim=True).cpu() for each in (looked.patches, looked.slots))
    kept = replace(looked, patches=patches, slots=slots)
    return kept, clip.pixels[middle], tuple(shown.tolist()), tuple(((first + end) / 2 * clip.seconds).tolist())


def as_json(inside: Inside) -> dict[str, Any]:
    """In JSON's own types, numbers rounded to 5 digits, without the pictures."""
    looked = inside.looked
    return {
        "alone": list(inside.alone),
        "taught": list(inside.taught),
        "looked": looked and {
            "seconds_a_slice": looked.seconds,
            "patches": _rounded(looked.patches.mean((0, 1))),
            "slots": _rounded(looked.slots.mean((0, 1))),
        },
        "changes": {name: _rounded(torch.tensor(row)) for name, row in inside.changes.items()},
        "said_by_donors": {name: _rounded(torch.tensor(row)) for name, row in inside.donors.items()},
        "fewer_slots": _rounded(torch.tensor(inside.fewer)),
        "lens": {"kind": "tuned" if inside.tuned else "plain", "words": inside.words},
        "written_steps": None if inside.steps is None else _rounded(inside.steps),
        "collapse": {name: _rounded(layer) for name, layer in inside.collapse.items()},
    }  # fmt: skip


def _rounded(values: Tensor) -> Any:
    return values.nan_to_num().double().numpy().round(5).tolist()
