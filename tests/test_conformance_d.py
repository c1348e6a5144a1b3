"""Multimodal CoCoNuT's numbers are met; other shapes, tiles and batches too, against a plain loop; and misses are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests import tiny
from tests.conformance.__main__ import main
from tests.test_conformance import change, change_array, missed

GOLDEN = Path(__file__).parent / "golden" / "D"
IGNORED = -100


def test_published_numbers(capsys: pytest.CaptureFixture) -> None:
    assert main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("  ok") for line in lines) == len(lines) - 1 > 60
    assert "0 missed" in lines[-1]


def test_a_wrong_number_of_each_kind_is_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "numbers"
    shutil.copytree(GOLDEN, folder)

    def spoil(d: dict) -> None:
        case = d["cases"]["stage1-c1"]
        case["loss"] += 1e-3
        case["grad_norms_language_model"]["lm_head.weight"] *= 1.0005
        case["surprise"] = 1.0

    def relabel(d: dict) -> None:
        batch = d["cases"][0]["batch"]
        batch["labels"][0][20] = IGNORED
        batch["position_ids"][1][5] += 1

    change(folder, "expected.json", spoil)
    change(folder, "inputs.json", relabel)
    spoiled = "image_features", "stage3-c2-mixed.logits", "stage1-c1.thought_embeds"
    for key in spoiled:
        change_array(folder, "expected.safetensors", key, lambda x: x + 1e-3)
    assert main([str(folder)]) == 1
    names = "loss", "grad_norms.lm_head.weight", "surprise", "labels", "position_ids"
    assert sorted(missed(capsys)) == sorted([*(f"stage1-c1.{name}" for name in names), *spoiled])


def test_another_picture_misses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "numbers"
    shutil.copytree(GOLDEN, folder)
    change_array(folder, "inputs.safetensors", "pixel_values", lambda x: x + 0.1)
    assert main([str(folder)]) == 1
    assert {"image_features", "stage1-c1.loss", "stage3-c2-mixed.thought_embeds"} <= set(missed(capsys))


# Other shapes


def ids_of(model: Any) -> dict[str, int]:
    names = {
        "img_start": "<img>", "img_end": "</img>", "image_token_id": "<IMG_CONTEXT>", "start_latent": "<think>",
        "latent": "<pause>", "end_latent": "</think>", "eos": "<|im_end|>", "pad": "<|endoftext|>",
    }  # fmt: skip
    return {theirs: model.token(ours) for theirs, ours in names.items()}


def reference(model: Any, row: list[int], labels: list[int], features: Tensor, special: dict[str, int]) -> Any:
    """One row alone, everything run again for every thought: -> logits, thoughts, loss of each label."""
    whole = model.model
    ids = torch.tensor([row])
    embeds = whole.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == special["image_token_id"])[..., None], features)
    thoughts = []
    for place in (i for i, token in enumerate(row) if token == special["latent"]):
        last = whole.model.language_model(inputs_embeds=embeds[:, :place]).last_hidden_state
        thoughts.append(last[0, -1])
        embeds = torch.cat([embeds[:, :place], last[:, -1:], embeds[:, place + 1 :]], dim=1)
    logits = whole.lm_head(whole.model.language_model(inputs_embeds=embeds).last_hidden_state)[0]
    losses = F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=IGNORED, reduction="none")
    return logits, thoughts, losses[torch.tensor(labels[1:]) != IGNORED]


def write(folder: Path, seed: int) -> None:
    """A folder like the published one: two images in a prompt, images of several tiles, rows at different stages."""
    backbone = tiny.tiny_internvl(seed, layers=2)
    model, special, rng = backbone.model, ids_of(backbone), np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return rng.integers(0, 256, count).tolist()

    def image(tiles: int) -> list[int]:
        return [special["img_start"], *[special["image_token_id"]] * 4 * tiles, special["img_end"]]

    questions = [
        [*image(2), *words(3)],
        [*words(4), *image(1), *words(1), *image(3), *words(2)],
        [*words(2), *image(1), *words(5)],
    ]
    steps = [[words(n) for n in lengths] for lengths in ((2, 3), (4,), (1, 2, 3))]
    answers = [[*words(n), special["eos"]] for n in (1, 3, 2)]
    samples: list[dict[str, Any]] = [
        {"question": q, "steps": s, "answer": a} for q, s, a in zip(questions, steps, answers)
    ]
    pixels = torch.from_numpy(rng.standard_normal((7, 3, 28, 28)).astype(np.float32))
    features = model.get_image_features(pixel_values=pixels).pooler_output.detach()
    tiles = features.split([2, 4, 1])
    c, stages = 3, [2, 0, 1]
    rows, labels = [], []
    for sample, stage in zip(samples, stages):
        thinking = [special["start_latent"], *[special["latent"]] * c * stage, special["end_latent"]]
        rest = [i for step in sample["steps"][stage:] for i in step] + sample["answer"]
        rows.append([*sample["question"], *thinking, *rest])
        labels.append([IGNORED] * (len(sample["question"]) + len(thinking)) + rest)
    outs = [reference(backbone, *x, special) for x in zip(rows, labels, [t.flatten(0, 1) for t in tiles])]
    loss = torch.cat([losses for *_, losses in outs]).mean()
    loss.backward()
    norms = {
        name: float(p.grad.norm())
        for name, p in model.named_parameters()
        if p.grad is not None and "vision_tower" not in name and "multi_modal" not in name
    }
    firsts = [row.index(special["latent"]) if special["latent"] in row else None for row in rows]
    shifts = [max(f for f in firsts if f) - f if f else 0 for f in firsts]
    length = max(shift + len(row) for shift, row in zip(shifts, rows))

    def padded(shift: int, row: list[int], fill: int) -> list[int]:
        return [fill] * shift + row + [fill] * (length - shift - len(row))

    batch = {
        "input_ids": [padded(s, row, special["pad"]) for s, row in zip(shifts, rows)],
        "labels": [padded(s, label, IGNORED) for s, label in zip(shifts, labels)],
        "attention_mask": [padded(s, [1] * len(row), 0) for s, row in zip(shifts, rows)],
        "position_ids": [padded(s, list(range(len(row))), 0) for s, row in zip(shifts, rows)],
    }
    logits = torch.zeros(3, length, len(model.lm_head.weight))
    for b, (out, *_) in enumerate(outs):
        logits[b, shifts[b] : shifts[b] + len(out)] = out.detach()
    arrays = {
        "image_features": features.contiguous(),
        "odd.logits": logits,
        "odd.thought_embeds": torch.stack([x.detach() for _, thoughts, _ in outs for x in thoughts]),
    }
    given = {"weights": "weights.safetensors", "class": type(model).__name__, "config": model.config.to_dict()}
    contents = {
        "config": {"method": "multimodal-coconut", "models": {"model": given}},
        "inputs": {
            "special_ids": special,
            "samples": samples,
            "cases": [{"name": "odd", "stage": 2, "c_thought": c, "batch": batch}],
        },
        "expected": {"cases": {"odd": {"loss": loss.item(), "grad_norms_language_model": norms}}},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "weights.safetensors")
    save_file({"pixel_values": pixels}, folder / "inputs.safetensors")
    save_file(arrays, folder / "expected.safetensors")


@pytest.mark.parametrize("seed", [1, 2])
def test_other_shapes_tiles_and_batches(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, seed)
    assert main([str(tmp_path)]) == 0
    assert "0 missed" in capsys.readouterr().out.splitlines()[-1]
