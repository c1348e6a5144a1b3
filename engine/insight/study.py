"""From what was observed, clip by clip, to figures with 95 % intervals and plain words. Pure: runs no model, knows no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.data.samples import Sample
from engine.insight import holds, howmany
from engine.insight.estimates import Estimate, average, gain, share
from engine.insight.holds import Seen
from engine.insight.howmany import Choice
from engine.insight.similarity import Vocabulary
from engine.insight.subject import Clips

Models = Mapping[str, Mapping[str, Any]]  # a model's figures, as `study` gives them

MOSTLY = 0.9  # of answers that stay the same: the slots hardly matter
RARELY = 0.05  # chance alone gives such a gain: it is more than chance explains


def study(
    seen: Seen, clips: Clips, learned: np.ndarray, lessons: Sequence[Sample], words: Vocabulary
) -> dict[str, Any]:  # fmt: skip
    """Every figure of one model.

    learned: states [clips, layers + 1, slots, dim] of `lessons`, other clips, from which probes learn. words: the
    model's vocabulary.
    """
    figures: dict[str, Any] = {
        "clips": len(clips.samples),
        "replacement": replacement(seen, clips),
        "how_many": how_many(seen, clips),
        "collapse": holds.collapse(seen["states"], words),
        "probe": holds.probes(seen["states"], clips, learned, lessons),
        "lens": holds.lenses(seen, clips),
    }
    if "towards" in seen:
        figures["towards"] = holds.towards(seen, clips.samples)
    if "looked" in seen:
        figures["looked"] = holds.looked(seen)
    if "said" in seen:
        figures["spoken"] = holds.said(seen, clips.samples)
    if "taught" in seen:
        figures["decoder"] = holds.named(seen["taught"], clips.samples)
    return figures | {"in_words": in_words(figures["replacement"])}


def _right(shares: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
    """shares: [clips, .., letters] -> bool [clips, ..]: is the likeliest option the true one?"""
    true = np.array([ord(sample.answer) - ord("A") for sample in samples])
    return shares.argmax(-1) == true.reshape(-1, *[1] * (shares.ndim - 2))


def replacement(seen: Seen, clips: Clips) -> dict[str, dict[str, Estimate]]:
    """The replacement test, a row a change; clips without a donor are no part of the donor's row.

    gain: accuracy less that of the slots as they are. distance: total variation of the options' probabilities. follows: of the
    clips whose donor says something else than they do, and something that is among their options, how many say it too
    once they have the donor's slots; follows_letter: the same by the options' letters, whose order may be another.
    """
    names, shares = seen["names"][0], seen["shares"]
    right, chosen = _right(shares, clips.samples), shares.argmax(-1)
    rows: dict[str, dict[str, Estimate]] = {}
    for i, name in enumerate(names):
        donors = clips.donors.get(name, clips.samples)
        there = np.array([donor is not None for donor in donors])
        rows[name] = {
            "accuracy": share(right[there, i]),
            "gain": gain(right[there, i], right[there, 0]),
            "same_answer": share(chosen[there, i] == chosen[there, 0]),
            "distance": average(np.abs(shares[there, i] - shares[there, 0]).sum(-1) / 2),
        }
        if name in clips.donors:
            rows[name] |= _follows(clips.samples, donors, seen[f"said by {name}"], chosen[:, 0], chosen[:, i])
    return rows


def _follows(
    samples: Sequence[Sample], donors: Sequence[Sample | None], theirs: np.ndarray, before: np.ndarray, after: np.ndarray
) -> dict[str, Estimate]:  # fmt: skip
    """Options by their places: what the donors say themselves, what each clip says, and what it says with their slots."""
    words, letters = [], []
    for sample, donor, said, mine, now in zip(samples, donors, theirs, before, after, strict=True):
        if donor is not None:
            word = donor.options[said]
            if word in sample.options and word != sample.options[mine]:
                words.append(sample.options[now] == word)
            if said < len(sample.options) and said != mine:
                letters.append(said == now)
    return {
        "follows": share(np.array(words, dtype=bool)),
        "follows_letter": share(np.array(letters, dtype=bool)),
    }


def how_many(seen: Seen, clips: Clips) -> dict[str, Any]:
    """Accuracy and confidence with fewer slots, and what leaving early gives; and thinking aloud, to a model that can write."""
    fewer = seen["shares"][:, len(seen["names"][0]) :]
    right, confidence = _right(fewer, clips.samples), fewer.max(-1)

    def told(choices: Sequence[Choice], cost: str) -> list[dict[str, Any]]:
        return [
            {"threshold": c.threshold, "accuracy": share(c.right), cost: average(c.cost), "went_on": share(c.went_on)}
            for c in choices
        ]

    found: dict[str, Any] = {
        "by_slots": [
            {"slots": n, "accuracy": share(right[:, n]), "confidence": average(confidence[:, n])}
            for n in range(right.shape[1])
        ],
        "early_exit": told(howmany.early_exit(confidence, right), "slots"),
    }
    if "written_right" in seen:
        written, tokens = seen["written_right"], seen["written_tokens"]
        aloud = howmany.think_aloud(confidence[:, -1], right[:, -1], seen["tokens"], written, tokens)
        found["think_aloud"] = told(aloud, "tokens")
        found["written"] = {"accuracy": share(written), "tokens": average(tokens)}
    return found


def percent(one: Estimate) -> str:
    return f"{one['value']:.1%} ({one['low']:.1%} to {one['high']:.1%})"


def in_words(rows: dict[str, dict[str, Estimate]]) -> list[str]:
    """What the replacement test says, for people: whether the slots matter, and whether what they hold does."""
    own, gone = rows["as they are"], rows["hidden"]
    kept, gained = gone["same_answer"], gone["gain"]
    told = [f"With its slots the model answers {percent(own['accuracy'])} right, and {percent(gone['accuracy'])} when nothing may look at them."]  # fmt: skip
    if gained["p"] < RARELY:
        felt, count = ("matter", "fewer") if gained["value"] < 0 else ("do harm", "more")
        told.append(f"The slots {felt}: without them {count} answers are right, by more than chance explains.")
    elif kept["low"] >= MOSTLY:
        told.append(f"The slots hardly matter for the answer: without them it stays the same in {percent(kept)} of the clips.")  # fmt: skip
    elif kept["high"] < MOSTLY:
        told.append(f"The slots sway the answer (without them it stays the same in {percent(kept)} of the clips), but what that does to the share of right ones, {percent(gained)}, chance may explain.")  # fmt: skip
    else:
        told.append(f"Whether the slots matter is left open: without them the answer stays the same in {percent(kept)} of the clips.")  # fmt: skip
    for name, row in rows.items():
        if "follows" in row:
            told.append(_followed(name, row["follows"], row["follows_letter"]))
    return told


def _followed(name: str, word: Estimate, by_letter: Estimate) -> str:
    """Does the answer follow the slots of the clips of that name, by the answer's words or by its letter?"""
    counted = [one for one in (word, by_letter) if one["n"]]
    if not counted:
        return f"The slots of {name} prove nothing here: the model answers those clips as it answers these."
    shares = [f"in {percent(one)} of {one['n']:.0f} clips" for one in counted]
    if len(counted) == 2 and by_letter != word:
        share_of = f"{shares[0]} by its words, and {shares[1]} by its letter"
    else:
        share_of = shares[0] if word["n"] else f"{shares[0]} by its letter"
    clearer = max(counted, key=lambda one: one["value"])
    if clearer["low"] > 0.5:
        verdict = "it reads its answer from them"
    elif clearer["high"] < 0.5:
        verdict = "it mostly does not read its answer from them"
    else:
        verdict = "that leaves open whether it reads its answer from them"
    return f"With the slots of {name} it gives that clip's answer {share_of}: {verdict}."


