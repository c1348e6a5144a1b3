"""Segments -> one packed batch: ids, positions, who sees whom, which rows are supervised, where the slots stand.

A method describes a sample as named branches; each branch is a path of segments read from left to right. Branches that
begin with the same segment objects share them: the shared part is stored, and later computed, once. Positions run along
each path, so a branch's tokens get the positions that they would have alone. This module knows nothing of models: the
backbone turns one segment into ids and relative positions (`Encode`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from engine.footage import Footage

Role = Literal["context", "slots", "latents", "marker", "target"]


@dataclass(frozen=True)
class Special:
    """A token of the vocabulary by its name. Only these become structure: text that looks like one stays text."""

    name: str


BEGIN = Special("beginning of text")  # the token that the model's tokenizer sets before every text, where it has one
END = Special("end of turn")  # whatever token ends a turn in the model's own vocabulary
REPLY = Special("reply")  # what stands between the user's words and the assistant's in the model's own chat format
CLOSE = Special("close")  # what stands behind the assistant's words there, END first


@dataclass(frozen=True)
class Opening:
    """What stands before the user's words in the model's own chat format. `sees`: they begin with a visual."""

    system: str = ""
    sees: bool = False


@dataclass(frozen=True, eq=False)
class Frames:
    """A clip (or an image) as it was decoded; every backbone cuts it in its own way."""

    pixels: np.ndarray  # uint8 [frames, height, width, 3]
    seconds: float  # from one frame to the next
    still: bool = False  # an image rather than a video: its first frame counts

    @property
    def duration(self) -> float:
        """Seconds that its frames stand for."""
        return len(self.pixels) * self.seconds


@dataclass(frozen=True, eq=False)
class Visual:
    """Frames cut into what its family's vision encoder reads; a family's file says what one patch is."""

    patches: Tensor  # uint8 [patches, ...]
    grid: tuple[int, int, int]  # patches in time, height, width
    seconds: float  # seconds between two temporal slices
    still: bool = False  # an image rather than a video
    moments: tuple[float, ...] = ()  # seconds from the clip's start to each slice, where the family writes them


Seen = Footage | Frames | Visual
Written = str | Special | Visual
Piece = Written | Seen | Opening


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens with one role.

    `sees`: if given, this segment and all that follow it on its branch see only these earlier segments (and what the
    branch added since); otherwise everything before it on the branch.
    `name` marks a target so that its rows can be found again ("answer").
    `hole`: its tokens only keep places for states from elsewhere (a Reading's). Slots are holes already; a target that is
    one is predicted like any other.
    """

    role: Role
    pieces: tuple[Piece, ...]
    name: str = ""
    sees: tuple[Segment, ...] | None = None
    hole: bool = False


@dataclass(frozen=True, eq=False)
class Reading:
    """A text that another language model is to read off this one's states.

    `path` holds holes: the tokens of slots, or of segments marked as holes. Hole i takes the state of `holes[i]`, a token
    of the sample by (segment, place in it), where place -1 is the row before the segment's first. `group` keeps like
    readings together. `layer`: whose states they are (0: the embeddings), brought through the final norm; None: the last's.
    """

    kind: str
    path: tuple[Segment, ...]
    holes: tuple[tuple[Segment, int], ...]
    group: int = 0
    layer: int | None = None


@dataclass(frozen=True)
class Layout:
    """One sample: branch name -> path of segments, shared prefix included.

    `flat`: branches whose positions are plain 0, 1, 2 ... even over a video, as some published code has them. They
    share nothing with the others, since their states differ from the first video token on.
    """

    branches: Mapping[str, tuple[Segment, ...]]
    flat: frozenset[str] = frozenset()
    readings: tuple[Reading, ...] = ()


def slots(token: str, count: int) -> Segment:
    """`count` latent slots that ride the prefill, each the token `token`. Errors: ValueError for fewer than none."""
    if count < 0:
        raise ValueError(f"{count} slots: their number can't be negative.")
    return Segment("slots", (Special(token),) * count)


def latents(token: str, count: int) -> Segment:
    """`count` latent slots that are fed back: each takes its input from the state before it. Errors: ValueError as of `slots`."""
    return replace(slots(token, count), role="latents")


def marker(token: str, sees: tuple[Segment, ...] | None = None) -> Segment:
    """A token that says what follows. It is given, never predicted."""
    return Segment("marker", (Special(token),), sees=sees)


def target(*pieces: Piece, name: str = "") -> Segment:
    """Tokens that the branch must predict."""
    return Segment("target", pieces, name=name)


@dataclass(frozen=True)
class Encoded:
    """One segment as the backbone reads it. `extent`: by how much the positions of what follows move on."""

    ids: list[int]
    positions: Tensor  # [axes, tokens], from 0
    extent: int
    visual: list[tuple[Visual, list[int]]] = field(default_factory=list)  # where each Visual's tokens stand


Encode = Callable[[Segment], Encoded]


def remembered(encode: Encode) -> Encode:
    """`encode`, called once for all segments of the same pieces, which alone decide what it gives."""

    @cache
    def encoded(pieces: tuple[Piece, ...]) -> Encoded:
        return encode(Segment("context", pieces))

    return lambda segment: encoded(segment.pieces)


