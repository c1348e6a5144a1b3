"""A key/value cache with room for the rows to come, written in place: no row is copied again for each new token.

Its tensors stay where they are, so that a captured CUDA graph finds them again. The rows that aren't written yet are zeros;
that nobody sees them is up to the attention mask, of which nothing is known here, nor of any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

Keys = tuple[Tensor, Tensor]  # keys and values of one layer [batch, heads, rows, head dim]
ALIGNED = 8  # rows: of other sizes a GPU's attention copies the mask in every layer


@dataclass
class Place:
    """Where the next rows are written: the same in all layers of a cache."""

    size: int  # all rows, written or not
    shown: int  # rows that attention is given, from the first on: those that are written, or all
    next: Tensor  # [1]: the first row that isn't written yet; moved in place
    rows: Tensor  # [new]: the rows that the present forward writes

    def take(self, count: int) -> None:
        """The next `count` rows are the present forward's."""
        self.rows = self.next + torch.arange(count, device=self.next.device)
        self.next += count
        self.shown = min(self.shown + count, self.size)

    def show_all(self) -> None:
        """From now on attention is given every row, written or not: what it computes has one shape, and takes longer."""
        self.shown = self.size


class RoomLayer(DynamicLayer):
    """One layer's keys and values. What it starts from is never written to: others may go on from it too."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, place: Place) -> None:
        super().__init__()
        self.keys, self.values, self.place, self.is_initialized = keys, values, place, True

    def update(self, key_states: Tensor, value_states: Tensor, *given: Any, **named: Any) -> Keys:
        """Writes the new rows [batch, heads, new, head dim] where the place says -> the rows that are shown.

        Errors: IndexError for rows beyond the room; on a GPU the device's own.
        """
        place = self.place
        if self.keys.shape[2] < place.size:  # only now, so that layers that are never asked take no room
            self.keys, self.values = _roomy(self.keys, place.size), _roomy(self.values, place.size)
        self.keys.index_copy_(2, place.rows, key_states)
        self.values.index_copy_(2, place.rows, value_states)
        return self.keys[:, :, : place.shown], self.values[:, :, : place.shown]

    def get_seq_length(self) -> int:
        return self.place.shown


def _roomy(written: Tensor, size: int) -> Tensor:
    """[batch, heads, rows, head dim] -> [batch, heads, size, head dim]"""
    room = written.new_zeros(*written.shape[:2], size, written.shape[3])
    room[:, :, : written.shape[2]] = written
    return room


def opened(layers: Sequence[Keys], ahead: int) -> tuple[Cache, Place]:
    """A cache that goes on from these layers, with room for `ahead` more rows or a few above, and the place where they go."""
    keys = layers[0][0]
    past = keys.shape[2]
    start = torch.full((1,), past, device=keys.device)
    place = Place(-(-(past + ahead) // ALIGNED) * ALIGNED, past, start, start[:0])
    return Cache(layers=[RoomLayer(*layer, place) for layer in layers]), place
