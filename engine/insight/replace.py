"""Does it matter? What later tokens read of the slots is replaced, and the answer asked for again: all in one batch.

A slot leaves keys and values in the cache, and nothing else of it is ever read: these are replaced, in every layer at once.
Keys are first turned back to position 0, so that contents can change places or come from another clip and stand where the
slots stood; without that, to shuffle slots would change nothing (as with GPT-2, whose keys know no places). Slots are those
of a method's `thinking`, not ones that are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine import generate
from engine.backbones.base import Backbone
from engine.generate import Thoughts
from engine.layout import Special
from engine.methods.method import Method

WITHOUT = "without slot "  # and its number
MEANT = {
    "as they are": "Nothing is changed.",
    "zeros": "Every slot holds nothing but zeros.",
    "mean": "Every slot holds the mean of all of them.",
    "noise": "Random numbers with the mean and spread of the slots.",
    "first repeated": "Every slot holds what the first one does.",
    "shuffled": "The slots keep what they hold, but change places.",
    "a changed clip": "What the slots hold for the same clip with one event changed.",
    "another clip": "What the slots hold for another clip.",
    "hidden": "The slots keep their places, but nothing may look at them.",
    "markers only": "As if there had never been any slots.",
    WITHOUT: "That one slot is hidden, the others stay.",
}  # what each change puts in the place of the slots, in words, donors by the names that the page and the command give them


@dataclass(frozen=True)
class Change:
    """What later tokens find in place of the slots.

    contents: as `held` gives them (default: the slots' own). seen: bool [slots], those that are there at all (default: every
    one). places: how many places the slots keep; what follows moves up to the rest (default: all).
    """

    name: str
    contents: Tensor | None = None
    seen: Tensor | None = None
    places: int | None = None


def held(backbone: Backbone, thoughts: Thoughts) -> Tensor:
    """What the slots left to be read, keys (as at position 0) and values: [2, layers, batch, heads, slots, head dim]."""
    every = torch.arange(thoughts.batch, device=thoughts.slots.device)[:, None]

    def of_slots(rows: Tensor) -> Tensor:
        return rows[every, :, thoughts.slots].transpose(1, 2).float()  # [batch, heads, slots, head dim]

    keys = torch.stack([backbone.moved(of_slots(k), -thoughts.positions) for k, _ in thoughts.layers])
    return torch.stack([keys, torch.stack([of_slots(v) for _, v in thoughts.layers])])


def changes(own: Tensor, donors: Mapping[str, Tensor] | None = None, seed: int = 0) -> list[Change]:
    """The replacement test. own: what the slots hold, as `held` gives it; donors: what other clips' slots hold, by name.

    The first is no change. Mean and noise have the statistics of the clip's own slots, dimension by dimension; the noise is
    drawn once for all clips, so that none depends on the others. "hidden" leaves the slots' places empty; "markers only"
    closes them up, as if there had never been any.
    """
    count = own.shape[-2]
    generator = torch.Generator().manual_seed(seed)
    mean, spread = own.mean(-2, keepdim=True), own.std(-2, keepdim=True, correction=0)
    noise = torch.randn(own[:, :, :1].shape, generator=generator).to(own)
    order = torch.randperm(count, generator=generator).to(own.device)
    shuffled = own.index_copy(-2, order, own[..., order.roll(1), :])  # no slot stays where it was
    one, none = torch.eye(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    return [
        Change("as they are"),
        Change("zeros", torch.zeros_like(own)),
        Change("mean", mean.expand_as(own)),
        Change("noise", mean + spread * noise),
        Change("first repeated", own[..., :1, :].expand_as(own)),
        Change("shuffled", shuffled),
        *[Change(name, contents) for name, contents in (donors or {}).items()],
        Change("hidden", seen=none),
        Change("markers only", seen=none, places=0),
        *[Change(f"{WITHOUT}{i + 1}", seen=~one[i]) for i in range(count)],
    ]


def each_alone(count: int) -> list[Change]:
    """Every slot as the only one that is seen."""
    return [Change(f"slot {i + 1} alone", seen=row) for i, row in enumerate(torch.eye(count, dtype=torch.bool))]


def first_ones(count: int) -> list[Change]:
    """0 to `count` slots, as if there were no more: what a slot holds doesn't depend on those after it."""
    return [Change(f"{n} slots", seen=torch.arange(count) < n, places=n) for n in range(count + 1)]


