"""A study's figures, and the sentence that belongs to each: what it shows and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from engine.insight import plots
from engine.insight.study import Models

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SAID = {
    "replacement": (
        "Does it matter?",
        "Right answers when the slots hold something else, or nothing. Where nothing changes, the slots do not matter.",
    ),
    "same-answer": ("Does the answer change?", "Clips whose answer stays the same under each change, right or wrong."),
    "follows": (
        "Does the answer follow the slots?",
        "With the slots of another clip, or of the same clip with one event changed: how many answers are that clip's. This "
        "shows a cause, not just that two things go together.",
    ),
    "follows-letter": ("Or its letter?", "The same by the answer's letter, where another clip's options have another order."),
    "how-many": (
        "How many thoughts?",
        "Right answers with the first slots only, from one prefill. A model that was trained with one number of slots may do "
        "badly with any other.",
    ),
    "confidence": ("How sure is it?", "Mean probability of the likeliest option. To be sure is not to be right."),
    "think-aloud": (
        "Thinking aloud only when unsure",
        "Right answers, by the confidence below which the chain is written out after all.",
    ),
    "think-aloud-tokens": ("What that costs", "Tokens written, at the same thresholds."),
    "early-exit": (
        "Stopping when sure enough",
        "Right answers, when it stops at the first number of slots at which it is this confident.",
    ),
    "early-exit-slots": ("What that saves", "Slots used, at the same thresholds. Slots that ride the prefill cost little."),
    "probe": (
        "Is the end of the story in the slots?",
        "What a linear probe tells right of the last state, in each layer's best slot, on clips that it did not learn from; "
        "each half of them is counted in the slot that is best on the other half. That it can be read does not mean that it "
        "is used: compare the controls, and what is right by chance (held against other clips of the family).",
    ),
    "lens": (
        "What would each layer say?",
        "How often the likeliest of the world's words is the last state, in each layer's best slot, by the plain logit lens "
        "and the tuned one; each half of the clips is counted in the slot that is best on the other half.",
    ),
    "lens-distance": (
        "How far is each layer from the end?",
        "Divergence of what a layer would say from what the model says. The lower, the better the lens.",
    ),
    "collapse-cosine": ("Are the slots alike?", "Mean cosine of two slots. Alike slots may still be useful ones."),
    "collapse-effective_rank": ("How many directions do they use?", "Effective rank; 1 is all slots on one line."),
    "collapse-norm": ("How long are they?", "Mean length of a slot's state, in mean lengths of an embedding."),
    "collapse-distance": ("How far apart are they?", "Mean distance of two slots."),
    "collapse-centre": ("How far from the vocabulary?", "Mean distance of a slot from the middle of the embeddings."),
    "towards": (
        "Which written step is each slot like?",
        "Mean cosine of the first model's slots, in the last layer, with its own states at the ends of the written steps, for "
        "the longest clips. To be alike is not to say the same.",
    ),
    "looked": (
        "Where did it look?",
        "Mean attention of each slot of the first model to the moments of the longest clips; the answer's row is the last. "
        "Attention says where information could come from, not what was used.",
    ),
    "alone": (
        "What does each slot say alone?",
        "Which true step each slot of the first model names best when nothing else is seen. It was trained to speak from all "
        "slots together.",
    ),
    "decoder": (
        "What does its step decoder say of each thought?",
        "Which true step the decoder that taught the first model (SIM-CoT) names best for each thought. It says what the thought "
        "was taught to hold; another reader may find nothing there.",
    ),
}  # fmt: skip
UNITS = {
    "cosine": "cosine", "effective_rank": "directions", "norm": "embedding lengths", "distance": "distance",
    "centre": "distance",
}  # fmt: skip


def drawn(models: Models) -> dict[str, Figure]:
    """The figures, by the names in `SAID`; those of one model are the first's."""
    first = next(iter(models.values()))
    layers = range(max(len(m["collapse"]["norm"]) for m in models.values()))
    fewer = range(max(m["slots"] for m in models.values()) + 1)
    thresholds = [row["threshold"] for row in first["how_many"]["early_exit"]]

    def rows(key: str) -> dict[str, Any]:
        every = {name: m["replacement"] for name, m in models.items()}
        return {name: {c: r[key] for c, r in m.items() if key in r and r[key]["n"]} for name, m in every.items()}

    def many(part: str, key: str) -> dict[str, Any]:
        every = {name: m["how_many"].get(part, ()) for name, m in models.items()}
        return {name: [row[key] for row in rows] for name, rows in every.items() if rows}

    def lenses(pick: Callable[[Any], Any]) -> dict[str, Any]:
        return {f"{name}, {kind}": pick(lens) for name, m in models.items() for kind, lens in m["lens"].items()}

    probes = {
        f"{name}{tail}": m["probe"]["end"][kind]["best"]
        for name, m in models.items() if "end" in m["probe"]
        for kind, tail in (("right", ""), ("shuffled", ", by chance"))
    }  # fmt: skip
    said = lenses(lambda lens: lens["named"]["end"]["right"]["best"])
    unsure = "confidence asked for, probability"
    made = {
        "replacement": plots.dots(rows("accuracy"), "right answers, share"),
        "same-answer": plots.dots(rows("same_answer"), "same answer, share"),
        **{
            key.replace("_", "-"): plots.dots(rows(key), "answers that follow, share")
            for key in ("follows", "follows_letter")
            if any(rows(key).values())
        },
        "how-many": plots.curves(many("by_slots", "accuracy"), fewer, "slots", "right answers, share"),
        "confidence": plots.curves(many("by_slots", "confidence"), fewer, "slots", "confidence, probability"),
        **{
            name: plots.curves(many("think_aloud", key), thresholds, unsure, title)
            for name, key, title in (
                ("think-aloud", "accuracy", "right answers, share"),
                ("think-aloud-tokens", "tokens", "tokens a clip"),
            )
            if many("think_aloud", key)
        },
        "early-exit": plots.curves(many("early_exit", "accuracy"), thresholds, unsure, "right answers, share"),
        "early-exit-slots": plots.curves(many("early_exit", "slots"), thresholds, unsure, "slots a clip"),
        "probe": plots.curves(probes, layers, "layer", "right, share"),
        "lens": plots.curves(said, layers, "layer", "right, share"),
        "lens-distance": plots.curves(lenses(lambda lens: lens["divergence"]), layers, "layer", "nats"),
    }
    for measure, unit in UNITS.items():
        lines = {name: m["collapse"][measure] for name, m in models.items() if measure in m["collapse"]}
        if lines:
            made[f"collapse-{measure}"] = plots.curves(lines, layers, "layer", unit)
    slots = [str(i + 1) for i in range(first["slots"])]
    if alike := first.get("towards"):
        last = torch.tensor(alike[max(alike, key=int)])[-1]  # [slots, steps]
        made["towards"] = plots.cells(last, named_steps(last.shape[1]), slots, "written step", "slot", "cosine")
    if "looked" in first:
        moments = first["looked"]["moments"]
        every = torch.tensor(moments[max(moments, key=int)])  # [slots and marks, moments]
        shown = torch.cat([every[: len(slots)], every[-1:]])
        made["looked"] = plots.cells(
            shown, named_steps(every.shape[1]), [*slots, "answer"], "step", "slot", "attention"
        )
    if "spoken" in first:
        named = torch.tensor(first["spoken"]["alone"]["names"])
        steps = [*named_steps(named.shape[1] - 1), "none"]
        made["alone"] = plots.cells(named, steps, slots, "step", "slot", "share of clips")
    if "decoder" in first:
        named = torch.tensor(first["decoder"]["names"])
        steps, thoughts = [*named_steps(named.shape[1] - 1), "none"], [str(i + 1) for i in range(len(named))]
        made["decoder"] = plots.cells(named, steps, thoughts, "step", "thought", "share of clips")
    return made


def named_steps(count: int) -> list[str]:
    """Of a chain: its start, its events by number, and its end, the line that names the option."""
    return ["start", *(str(i) for i in range(1, count - 1)), "end"][:count]
