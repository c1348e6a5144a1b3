"""What thoughts say: all or one alone in their model's own words, or in those of the decoder that taught them (SIM-CoT).

Heima's interpreters are in engine/insight/reconstruction.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from engine import generate
from engine.backbones.base import Backbone, double
from engine.data.samples import Dialect, thoughts_of
from engine.generate import Thoughts, Written
from engine.insight.replace import each_alone, replaced
from engine.layout import Layout, pack, slots
from engine.methods.method import Method
from engine.methods.steps import DECODER, StepSupervision


def speaks(method: Method, companions: nn.ModuleDict) -> bool:
    """Whether anyone has learnt to say what the slots hold, see `aloud`."""
    return method.speaks or tells(method, companions)


def aloud(
    backbone: Backbone, method: Method, companions: nn.ModuleDict, thoughts: Thoughts, dialect: Dialect = "chat",
    heed: Callable[[], None] = generate.unheeded,
) -> list[str]:  # fmt: skip
    """A sample's thoughts in words each, said from the slots alone: by the model itself, or a line a thought by the step decoder
    that taught them."""
    if method.speaks:
        written = generate.speak(backbone, thoughts, heed=heed)
        return [thoughts_of(text, dialect) for text in written.text]
    return ["\n".join(lines) for lines in taught(backbone, method, companions, thoughts, thoughts.count, heed=heed)]


def alone(
    backbone: Backbone, thoughts: Thoughts, limit: int = 256, heed: Callable[[], None] = generate.unheeded
) -> list[list[str]]:
    """What every slot says when it is all that is seen: a sample's slots' texts. Few models were trained to."""
    written = generate.speak(backbone, replaced(backbone, thoughts, each_alone(thoughts.count)), limit, heed)
    said = [thoughts_of(text) for text in written.text]
    return [said[i : i + thoughts.count] for i in range(0, len(said), thoughts.count)]


@torch.no_grad()
def taught(
    backbone: Backbone, method: Method, companions: nn.ModuleDict, thoughts: Thoughts, steps: int, limit: int = 64,
    heed: Callable[[], None] = generate.unheeded,
) -> list[list[str]]:  # fmt: skip
    """What SIM-CoT's step decoder says of each thought: a sample's texts each, none for a model without one.

    It reads what it was trained to read: a slot that rides the prefill in its last layer, or in the one that stands for it in
    a chain of `steps` steps; the input of one that is fed back.
    """
    decoded = decoder_of(method, companions)
    if decoded is None or not thoughts.count:
        return [[] for _ in range(thoughts.batch)]
    if method.thinks == "fed back":
        states = backbone.fed(thoughts.states[0], thoughts.positions)
    else:
        layers = [decoded.layer(slot, steps) for slot in range(thoughts.count)]
        states = torch.stack(
            [read_at(backbone, thoughts.states[:, :, i], layer) for i, layer in enumerate(layers)], dim=1
        )
    size = method.slots_a_step
    states = states[:, : states.shape[1] // size * size]  # a thought that isn't whole says nothing
    groups = states.unflatten(1, (-1, size)).flatten(0, 1)  # [thoughts, states a thought, dim]
    if not len(groups):
        return [[] for _ in range(thoughts.batch)]
    decoder = double(companions[DECODER])
    decoder.set_input_embeddings(backbone.model.get_input_embeddings())  # words are embedded by the model's own table
    packed = pack([Layout({"read": (slots("<pause>", size),)})] * len(groups), backbone.encode, backbone.pad)
    packed = replace(
        packed.to(backbone.device), positions=packed.positions.to(backbone.device) + decoded.first_position
    )
    written = generate.go_on(replace(backbone, model=decoder), packed, groups, limit, heed)
    said = [text.strip() for text in written.text]
    each = len(said) // thoughts.batch
    return [said[i : i + each] for i in range(0, len(said), each)]


def decoder_of(method: Method, companions: nn.ModuleDict) -> StepSupervision | None:
    """How a step decoder (SIM-CoT) taught this method's slots; None for a model without one."""
    return method.supervision if DECODER in companions else None


def tells(method: Method, companions: nn.ModuleDict) -> bool:
    """Whether a step decoder can say what the slots hold without being told the number of steps: not where that decides in
    which layer a step stands."""
    decoded = decoder_of(method, companions)
    return decoded is not None and decoded.stairs is None


def read_at(backbone: Backbone, states: Tensor, layer: int | None) -> Tensor:
    """States [layers + 1, ..., dim] -> [..., dim]: those of a layer as the head takes them, or the last (None)."""
    return states[-1] if layer is None or layer >= backbone.layers else backbone.final_norm(states[layer])


def likeness(said: str, step: str) -> float:
    """How much of a true step is said in the best line: F1 of the words, 1 for the same words and 0 for none."""

    def score(line: str) -> float:
        mine, true = Counter(line.split()), Counter(step.split())
        shared = sum((mine & true).values())
        return 2 * shared / (sum(mine.values()) + sum(true.values())) if shared else 0.0

    return max(map(score, said.split("\n")))


def named_best(said: str, steps: Sequence[str]) -> tuple[int, float]:
    """Which true step a text names best: (its place, `likeness`); of equals the first. (-1, 0) where it names none."""
    scores = [likeness(said, step) for step in steps]
    best = max(scores, default=0.0)
    return (scores.index(best), best) if best else (-1, 0.0)


def step_states(backbone: Backbone, written: Written, sample: int = 0) -> Tensor:
    """The states at the end of every step of a written chain, from which its line is ended: [layers + 1, steps, dim]."""
    close = backbone.token("</think>")
    ends = [i for i, token in enumerate(written.ids[sample]) if token == close or "\n" in backbone.decode([token])]
    stop = next((n for n, i in enumerate(ends, 1) if written.ids[sample][i] == close), len(ends))
    return written.states[ends[:stop], :, sample].transpose(0, 1)