def beside_controls(models: Models) -> list[str]:
    """The first model beside each of the others, such as its controls, in words: what it does, and what can be read off its
    slots.

    What can be read off a control's slots as well was not put there by what the first model was trained for. Two shares are
    told apart only where their intervals do not overlap.
    """
    (first, mine), *others = models.items()
    told = []
    for name, theirs in others:
        ours, other = (m["replacement"]["as they are"]["accuracy"] for m in (mine, theirs))
        told.append(f"“{first}” answers {percent(ours)} right, “{name}” {percent(other)}: {_apart(ours, other)}.")
        if "end" in mine["probe"] and "end" in theirs["probe"]:
            ours, other = (m["probe"]["end"]["right"]["anywhere"] for m in (mine, theirs))
            chance = mine["probe"]["end"]["shuffled"]["anywhere"]
            told.append(
                f"A linear probe reads the last state off the best slot of “{first}” in {percent(ours)} of the clips, off that "
                f"of “{name}” in {percent(other)}, and by chance in {percent(chance)} (each half of the clips is read in the "
                f"layer and slot that are best on the other half): {_apart(ours, other)}"
                f"{'' if ours['low'] > other['high'] else ', so being readable is no evidence of thinking'}."
            )
    return told


def _apart(one: Estimate, other: Estimate) -> str:
    if one["low"] > other["high"]:
        return "it does better, by more than chance explains"
    return "the other does better" if one["high"] < other["low"] else "no clear difference"
