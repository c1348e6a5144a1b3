"""Heima's numbers are met; other shapes and numbers of thinking tokens too, against a plain loop; and misses are told."""

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
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny
from tests.conformance.__main__ import main
from tests.test_conformance import change, change_array, missed

GOLDEN = Path(__file__).parent / "golden" / "C"
IGNORED = -100


def test_published_numbers(capsys: pytest.CaptureFixture) -> None:
    assert main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("  ok") for line in lines) == len(lines) - 1 > 150
    assert "0 missed" in lines[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "numbers"
    shutil.copytree(GOLDEN, copy)
    return copy


def test_a_wrong_number_of_each_kind_is_a_miss(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def spoil(d: dict) -> None:
        d["main"]["step2"]["loss"] += 1e-3
        d["main"]["step1"]["num_label_tokens_shifted"] += 1
        d["main"]["step0_plain_cot"]["grad_norms"]["lm_head.weight"] *= 1.0005
        d["interpreter"]["summary"]["loss_without_injection"] -= 1e-3
        d["interpreter"]["summary"]["num_label_tokens_unshifted"] -= 1
        d["interpreter"]["telepathy"] = {"loss": 1.0}
        d["step5_current_loss"] = 3.0
        d["surprise"] = 1.0

    def relabel(d: dict) -> None:
        d["main"][3]["labels"][1][8] = IGNORED
        d["main"][1]["tokens"][0][12] += 1
        d["main"][4]["labels"][1][18] = 5  # something to be learnt on padding
        d["interpreter"]["summary"]["labels"][0][12] += 1

    change(folder, "expected.json", spoil)
    change(folder, "inputs.json", relabel)
    change_array(folder, "expected.safetensors", "interpreter.summary.thinking_hidden", lambda x: x + 1e-3)
    assert main([str(folder)]) == 1
    assert sorted(missed(capsys)) == sorted([
        "main.step2.loss", "main.step1.num_label_tokens_shifted", "main.step0_plain_cot.grad_norms.lm_head.weight",
        "interpreter.summary.loss_without_injection", "interpreter.summary.num_label_tokens_unshifted",
        "interpreter.telepathy", "step5_current_loss", "surprise", "main.step3.labels", "main.step1.tokens", "main.step4_recover.labels",
        "interpreter.summary.labels", "interpreter.summary.thinking_hidden",
    ])  # fmt: skip


@pytest.mark.parametrize(("weights", "at_least"), [("weights_main", 100), ("weights_summary", 15)])
def test_every_model_counts(weights: str, at_least: int, folder: Path, capsys: pytest.CaptureFixture) -> None:
    change_array(folder, f"{weights}.safetensors", "model.norm.weight", lambda x: x + torch.linspace(0, 0.02, len(x)))
    assert main([str(folder)]) == 1
    assert len(missed(capsys)) >= at_least


# Other shapes


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def padded(rows: list[list[int]], fill: int) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [fill] * (width - len(row)) for row in rows]


def numbers(model: Any, loss: Tensor, labels: Tensor) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    counts = {"unshifted": int((labels != IGNORED).sum()), "shifted": int((labels[:, 1:] != IGNORED).sum())}
    return {"loss": loss.item(), "grad_norms": norms, **{f"num_label_tokens_{k}": v for k, v in counts.items()}}


def write(folder: Path, seed: int, count: int, one_token: bool) -> None:
    """A folder like the published one, with `count` thinking tokens a section, each its own or all the same."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=90, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    sections = "summary", "caption", "reasoning"
    models = {tag: tiny.lively(LlamaForCausalLM(config)) for tag in ("main", *sections)}

    def words(low: int, high: int) -> list[int]:
        return rng.integers(1, 60, rng.integers(low, high)).tolist()

    thinking = {
        s: [70 + i] * count if one_token else [70 + count * i + k for k in range(count)] for i, s in enumerate(sections)
    }
    special = {f"thinking_of_{s}": ids[0] if one_token else ids for s, ids in thinking.items()}
    opened, closed = [60, 61, 62, 63], [64, 65, 66, 67]
    special |= {"bos": 68, "eos": 69, "pad": 0, "section_open": opened, "section_close": closed}
    parts = {"question": (2, 6), "summary": (1, 4), "caption": (3, 9), "reasoning": (2, 12), "conclusion": (1, 3)}
    rows = [{name: words(*lengths) for name, lengths in parts.items()} for _ in range(3)]
    inputs: dict[str, Any] = {
        "special_ids": special,
        "num_thinking_tokens_per_stage": count,
        "rows": rows,
        "main": [],
        "interpreter": {},
    }
    expected: dict[str, Any] = {"source": "here", "main": {}, "interpreter": {}}
    arrays: dict[str, Tensor] = {}
    for stage in range(4):
        tokens, labels = [], []
        for row in rows:
            told = [row[s] if i >= stage else thinking[s] for i, s in enumerate(sections)] + [row["conclusion"]]
            answer = [i for a, text, b in zip(opened, told, closed) for i in (a, *text, b)] + [69]
            tokens.append([68, *row["question"], *answer])
            labels.append([IGNORED] * (1 + len(row["question"])) + answer)
        case = {"name": f"stage{stage}", "compressed_stages": sections[:stage]}
        inputs["main"].append({**case, "tokens": padded(tokens, 0), "labels": padded(labels, IGNORED)})
        out = models["main"].model(torch.tensor(padded(tokens, 0))).last_hidden_state
        logits, wanted = models["main"].lm_head(out), torch.tensor(padded(labels, IGNORED))
        expected["main"][f"stage{stage}"] = numbers(models["main"], label_loss(logits, wanted), wanted)
        arrays[f"main.stage{stage}.logits"] = logits.detach()
    whole, current = padded(tokens, 0), expected["main"]["stage3"]
    total = current["loss"] * current["num_label_tokens_unshifted"]
    for section in sections:
        model, ids = models[section], thinking[section]
        before = [[68, *row["question"], *words(1, 5)] for row in rows]
        texts = [[*b, *ids, *words(1, 4), *row[section], 69] for b, row in zip(before, rows)]
        tokens, labels = padded(texts, 0), padded(texts, IGNORED)
        inputs["interpreter"][section] = {"tokens": tokens, "labels": labels}
        states = []
        embeds = model.get_input_embeddings()(torch.tensor(tokens)).detach()
        plain = embeds.clone()
        for b, row in enumerate(whole):
            place = next(i for i in range(len(row)) if row[i : i + count] == ids)
            states.append(out[b, place - 1 : place - 1 + count].detach())
        logits = filled(model, torch.tensor(tokens), [len(b) for b in before], states)
        wanted = torch.tensor(labels)
        found = numbers(model, label_loss(logits, wanted), wanted)
        found["loss_without_injection"] = label_loss(model(inputs_embeds=plain).logits, wanted).item()
        expected["interpreter"][section] = found
        arrays |= {
            f"interpreter.{section}.logits": logits.detach(),
            f"interpreter.{section}.thinking_hidden": torch.stack(states),
        }
        total += found["loss"] * found["num_label_tokens_unshifted"]
    expected["step5_current_loss"] = total
    given = {
        t: {"weights": f"{t}.safetensors", "class": "LlamaForCausalLM", "config": config.to_dict()} for t in models
    }
    for name, content in {
        "config": {"method": "heima", "models": given},
        "inputs": inputs,
        "expected": expected,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    for tag, model in models.items():
        save_file(model.state_dict(), folder / f"{tag}.safetensors")
    save_file(arrays, folder / "expected.safetensors")


def filled(model: Any, tokens: Tensor, places: list[int], states: list[Tensor]) -> Tensor:
    """Logits with each row's states written over the embeddings from its place on."""
    embeds = model.get_input_embeddings()(tokens)
    rows = [torch.cat([e[:place], s, e[place + len(s) :]]) for e, place, s in zip(embeds, places, states)]
    return model(inputs_embeds=torch.stack(rows)).logits


@pytest.mark.parametrize(("seed", "count", "one_token"), [(1, 1, True), (2, 2, True), (3, 3, False)])
def test_other_shapes_and_thinking_tokens(
    seed: int, count: int, one_token: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path, seed, count, one_token)
    assert main([str(tmp_path)]) == 0
    assert "0 missed" in capsys.readouterr().out.splitlines()[-1]
