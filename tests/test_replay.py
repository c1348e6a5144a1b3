"""Writing by replayed steps: what a captured CUDA graph would do, recorded and replayed on a CPU; and on a GPU the graph."""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from engine import generate, room
from engine.backbones.base import Backbone
from engine.backbones.text import TextLM
from engine.data.samples import Sample
from engine.insight.replace import each_alone, replaced
from engine.layout import slots
from tests import tiny

MAKERS: list[Callable[..., Backbone]] = [
    tiny.tiny_backbone, tiny.tiny_qwen3vl, tiny.tiny_mllama, tiny.tiny_llava, tiny.tiny_llava_video, tiny.tiny_lite0,
    tiny.tiny_internvl, tiny.tiny_gpt2, tiny.tiny_llama,
]  # fmt: skip
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "unique",
    "masked_select",
    "lift_fresh",
    "equal",
)  # for a device, or copy to it


def asked(backbone: Backbone) -> list[Sample]:
    """Questions of different lengths, the first about a picture where the model has eyes."""
    picture = None if isinstance(backbone, TextLM) else tiny.clip(backbone, 2, 1, 84, 56, still=True)
    return [Sample(picture, "How many?", (), (), "3"), Sample(None, "What is one and one?", ("1", "2"), (), "B")]


class Recording(TorchDispatchMode):
    """The operations that a step runs, as a CUDA graph keeps them: with the very tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in func.__name__ for name in WAITS), func
        if func.__name__.startswith(("index.", "index_put")):  # how many rows a mask chooses, the device alone knows
            assert all(each.dtype != torch.bool for each in args[1] if each is not None), func
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if (
                    isinstance(new, torch.Tensor)
                    and new.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()
                ):
                    kept.copy_(new)


def all_shown(layers, ahead):
    cache, place = room.opened(layers, ahead)
    place.show_all()
    return cache, place


def recorded(step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The step: first as it is, so that the cache takes its room, then recorded, then replayed."""
    count, recording, state = 0, Recording(), torch.empty(0)

    def run(*given: Any) -> torch.Tensor:
        nonlocal count, state
        count += 1
        if count == 1:
            return step(*given)
        if count == 2:
            with recording:
                state = step(*given)
        else:
            recording.replay()
        return state.clone()

    return run


@pytest.mark.parametrize("how", ["explicit", "answer"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_recorded_step_writes_what_steps_write(make, how, monkeypatch):
    """The chain of each sample of a batch, and the answer in lanes side by side."""
    backbone = make()
    thoughts = generate.think(backbone, asked(backbone), (slots("<pause>", 3),))
    if how == "answer":
        thoughts = replaced(backbone, thoughts, each_alone(3))
    usual = getattr(generate, how)(backbone, thoughts, limit=10)
    monkeypatch.setattr(generate, "room", SimpleNamespace(opened=all_shown))
    monkeypatch.setattr(generate, "_step", recorded(generate._step))
    again = getattr(generate, how)(backbone, thoughts, limit=10)
    assert usual.ids == again.ids
    assert torch.allclose(usual.states, again.states, atol=1e-4)


def stretched() -> Backbone:
    """Rotary positions that grow with the text."""
    backbone = tiny.tiny_llama()
    config = copy.deepcopy(backbone.model.config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(backbone.model.state_dict())
    return replace(backbone, model=model)


def test_a_step_that_waits_says_so(monkeypatch):
    backbone = stretched()
    assert backbone.waits
    assert not any(make().waits for make in MAKERS)
    thoughts = generate.think(backbone, asked(backbone), ())
    monkeypatch.setattr(generate, "_step", recorded(generate._step))
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        generate.explicit(backbone, thoughts, limit=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU: no CUDA here")
@pytest.mark.parametrize("make", [*MAKERS, stretched])
def test_a_graph_writes_what_steps_write(make, monkeypatch):
    backbone = make()
    backbone.model.to("cuda")
    thoughts = generate.think(backbone, asked(backbone), (slots("<pause>", 3),))
    limit = generate.WORTH_A_GRAPH + 8
    graphed = generate.explicit(backbone, thoughts, limit), generate.answer(backbone, thoughts, limit=limit)
    monkeypatch.setattr(generate, "WORTH_A_GRAPH", limit)
    usual = generate.explicit(backbone, thoughts, limit), generate.answer(backbone, thoughts, limit=limit)
    for one, other in zip(usual, graphed):
        assert one.ids == other.ids
        assert torch.allclose(one.states, other.states, atol=1e-3)
