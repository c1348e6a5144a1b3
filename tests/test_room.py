"""The room for rows to come: it holds what a growing cache holds, and whoever forked it never notices."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from engine import room


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 3, 2, count, 4, generator=generator)  # [batch, heads, rows, head dim] each
    return keys, values


def test_the_rows_equal_a_growing_caches():
    layers = [rows(5, 0), rows(5, 1)]
    grown, (cache, place) = DynamicCache(layers), room.opened(layers, 9)
    for step, count in enumerate((3, 1, 1, 4)):
        place.take(count)
        for layer in range(2):
            new = rows(count, 10 * step + layer)
            wanted, got = grown.update(*new, layer), cache.update(*new, layer)
            assert all(torch.equal(one, other) for one, other in zip(wanted, got))
        assert cache.get_seq_length() == grown.get_seq_length()
    place.take(3)
    with pytest.raises(IndexError):
        cache.update(*rows(3, 99), 0)


def test_what_it_starts_from_stays_as_it_was():
    layers = [rows(5, 0)]
    before = [each.clone() for each in layers[0]]
    for _ in range(2):
        cache, place = room.opened(layers, 2)
        place.take(2)
        cache.update(*rows(2, 1), 0)
    assert all(torch.equal(one, other) for one, other in zip(before, layers[0]))


def test_rows_that_are_not_written_yet_are_zeros_and_nothing_moves():
    cache, place = room.opened([rows(5, 0)], 6)
    place.show_all()
    places = set()
    for step in range(6):
        place.take(1)
        keys, values = cache.update(*rows(1, step), 0)
        assert keys.shape[2] == place.size >= 11
        assert not keys[:, :, 6 + step :].any()
        assert not values[:, :, 6 + step :].any()
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1


def test_layers_that_are_never_asked_take_no_room():
    layers = [rows(5, 0), rows(5, 1)]
    cache, place = room.opened(layers, 100)
    place.take(1)
    cache.update(*rows(1, 2), 0)
    assert cache.layers[1].keys is layers[1][0]