@torch.no_grad()
def replaced(backbone: Backbone, thoughts: Thoughts, changed: Sequence[Change]) -> Thoughts:
    """The same thoughts with a lane a change, ready for any continuation, which gives change c of sample b in row
    b x changes + c. The prefix stays as it is and is seen by every lane; only new slots are added to the cache.

    Markers behind the slots saw them, so they are gone: feed `marks` before the answer. The states stay as they were.
    Errors: ValueError where there are no slots.
    """
    if not thoughts.count:
        raise ValueError("There are no slots to replace: think with at least one.")
    (batch, length), count, device = thoughts.thought.shape, thoughts.count, thoughts.slots.device
    new = [change.contents for change in changed if change.contents is not None]
    layers = thoughts.layers
    if new:
        filled, at = torch.cat(new, dim=-2), thoughts.positions.repeat(1, len(new))
        layers = tuple(
            (torch.cat([keys, backbone.moved(k, at).to(keys)], dim=2), torch.cat([values, v.to(values)], dim=2))
            for (keys, values), k, v in zip(thoughts.layers, *filled, strict=True)
        )
    rows, taken = [], length
    for change in changed:
        own = thoughts.slots if change.contents is None else torch.arange(taken, taken + count, device=device)
        rows.append(own.expand(batch, -1))
        taken += 0 if change.contents is None else count
    slots = torch.stack(rows, dim=1)  # [batch, changes, slots]
    whole = torch.ones(count, dtype=torch.bool)
    seen = torch.stack([whole if change.seen is None else change.seen for change in changed]).to(device)
    places = torch.tensor([count if change.places is None else change.places for change in changed], device=device)
    before = thoughts.thought & (torch.arange(length, device=device) < thoughts.slots[:, :1])
    room = (0, taken - length)
    lanes = pad(before, room)[:, None].expand(-1, len(changed), -1)
    return replace(
        thoughts, layers=layers, context=pad(thoughts.context, room), slots=slots,
        thought=lanes.scatter(2, slots, seen.expand(batch, -1, -1)), after=thoughts.positions[:, :1] + places,
    )  # fmt: skip


def meant(names: Iterable[str]) -> dict[str, str]:
    """What the changes of these names put in the place of the slots, those without one slot told once."""
    kinds = dict.fromkeys(WITHOUT if name.startswith(WITHOUT) else name for name in names)
    return {f"{WITHOUT}…" if kind == WITHOUT else kind: MEANT[kind] for kind in kinds if kind in MEANT}


def marks(method: Method) -> tuple[str, ...]:
    """What stands between replaced slots and an option's letter: the markers behind the slots, then the method's own."""
    behind: list[str] = []
    for segment in method.thinking(1):
        names = [piece.name for piece in segment.pieces if isinstance(piece, Special)]
        behind = [] if segment.role in ("slots", "latents") else behind + names
    return (*behind, *method.lead)


def probabilities(
    backbone: Backbone, thoughts: Thoughts, changed: Sequence[Change], letters: Sequence[str], marked: Sequence[str]
) -> Tensor:
    """Every option's probability under every change, in one pass behind the cached prefix: [changes, batch, letters]."""
    shares = generate.option_probabilities(
        backbone, replaced(backbone, thoughts, changed), letters, [*map(Special, marked)]
    )
    return shares.unflatten(0, (thoughts.batch, len(changed))).transpose(0, 1)
