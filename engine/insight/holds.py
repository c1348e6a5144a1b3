"""What the slots hold, as figures with 95 % intervals: collapse, probes, lenses, attention, speech. Pure: runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.data.samples import Sample
from engine.evaluation import steps_right
from engine.insight import probe, similarity, spoken
from engine.insight.estimates import Estimate, average, share
from engine.insight.subject import Clips

Seen = dict[str, Any]  # what `observe` gives


def collapse(states: np.ndarray, words: similarity.Vocabulary) -> dict[str, list[Estimate]]:
    """states: [clips, layers + 1, slots, dim] -> the measures of `similarity.collapse`, a layer each."""
    measures = similarity.collapse(torch.from_numpy(states).transpose(0, 1), words)
    return {name: [average(layer) for layer in values.numpy()] for name, values in measures.items()}


def towards(seen: Seen, samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean cosine of slots with the states at the ends of the written chain's steps, for clips of each length whose chain
    has as many steps as it should: {steps: [layers + 1, slots, steps]}."""
    whole = [one for one, sample in zip(seen["towards"], samples, strict=True) if one.shape[-1] == len(sample.steps)]
    lengths = sorted({one.shape[-1] for one in whole})
    return {str(n): np.mean([x for x in whole if x.shape[-1] == n], axis=0).round(4).tolist() for n in lengths}


def _told(words: np.ndarray, wanted: Sequence[str], families: Sequence[str]) -> dict[str, Any]:
    """Words [clips, layers + 1, slots] held against each clip's own label ("" = none), and another's of its family."""
    there = np.array([label != "" for label in wanted])
    own, other = (np.array(x)[there, None, None] for x in (wanted, probe.shuffled(wanted, families)))
    right = words[there] == own
    return {"right": _table(right, right), "shuffled": _table(words[there] == other, right)}


def _table(hit: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """bool [clips, layers + 1, slots] -> the share hit in each place, in each layer's best slot, and in the best place of
    all layers; the best is where most is `right`."""
    best = [share(in_the_best(hit[:, layer], right[:, layer])) for layer in range(hit.shape[1])]
    anywhere = share(in_the_best(*(each.reshape(len(each), -1) for each in (hit, right))))
    return {"every": hit.mean(0).round(4).tolist(), "best": best, "anywhere": anywhere}


def in_the_best(hit: np.ndarray, right: np.ndarray) -> np.ndarray:
    """bool [clips, places] -> [clips]: what is hit in the place that is `right` most often on the other half of the clips.

    On the clips that it is chosen by, the best of many places looks better than it is.
    """
    order = np.random.default_rng(0).permutation(len(hit))  # families and difficulties take turns among the clips
    one, other = order[::2], order[1::2]
    found = np.zeros(len(hit), dtype=bool)
    for counted, chosen_by in ((one, other), (other, one)):
        found[counted] = hit[counted, right[chosen_by].sum(0).argmax()]
    return found


def probes(states: np.ndarray, clips: Clips, learned: np.ndarray, lessons: Sequence[Sample]) -> dict[str, Any]:
    """Linear probes for the state after each step, on clips that they did not learn from."""
    taught = dict(zip(*probe.targets([lesson.steps for lesson in lessons]), strict=True))
    found = {}
    for name, wanted in zip(*probe.targets([sample.steps for sample in clips.samples]), strict=True):
        words = probe.predicted(learned, taught.get(name, [""] * len(lessons)), states)
        if words is not None:
            found[name] = _told(words, wanted, clips.families)
    return found


def lenses(seen: Seen, clips: Clips) -> dict[str, Any]:
    """Which layers name the state after each step among its family's words, and how far each is from the model's end."""
    names, columns = probe.targets([sample.steps for sample in clips.samples])
    found: dict[str, Any] = {}
    for kind in ("plain", "tuned"):
        if f"words {kind}" in seen:
            words = seen[f"words {kind}"]
            found[kind] = {
                "divergence": [average(layer) for layer in seen[f"divergence {kind}"].mean(-1).T],
                "named": {name: _told(words, wanted, clips.families) for name, wanted in zip(names, columns)},
            }
    return found


def looked(seen: Seen) -> dict[str, Any]:
    """Mean attention over layers and heads: of each slot, and the answer's row last, to the moments of clips of a length."""
    rows = [one for one in seen["looked"]]
    lengths = sorted({one.shape[1] for one in rows})
    return {
        "to_clip": [average(row) for row in seen["on_clip"].T],
        "to_slots": [average(row) for row in seen["on_slots"].T],
        "moments": {str(n): np.mean([x for x in rows if x.shape[1] == n], axis=0).round(5).tolist() for n in lengths},
    }


def said(seen: Seen, samples: Sequence[Sample]) -> dict[str, Any]:
    """The chain said from all slots, and which true step each slot names best when it is alone."""
    exact = [right for text, s in zip(seen["said"], samples, strict=True) for right in steps_right(text, s.thoughts)]
    return {"steps_exact": share(np.array(exact)), "alone": named(seen["alone"], samples)}


def named(every: Sequence[Sequence[str]], samples: Sequence[Sample]) -> dict[str, Any]:
    """Which true step each thought's text names best: the share of clips, a row a thought, a column a step and one for none;
    and how much of that step it says. every: the texts of each clip's thoughts."""
    thoughts, longest = len(every[0]), max(len(sample.steps) for sample in samples)
    names, alike = np.zeros((thoughts, longest + 1)), np.zeros((len(samples), thoughts))
    for clip, (texts, sample) in enumerate(zip(every, samples, strict=True)):
        for thought, text in enumerate(texts):
            step, alike[clip, thought] = spoken.named_best(text, sample.steps)
            names[thought, step] += 1  # the last column is for none, -1
    return {"names": (names / len(samples)).round(4).tolist(), "likeness": [average(x) for x in alike.T]}
