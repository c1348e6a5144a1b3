"""The mask in blocks is the dense one, and flex attention under it gives what SDPA gives, gradients included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from engine import masks
from engine.backbones import qwen2_5_vl
from engine.backbones.base import States
from engine.backbones.qwen2_5_vl import Qwen25VL, blocks_attention
from engine.layout import Layout, Packed, marker, pack, slots, target
from engine.methods.method import run
from engine.methods.pause import PauseDistillation
from engine.recompute import recompute_layers
from tests import tiny
from tests.near import close
from tests.test_layout import PAD, context, encode, three_branches

METHOD = PauseDistillation(pauses=(2, 9))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention as plain operations, on a CPU with gradients: torch has them for the plain operations alone, and
    refuses before it knows that it won't compile."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *given: None)
    monkeypatch.setattr(qwen2_5_vl, "compiled_attention", lambda: flex_attention.flex_attention)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    tiny.tiny_backbone().save(place)
    return place


def packed_samples(model: Qwen25VL) -> Packed:
    """Samples of several lengths, all but the longest padded."""
    rng = np.random.default_rng(4)
    return pack([METHOD.layout(sample, rng) for sample in tiny.samples(model)], model.encode, model.pad)


def gradients(model: Qwen25VL, packed: Packed) -> dict[str, Tensor]:
    """Of one packed loss, the loss itself among them."""
    model.model.zero_grad(set_to_none=True)
    loss, _ = METHOD.loss(run(model, packed))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    return {**grads, "loss": loss.detach()}


class Blockwise(Qwen25VL):
    """Every whole pack goes by its blocks, here on a CPU."""

    def whole(self, embeds: Tensor, packed: Packed, cache: object = None, sight: object = None) -> States:
        out = self.decoded(embeds, packed.positions, {"full_attention": masks.blocks(packed)}, None)
        return States(out.hidden_states)


def test_blocks_are_the_dense_mask() -> None:
    think = slots("P", 150)
    layouts = [
        three_branches("q" * 300, count=9, chain="u" * 200, answer="a" * 150),
        Layout({"x": (context("q" * 260), think, marker("C", sees=(think,)), target("a" * 300))}),
        Layout({"only": (context("q"), target("ab"))}),
    ]
    packed = pack(layouts, encode, PAD)
    padded_left = packed.node.flip(1)
    for node in (packed.node, padded_left, packed.node[:, :256], packed.node[:, :100]):
        given = Packed(**{**vars(packed), "node": node})
        batch, length = node.shape
        found, dense = masks.blocks(given), masks.visible(given)
        assert found.shape == (batch, 1, length, length)
        assert torch.equal(create_mask(found.mask_mod, batch, None, length, length, "cpu")[:, 0], dense)
        expected = create_block_mask(found.mask_mod, batch, None, length, length, "cpu")
        for name in ("kv", "q", "full_kv", "full_q"):
            counts, indices = (getattr(expected, f"{name}_{part}") for part in ("num_blocks", "indices"))
            assert torch.equal(getattr(found, f"{name}_num_blocks"), counts)
            listed = torch.arange(indices.shape[-1]) < counts[..., None]
            assert torch.equal(getattr(found, f"{name}_indices")[listed], indices[listed])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("scaling", [0.25, 0.1])
def test_attention_by_blocks_is_sdpa(scaling: float) -> None:
    packed = packed_samples(tiny.tiny_backbone())
    dense, (batch, length), real = masks.visible(packed), packed.node.shape, packed.node >= 0
    assert length > masks.BLOCK
    assert not real.all()
    torch.manual_seed(0)
    given = [torch.randn(batch, length, heads, 16).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    weights = torch.randn(batch, length, 4, 16)
    got = blocks_attention(*given, masks.blocks(packed), scaling, flex_attention.flex_attention)
    mask = masks.additive(dense, torch.float32)
    expected = F.scaled_dot_product_attention(*given, mask, scale=scaling, enable_gqa=True).transpose(1, 2)
    close(got[real], expected[real])
    assert (got[~real] == 0).all()
    only_real = weights * real[:, :, None, None]
    grads = torch.autograd.grad((got * weights).sum(), given)  # padding's share of it comes to nothing
    for ours, theirs in zip(grads, torch.autograd.grad((expected * only_real).sum(), given), strict=True):
        close(ours, theirs)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_model_by_blocks_is_the_model(saved: Path, recomputed: bool) -> None:
    """The BlockMask goes through transformers' layers, and through those that are computed again."""
    model = Qwen25VL.load(saved)
    packed = packed_samples(model)
    expected = gradients(model, packed)
    if recomputed:
        recompute_layers(model.model)
        model.model.train()
    got = gradients(Blockwise(model.model, model.tokenizer), packed)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        close(grad, expected[name])


@pytest.mark.usefixtures("uncompiled")
def test_under_autocast_queries_and_keys_follow_the_values(saved: Path) -> None:
    model = Qwen25VL.load(saved)
    packed = packed_samples(model)
    real = packed.node >= 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = run(model, packed).hidden[-1]
        got = run(Blockwise(model.model, model.tokenizer), packed).hidden[-1]
    assert torch.isfinite(got).all()
    assert float((got - expected)[real].abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of flex attention need a GPU: no CUDA here")
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_gpu_learns_by_blocks_what_it_learns_densely(
    saved: Path, monkeypatch: pytest.MonkeyPatch, recomputed: bool
) -> None:
    model = Qwen25VL.load(saved, "cuda")
    packed = packed_samples(model).to("cuda")
    taken: list[BlockMask] = []
    blocks = masks.blocks
    monkeypatch.setattr(masks, "blocks", lambda packed: taken.append(blocks(packed)) or taken[-1])
    if recomputed:
        recompute_layers(model.model)
        model.model.train()
    expected = gradients(model, packed)
    assert packed.ids.shape[1] < qwen2_5_vl.LONG
    assert not taken
    monkeypatch.setattr(qwen2_5_vl, "LONG", 1)
    got = gradients(model, packed)
    assert len(taken) == 1
    with torch.no_grad():
        run(model, packed)
    assert len(taken) == 1  # only training goes by blocks
    for name, grad in got.items():
        size = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-4 * size)