@dataclass(frozen=True)
class Rows:
    """The supervised rows of one branch over the batch: row `row` of sample `sample` predicts `target`."""

    sample: Tensor  # [rows]
    row: Tensor  # [rows]
    target: Tensor  # [rows]
    names: tuple[str, ...]  # the targets' names
    name: Tensor  # [rows], index into names: which target the predicted token belongs to


@dataclass(frozen=True)
class Readings:
    """The readings of one kind over the batch: their own pack (branch "read"), and which states go into its slots."""

    packed: Packed
    source_sample: Tensor  # [holes], in the order of the pack's slots
    source_row: Tensor
    group: Tensor  # [readings]
    layer: Tensor  # [holes], -1 for the last

    def to(self, device: torch.device | str) -> Readings:
        rest = (self.source_sample, self.source_row, self.group, self.layer)
        return Readings(self.packed.to(device), *(tensor.to(device) for tensor in rest))


@dataclass(frozen=True)
class Packed:
    """A batch ready for one forward. Padded on the right, and on the left where first latents are brought into line;
    `node` is -1 on padding."""

    ids: Tensor  # [batch, length]
    positions: Tensor  # [axes, batch, length]
    node: Tensor  # [batch, length]: the segment that a token belongs to
    sees: Tensor  # bool [batch, nodes, nodes]: may tokens of node i see those of node j
    branches: Mapping[str, Rows]
    latents: Tensor  # bool [batch, length]: slots that are fed back
    slot_sample: Tensor  # [slots], fed back or not
    slot_row: Tensor  # [slots]
    patches: Tensor  # uint8 [patches, ...]: every visual of the batch, for one vision pass
    grids: tuple[tuple[int, int, int], ...]  # a visual each
    visual_sample: Tensor  # [visual tokens]: where the visual features go, in the order of `grids`
    visual_row: Tensor
    readings: Mapping[str, Readings]

    def to(self, device: torch.device | str) -> Packed:
        def move(rows: Rows) -> Rows:
            sample, row, target, name = (x.to(device) for x in (rows.sample, rows.row, rows.target, rows.name))
            return Rows(sample, row, target, rows.names, name)

        return Packed(
            self.ids.to(device), self.positions.to(device), self.node.to(device), self.sees.to(device),
            {name: move(rows) for name, rows in self.branches.items()},
            self.latents.to(device), self.slot_sample.to(device), self.slot_row.to(device),
            self.patches.to(device), self.grids, self.visual_sample.to(device), self.visual_row.to(device),
            {kind: readings.to(device) for kind, readings in self.readings.items()},
        )  # fmt: skip


@dataclass
class _Node:
    segment: Segment
    encoded: Encoded
    visible: frozenset[int]  # the nodes that it sees: itself, and those before it on its branch that it may see
    row: int  # its first token's row
    position: int  # its first token's position
    last_row: int  # the row before the next segment's first token


def _flattened(encoded: Encoded) -> Encoded:
    count = len(encoded.ids)
    return replace(encoded, positions=torch.arange(count).expand_as(encoded.positions), extent=count)


def _tree(layout: Layout, encode: Encode) -> tuple[list[_Node], dict[str, list[int]]]:
    """Merges the branches' common beginnings: -> nodes in packed order, and each branch's path of node indices."""
    nodes: list[_Node] = []
    known: dict[tuple[int, ...], int] = {}  # path of segment identities -> node
    paths: dict[str, list[int]] = {}
    for name, segments in layout.branches.items():
        path: list[int] = []
        flat = name in layout.flat
        key: tuple[int, ...] = (flat,)
        for segment in segments:
            key += (id(segment),)
            if key not in known:
                parent = nodes[path[-1]] if path else None
                encoded = _flattened(encode(segment)) if flat else encode(segment)
                if segment.sees is not None:
                    allowed = [n for n in path if any(nodes[n].segment is s for s in segment.sees)]
                else:
                    allowed = sorted(parent.visible) if parent else []
                row = nodes[-1].row + len(nodes[-1].encoded.ids) if nodes else 0
                position = parent.position + parent.encoded.extent if parent else 0
                empty_last = parent.last_row if parent else -1
                last = row + len(encoded.ids) - 1 if encoded.ids else empty_last
                known[key] = len(nodes)
                nodes.append(_Node(segment, encoded, frozenset([*allowed, len(nodes)]), row, position, last))
            path.append(known[key])
        paths[name] = path
    return nodes, paths


def packed_length(layout: Layout, encode: Encode) -> int:
    """How many tokens the sample takes in a pack, shared beginnings counted once."""
    return sum(len(node.encoded.ids) for node in _tree(layout, encode)[0])


