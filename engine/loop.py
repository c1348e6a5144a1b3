"""Layers that share one set of weights while they learn: what one has learnt, all have. Knows no method, no training loop.

Following a state takes one layer a step, and each layer would have to learn the same step anew, one after another. The
saved model is a plain one, whose layers happen to be equal.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from engine.backbones.base import Backbone
from engine.config import ConfigError


def looped(backbone: Backbone, first: int, last: int) -> None:
    """From now on, layers `first` to `last` (counted from 1) have the weights of `first`, in place.

    Errors: ConfigError for layers that the model doesn't have.
    """
    if not 1 <= first < last <= backbone.layers:
        raise ConfigError(
            f"looped: [{first}, {last}]: this model's layers are 1 to {backbone.layers}, the first below the last."
        )
    shared, *others = backbone.blocks(backbone.model)[first - 1 : last]
    for layer in others:
        for name, weight in shared.named_parameters():
            place, _, own = name.rpartition(".")
            setattr(layer.get_submodule(place), own, weight)


def unrolled(backbone: Backbone) -> Backbone:
    """The same model with weights for every layer: itself, unless its layers are looped."""
    blocks = list(backbone.blocks(backbone.model))
    weights = [next(iter(block.parameters())) for block in blocks]
    if len({id(weight) for weight in weights}) == len(blocks):
        return backbone
    plain = replace(backbone, model=copy.deepcopy(backbone.model))
    layers = plain.blocks(plain.model)
    for place, layer in enumerate(layers):
        layers[place] = copy.deepcopy(layer)
    return plain
