"""Runs a model over clips and keeps what the measures need, clip by clip. Knows neither files nor what the figures mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import generate
from engine.data.samples import Sample, answer_of, letter, thoughts_of
from engine.insight import attention, lens, similarity, spoken
from engine.insight import replace as matter
from engine.insight.subject import Clips, Subject
from engine.layout import Special

LONGEST = 160  # tokens of a chain, written or spoken


def observe(
    subject: Subject, clips: Clips, batch: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Everything about every clip, the clip's axis first: arrays where all clips are alike in shape, else lists."""
    found: dict[str, list[Any]] = {}
    for first in range(0, len(clips.samples), batch):
        for name, values in _observed(subject, clips.part(first, batch)).items():
            found.setdefault(name, []).append(values)
        say(f"{min(first + batch, len(clips.samples))} of {len(clips.samples)} clips")
    return {
        name: np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [x for part in parts for x in part]
        for name, parts in found.items()
    }


@torch.no_grad()
def _observed(subject: Subject, clips: Clips) -> dict[str, Any]:
    backbone, samples = subject.backbone, clips.samples
    thoughts = subject.think(samples)
    written = generate.answer(backbone, thoughts, subject.method.marks, subject.method.longest)
    found: dict[str, Any] = {
        "states": thoughts.states.transpose(0, 1).float().cpu().numpy(),
        "tokens": np.array(written.tokens) + thoughts.serial,  # slots that are fed back cost a step each
    }
    if subject.method.writes:
        chain = generate.explicit(backbone, thoughts, LONGEST)
        said = zip(chain.text, samples, strict=True)
        found["written_tokens"] = np.array(chain.tokens)
        found["written_right"] = np.array([answer_of(text) == sample.answer for text, sample in said])
        found["towards"] = [
            similarity.between(thoughts.states[:, i].cpu(), spoken.step_states(backbone, chain, i).cpu()).numpy()
            for i in range(len(samples))
        ]
    found |= _changed(subject, clips, thoughts) | _lenses(subject, clips, thoughts)
    if all(sample.visual is not None for sample in samples):
        every = attention.looked(backbone, thoughts, samples, subject.method.lead)
        frames = [look.frames.float().mean((0, 1)) for look in every]  # over layers and heads
        spread = [attention.over_moments(f, e.seconds, m) for f, e, m in zip(frames, every, clips.moments, strict=True)]
        found["looked"] = [one.cpu().numpy() for one in spread]
        found["on_clip"] = torch.stack([frame.sum(-1) for frame in frames]).cpu().numpy()
        found["on_slots"] = torch.stack([look.slots.float().mean((0, 1)).sum(-1) for look in every]).cpu().numpy()
    if subject.method.speaks:
        found["said"] = [thoughts_of(t) for t in generate.speak(backbone, thoughts, LONGEST).text]
        found["alone"] = spoken.alone(backbone, thoughts, LONGEST)
    taught = [_taught(subject, sample) for sample in samples]
    return found | ({"taught": taught} if any(taught) else {})


def _taught(subject: Subject, sample: Sample) -> list[str]:
    """What the step decoder that taught the slots says of each; nothing for a model without one.

    Clip by clip, as the number of true steps decides in which layer it reads.
    """
    if spoken.decoder_of(subject.method, subject.companions) is None:
        return []
    thoughts = subject.think([sample])
    return spoken.taught(subject.backbone, subject.method, subject.companions, thoughts, len(sample.steps))[0]


def _changed(subject: Subject, clips: Clips, thoughts: generate.Thoughts) -> dict[str, Any]:
    """Every option's probability under every change and with fewer slots, and what the donors say themselves."""
    backbone, letters = subject.backbone, [letter(i) for i in range(max(len(s.options) for s in clips.samples))]
    contents: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    for name, given in clips.donors.items():
        theirs = [donor or sample for donor, sample in zip(given, clips.samples, strict=True)]
        other = subject.think(theirs)
        contents[name] = matter.held(backbone, other)
        shares = generate.option_probabilities(backbone, other, letters, [*map(Special, subject.method.lead)])
        found[f"said by {name}"] = among_options(shares[None], theirs)[0].argmax(-1).cpu().numpy()
    changes = matter.changes(matter.held(backbone, thoughts), contents)
    every = [*changes, *matter.first_ones(subject.slots)]
    shares = matter.probabilities(backbone, thoughts, every, letters, matter.marks(subject.method))
    kept = torch.zeros(len(every), len(clips.samples), 26)  # as many as there are letters, so that batches fit together
    kept[..., : len(letters)] = among_options(shares, clips.samples).cpu()
    return {
        "shares": kept.transpose(0, 1).numpy(),
        "names": [[change.name for change in changes]] * len(kept[0]),
        **found,
    }


def among_options(shares: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Probabilities of letters [changes, samples, letters] -> of each sample's own options alone."""
    count = torch.tensor([len(sample.options) for sample in samples], device=shares.device)
    kept = shares * (torch.arange(shares.shape[-1], device=shares.device) < count[:, None])
    return kept / kept.sum(-1, keepdim=True)


def _lenses(subject: Subject, clips: Clips, thoughts: generate.Thoughts) -> dict[str, np.ndarray]:
    """For each lens: which of its family's words every layer names at every slot, and how far it is from the end's say."""
    every = sorted({word for words in clips.words.values() for word in words})
    groups = [[every.index(word) for word in clips.words[family]] for family in clips.families]
    tokens = lens.first_tokens(subject.backbone, every)
    found = {}
    for name, tuned in (("plain", None), ("tuned", subject.tuned)):
        if name == "plain" or tuned is not None:
            said = lens.logits(subject.backbone, thoughts.states, tuned)  # [layers + 1, samples, slots, vocabulary]
            found[f"divergence {name}"] = lens.divergence(said).transpose(0, 1).cpu().numpy()
            found[f"words {name}"] = np.array(every)[lens.likeliest(said, tokens, groups).transpose(0, 1).cpu().numpy()]
    return found