def _pack_readings(
    layouts: Sequence[Layout], nodes: Sequence[list[_Node]], shifts: Sequence[int], encode: Encode, pad: int
) -> dict[str, Readings]:
    every = [(sample, reading) for sample, layout in enumerate(layouts) for reading in layout.readings]
    packed = {}
    for kind in dict.fromkeys(reading.kind for _, reading in every):
        chosen = [(sample, reading) for sample, reading in every if reading.kind == kind]
        rows = []
        for sample, reading in chosen:
            starts = {id(node.segment): node.row + shifts[sample] for node in nodes[sample]}
            rows += [(sample, starts[id(segment)] + place) for segment, place in reading.holes]
        inner = pack([Layout({"read": reading.path}) for _, reading in chosen], encode, pad)
        source_sample, source_row = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).unbind(1)
        group = torch.tensor([reading.group for _, reading in chosen])
        layers = [-1 if reading.layer is None else reading.layer for _, reading in chosen for _ in reading.holes]
        packed[kind] = Readings(inner, source_sample, source_row, group, torch.tensor(layers, dtype=torch.long))
    return packed


def _shifts(samples: Sequence[list[_Node]]) -> list[int]:
    """By how many rows each sample moves right, so that the first latents of all share a column."""
    firsts = [next((n.row for n in nodes if n.segment.role == "latents" and n.encoded.ids), None) for nodes in samples]
    column = max((first for first in firsts if first is not None), default=0)
    return [0 if first is None else column - first for first in firsts]


def pack(layouts: Sequence[Layout], encode: Encode, pad: int) -> Packed:
    """Packs a batch of samples, each with its branches beside each other behind their shared prefix.

    Samples with latents are shifted so that their first ones share a column.

    Errors: ValueError if a branch begins with a target (nothing could predict its first token).
    """
    trees = [_tree(layout, encode) for layout in layouts]
    shifts = _shifts([nodes for nodes, _ in trees])
    lengths = [shift + sum(len(n.encoded.ids) for n in nodes) for shift, (nodes, _) in zip(shifts, trees, strict=True)]
    batch, length = len(trees), max(lengths)
    width = max(len(nodes) for nodes, _ in trees)
    axes = trees[0][0][0].encoded.positions.shape[0]

    # Filled as arrays: a tensor takes many times as long for a few numbers.
    ids = np.full((batch, length), pad, dtype=np.int64)
    positions = np.zeros((axes, batch, length), dtype=np.int64)
    node_of = np.full((batch, length), -1, dtype=np.int64)
    sees = np.zeros((batch, width, width), dtype=bool)
    fed_back = np.zeros((batch, length), dtype=bool)
    slot_rows: list[tuple[int, int]] = []
    visuals: list[Visual] = []
    visual_rows: list[tuple[int, int]] = []
    supervised: dict[str, tuple[list[int], ...]] = {}  # a branch's samples, rows, targets and names
    names: dict[str, list[str]] = {}

    for b, ((nodes, paths), shift) in enumerate(zip(trees, shifts, strict=True)):
        for index, node in enumerate(nodes):
            count, start = len(node.encoded.ids), shift + node.row
            span = slice(start, start + count)
            ids[b, span] = node.encoded.ids
            positions[:, b, span] = node.encoded.positions.numpy() + node.position
            node_of[b, span] = index
            sees[b, index, list(node.visible)] = True
            fed_back[b, span] = node.segment.role == "latents"
            if node.segment.hole or node.segment.role in ("slots", "latents"):
                slot_rows += [(b, start + i) for i in range(count)]
            for visual, rows in node.encoded.visual:
                visuals.append(visual)
                visual_rows += [(b, start + r) for r in rows]
        for branch, path in paths.items():
            known = names.setdefault(branch, [])
            samples, rows, targets, labels = supervised.setdefault(branch, ([], [], [], []))
            for before, index in zip([None, *path], path, strict=False):
                node = nodes[index]
                if node.segment.role != "target":
                    continue
                if before is None or nodes[before].last_row < 0:
                    raise ValueError(f"branch {branch!r} begins with a target: put a context before it")
                if node.segment.name not in known:
                    known.append(node.segment.name)
                count, start = len(node.encoded.ids), shift + node.row
                samples += [b] * count
                rows += [shift + nodes[before].last_row, *range(start, start + count - 1)][:count]  # a row before each
                targets += node.encoded.ids
                labels += [known.index(node.segment.name)] * count

    branches = {}
    for branch, table in supervised.items():
        sample, row, predicted, name = torch.tensor(table, dtype=torch.long).unbind(0)
        branches[branch] = Rows(sample, row, predicted, tuple(names[branch]), name)
    slot_sample, slot_row = torch.tensor(slot_rows, dtype=torch.long).reshape(-1, 2).unbind(1)
    visual_sample, visual_row = torch.tensor(visual_rows, dtype=torch.long).reshape(-1, 2).unbind(1)
    readings = _pack_readings(layouts, [nodes for nodes, _ in trees], shifts, encode, pad)
    patches = torch.cat([v.patches for v in visuals]) if visuals else torch.zeros(0, 0, dtype=torch.uint8)
    grids = tuple(v.grid for v in visuals)
    tensor = torch.from_numpy
    return Packed(
        tensor(ids), tensor(positions), tensor(node_of), tensor(sees), branches, tensor(fed_back), slot_sample, slot_row,
        patches, grids, visual_sample, visual_row, readings,
    )  # fmt: skip
