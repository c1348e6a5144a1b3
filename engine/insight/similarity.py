"""How alike hidden states are, layer by layer: pure functions on captured states."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def between_slots(states: Tensor) -> Tensor:
    """Cosine of every slot's state with every other's in the same layer.

    states: [layers + 1, slots, dim] -> [layers + 1, slots, slots], symmetric, 1 on the diagonal (0 for a zero state).
    """
    unit = normalize(states.double(), dim=-1)
    return (unit @ unit.transpose(1, 2)).clamp(-1, 1)


def with_state(states: Tensor, state: Tensor) -> Tensor:
    """Cosine of every slot's state with one state of the same layer.

    states: [layers + 1, slots, dim], state: [layers + 1, dim] -> [layers + 1, slots].
    """
    return (normalize(states.double(), dim=-1) @ normalize(state.double(), dim=-1)[:, :, None])[..., 0].clamp(-1, 1)
