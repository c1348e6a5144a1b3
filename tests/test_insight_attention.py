"""Where it looked: the recomputed weights are the eager model's own, and a planted look is found where it was planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from engine import generate, latents, masks
from engine.backbones.base import Backbone, add_tokens
from engine.data.samples import Sample, context
from engine.insight import attention
from engine.layout import Layout, marker, pack
from engine.methods.coconut import Coconut
from engine.methods.controls import Silent
from engine.methods.method import Method
from tests import tiny

MADE: list[Callable[[], Backbone]] = [tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_llama, tiny.tiny_gpt2]


def asked(backbone: Backbone) -> list[Sample]:
    return [replace(sample, dialect="chat") for sample in tiny.chains(backbone)]


@pytest.mark.parametrize("method", [Silent(3), Coconut()], ids=["rides the prefill", "fed back"])
@pytest.mark.parametrize("made", MADE)
def test_weights_are_those_of_the_whole_model_under_eager(made: Callable[[], Backbone], method: Method) -> None:
    backbone = made()
    add_tokens(backbone.model, backbone.tokenizer, Coconut.tokens)
    samples, thinking = asked(backbone), method.thinking(3)
    thoughts = generate.think(backbone, samples, thinking)
    found = attention.weights(backbone, thoughts, ("<ANS>", "<answer>"))
    assert backbone.model.config.get_text_config()._attn_implementation == "sdpa"
    assert not backbone.model.config.get_text_config().output_attentions

    layouts = [Layout({"line": (context(s), *thinking, marker("<ANS>"), marker("<answer>"))}) for s in samples]
    packed = pack(layouts, backbone.encode, backbone.pad)
    eager = made()
    add_tokens(eager.model, eager.tokenizer, Coconut.tokens)
    eager.model.set_attn_implementation("eager")
    eager.model.config.get_text_config().output_attentions = True
    embeds = eager.embed(packed)
    with torch.no_grad():
        before = latents.forward(eager, packed)[-1].roll(1, 1)
    embeds = embeds.where(~packed.latents[..., None], before)
    allowed = masks.visible(packed)
    with torch.no_grad():
        whole = eager.forward(embeds, packed.positions, masks.additive(allowed, embeds.dtype), DynamicCache())
    for i in range(len(samples)):
        length = int((packed.node[i] >= 0).sum()) - 2  # as thinking packed it, without the marks
        rows = [*thoughts.slots[i].tolist(), *[r for r, n in enumerate(packed.node[i].tolist()) if n >= 0][-2:]]
        start = int(thoughts.context[i].int().argmax())
        wanted = torch.stack(whole.attentions)[:, i][:, :, rows]
        columns = [*range(start, start + length), *rows[-2:]]
        mine = found[:, i][..., [*range(start, start + length), *range(found.shape[-1] - 2, found.shape[-1])]]
        assert torch.allclose(mine, wanted[..., columns], atol=1e-5)
        assert torch.allclose(mine.sum(-1), torch.ones(()), atol=1e-5)


def test_the_watched_copy_shares_its_weights_and_leaves_no_hook_behind() -> None:
    backbone = tiny.tiny_backbone()
    twin = attention.watched(backbone)
    mine, theirs = dict(backbone.model.named_parameters()), dict(twin.model.named_parameters())
    assert all(mine[name] is theirs[name] for name in mine)
    thoughts = generate.think(backbone, asked(backbone)[:1], Silent(2).thinking(2))
    attention.weights(backbone, thoughts)
    again = generate.think(backbone, asked(backbone)[:1], Silent(2).thinking(2))
    assert len(again.states) == backbone.layers + 1
    assert torch.equal(again.states, thoughts.states)


def test_a_planted_look_is_found_at_its_frame_and_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of every slot's attention is set on the patch in the second row and third column of the clip's last slice."""
    backbone = tiny.tiny_backbone()
    sample = Sample(tiny.clip(backbone, 1, frames=6, height=56, width=84), "Where?", ("a", "b"), (), "A")
    rows, (height, width), seconds = attention.seen_rows(backbone, sample)
    assert (tuple(rows.shape), height, width, seconds) == ((3, 6), 2, 3, 1.0)
    thoughts = generate.think(backbone, [sample], Silent(2).thinking(2))

    def planted(_: Backbone, given: generate.Thoughts, marks: Any) -> torch.Tensor:
        made = torch.zeros(1, 1, 1, 2, given.context.shape[1])
        made[..., rows[2, 1 * width + 2]] = 1
        return made

    monkeypatch.setattr(attention, "weights", planted)
    (found,) = attention.looked(backbone, thoughts, [sample])
    assert found.patches.shape == (1, 1, 2, 3, 2, 3)
    assert found.patches[0, 0, 1, 2, 1, 2] == 1
    assert found.frames[0, 0].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert found.slots.sum() == 0


def test_moments_share_the_slices_that_they_cover() -> None:
    frames = torch.tensor([[0.1, 0.2, 0.4]])  # slices of one second
    found = attention.over_moments(frames, 1.0, [(0, 1), (1, 3), (0.5, 1.5), (2.5, 9)])
    assert found[0].tolist() == pytest.approx([0.1, 0.6, 0.15, 0.2])


def test_tiles_of_a_video_and_pictures_that_are_no_grid() -> None:
    backbone = tiny.tiny_internvl()
    video = Sample(tiny.clip(backbone, 1, frames=3), "Where?", (), (), "A", "free-form")
    rows, shape, _ = attention.seen_rows(backbone, video)
    assert (tuple(rows.shape), shape) == ((3, 4), (2, 2))
    with pytest.raises(ValueError, match="no clip"):
        attention.seen_rows(backbone, replace(video, visual=None))
    tiles = replace(video, visual=tiny.clip(backbone, 2, 1, 28, 84, still=True))
    with pytest.raises(ValueError, match="overlap"):
        attention.seen_rows(backbone, tiles)
