"""Checkpoints of the published layouts, made here, become folders that load and compute what they computed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.__main__ import main
from engine.adapters import load_companions
from engine.backbones.base import Backbone
from engine.backbones.load import load
from engine.config import ConfigError
from engine.exchange import imports
from engine.exchange.imports import imported, in_halves, merged, stored
from engine.methods import from_description
from engine.methods.coconut import LATENT, START, STOP
from engine.methods.codi import PROJECTOR
from engine.methods.heima import Heima
from engine.methods.steps import DECODER
from tests import tiny

THREE = 3  # new rows


@pytest.fixture(scope="module", params=[tiny.tiny_gpt2, tiny.tiny_llama])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backbone]:
    made = request.param()
    folder = tmp_path_factory.mktemp("base")
    made.save(folder)
    return folder, made


def learnt(made: Backbone, rows: int = THREE) -> nn.Module:
    """The model after training by somebody else: other weights, and new rows behind its own."""
    model = copy.deepcopy(made.model)
    model.resize_token_embeddings(made.model.get_input_embeddings().num_embeddings + rows, mean_resizing=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model.eval()


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=targets))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight += 0.05 * torch.randn_like(weight)
    return adapted.eval()


def prefixed(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def states(model: nn.Module, embeds: Tensor) -> Tensor:
    return model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]


def embedded(model: nn.Module, ids: list[int]) -> Tensor:
    return model.get_input_embeddings()(torch.tensor([ids]))


class Published(nn.Module):
    """CODI's module, SIM-CoT's if it has a decoder."""

    def __init__(self, model: nn.Module, dim: int, decoder: nn.Module | None) -> None:
        super().__init__()
        self.codi = model
        self.prj = nn.Sequential(nn.Dropout(0.1), nn.Linear(dim, 24), nn.GELU(), nn.Linear(24, dim))
        self.prj.add_module("ln", nn.LayerNorm(dim))
        if decoder is not None:
            self.decoder = decoder


@pytest.mark.parametrize("explained", [False, True])
def test_codi(base: tuple[Path, Backbone], tmp_path: Path, explained: bool) -> None:
    folder, made = base
    targets = (
        ["c_attn", "c_proj", "c_fc"] if "gpt2" in made.model.config.model_type else ["q_proj", "down_proj", "o_proj"]
    )
    model = lora(learnt(made), targets)
    published = Published(model, 64, learnt(made, 0) if explained else None).eval()
    torch.save(published.state_dict(), tmp_path / "pytorch_model.bin")
    out = imported("codi", tmp_path / "pytorch_model.bin", tmp_path / "out", str(folder), latents=5)
    ours = load(out)
    rows = made.model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        theirs = states(model, embedded(model, [5, 7, rows + 1]))
        mine = states(ours.model, embedded(ours.model, [5, 7, ours.token(START)]))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        closed = model(inputs_embeds=embedded(model, [5, rows + 2])).logits[..., :rows]
        torch.testing.assert_close(
            ours.model(inputs_embeds=embedded(ours.model, [5, ours.token(STOP)])).logits[..., :rows],
            closed,
            rtol=1e-4,
            atol=1e-3,
        )
        method = from_description(json.loads((out / "sotto.json").read_text())["method"])
        assert (method.num_latent, method.prj_dim, method.steps is not None) == (5, 24, explained)
        companions = method.companions(ours)
        load_companions(out, companions)
        torch.testing.assert_close(companions[PROJECTOR](mine), published.prj(theirs), rtol=1e-4, atol=1e-4)
        if explained:
            given = torch.randn(1, 3, 64)
            torch.testing.assert_close(states(companions[DECODER], given), states(published.decoder, given))


@pytest.mark.parametrize("explained", [False, True])
def test_coconut(base: tuple[Path, Backbone], tmp_path: Path, explained: bool) -> None:
    folder, made = base
    model, decoder = learnt(made), learnt(made)
    weights = prefixed(model, "base_causallm.")
    weights |= {"embedding.weight": model.get_input_embeddings().weight.detach().clone()}
    weights |= prefixed(decoder, "expainable_llm.") if explained else {}
    (tmp_path / "in").mkdir()
    halves = list(weights)[::2], list(weights)[1::2]
    for place, names in enumerate(halves):  # in two files
        save_file({name: weights[name] for name in names}, tmp_path / "in" / f"model-{place}.safetensors")
    out = imported("coconut", tmp_path / "in", tmp_path / "out", str(folder))
    ours, rows = load(out), made.model.get_input_embeddings().num_embeddings
    ids = [ours.token(name) for name in (START, STOP, LATENT)]
    torch.testing.assert_close(
        states(ours.model, embedded(ours.model, [3, *ids])),
        states(model, embedded(model, [3, rows, rows + 1, rows + 2])),
    )
    method = from_description(json.loads((out / "sotto.json").read_text())["method"])
    assert method.slot_range == (6, 6)
    companions = method.companions(ours)
    assert (DECODER in companions) == explained
    if explained:
        load_companions(out, companions)
        given = torch.randn(1, 3, 64)
        torch.testing.assert_close(states(companions[DECODER], given), states(decoder, given))


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """transformers' order -> torchtune's, as its own conversion has it."""
    dim = weight.shape[0] // heads
    return weight.view(heads, 2, dim // 2, -1).transpose(1, 2).reshape(heads * dim, -1)


def tuned(model: nn.Module, made: Backbone) -> dict[str, Tensor]:
    """A Llama by torchtune's names."""
    swaps = {
        "model.embed_tokens": "tok_embeddings", "model.norm.weight": "norm.scale", "lm_head": "output", "model.": "",
        "self_attn.o_proj": "attn.output_proj", "self_attn": "attn", "input_layernorm.weight": "sa_norm.scale",
        "post_attention_layernorm.weight": "mlp_norm.scale", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
    }  # fmt: skip
    config, found = made.text_config, {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().clone()
        if "q_proj.weight" in name or "k_proj.weight" in name:
            value = in_pairs(value, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        for old, new in swaps.items():
            name = name.replace(old, new)
        found[name] = value
    return found


def test_heima_by_torchtunes_names(tmp_path: Path) -> None:
    made = tiny.tiny_llama()
    made.save(tmp_path / "base")
    model, rows = learnt(made), made.model.get_input_embeddings().num_embeddings
    weights = tuned(model, made)
    assert "layers.0.attn.output_proj.weight" in weights
    torch.save({"model": weights}, tmp_path / "hf_model_0001_0.pt")
    tokens = Heima().thinking_tokens
    told = [f"--token={token}={rows + place}" for place, token in enumerate(tokens)]
    command = ["import-checkpoint", "heima", str(tmp_path / "hf_model_0001_0.pt"), str(tmp_path / "out")]
    assert main([*command, "--base", str(tmp_path / "base"), *told]) == 0
    ours = load(tmp_path / "out", tokens=Heima().tokens)
    ids = [ours.token(token) for token in tokens]
    torch.testing.assert_close(
        states(ours.model, embedded(ours.model, [3, *ids, 9])),
        states(model, embedded(model, [3, rows, rows + 1, rows + 2, 9])), rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_heima_as_an_adapter_alone(tmp_path: Path) -> None:
    made = tiny.tiny_llama()
    made.save(tmp_path / "base")
    adapted = lora(copy.deepcopy(made.model), ["q_proj", "v_proj", "lm_head"])
    adapted.save_pretrained(str(tmp_path / "adapter"))
    out = imported("heima", tmp_path / "adapter", tmp_path / "out", str(tmp_path / "base"))
    with torch.no_grad():
        given = torch.tensor([[3, 4, 5]])
        torch.testing.assert_close(
            load(out).model(given).logits[..., : made.text_config.vocab_size],
            adapted(given).logits,
            rtol=1e-4,
            atol=1e-3,
        )


def test_heima_with_eyes_by_its_older_names(tmp_path: Path) -> None:
    made = tiny.tiny_mllama()
    made.save(tmp_path / "base")
    swaps = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.vision": "vision",
             "model.multi": "multi"}  # fmt: skip
    weights = {}
    for name, tensor in made.model.state_dict().items():
        old = next((old for old in swaps if name.startswith(old)), "")
        weights[swaps.get(old, "") + name.removeprefix(old)] = tensor.clone() + 0.01
    assert any(name.startswith("vision_model.") for name in weights)
    save_file(weights, tmp_path / "model.safetensors")
    out = imported("heima", tmp_path / "model.safetensors", tmp_path / "out", str(tmp_path / "base"))
    mine = load(out, tokens=Heima().tokens).model.state_dict()
    known = made.model.get_output_embeddings().out_features
    for name, tensor in made.model.state_dict().items():
        table = "embed_tokens" in name or "lm_head" in name
        torch.testing.assert_close(*((t[:known] if table else t) for t in (mine[name], tensor + 0.01)))


def test_pickles_with_more_than_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": Path("somewhere")}, tmp_path / "bad.bin")
    with pytest.raises(ConfigError, match="weights alone"):
        stored(tmp_path / "bad.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no weights"):
        stored(tmp_path / "empty")


def test_of_a_trainers_folder_the_weights_alone_are_read(tmp_path: Path) -> None:
    """Its other files are pickles of more than tensors, or tensors of no model."""
    for name in ("training_args.bin", "rng_state_0.pth", "scheduler.pt"):
        torch.save({"more": Path("somewhere")}, tmp_path / name)
    torch.save({"state": torch.ones(3)}, tmp_path / "optimizer.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model-2.bin")
    assert stored(tmp_path).keys() == {"a", "b"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    assert stored(tmp_path).keys() == {"a"}
    save_file({"c": torch.ones(1)}, tmp_path / "first.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"c": "first.safetensors"}}))
    assert stored(tmp_path).keys() == {"c"}
    (tmp_path / "first.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"first\.safetensors can't be read"):
        stored(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"index\.json doesn't say which files"):
        stored(tmp_path)


def test_what_does_not_fit_is_refused(base: tuple[Path, Backbone], tmp_path: Path) -> None:
    folder, made = base
    weights = prefixed(learnt(made), "base_causallm.")
    for change, word in (
        ({"base_causallm.strange": torch.zeros(1)}, r"it has an extra weight, strange\."),
        ({name: t[:2] for name, t in weights.items() if "norm" in name or "ln_f" in name}, "shape"),
    ):
        save_file(weights | change, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=word):
            imported("coconut", tmp_path / "model.safetensors", tmp_path / "out", str(folder))
    name = next(name for name in weights if "mlp" in name)
    save_file({key: t for key, t in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="lacks"):
        imported("coconut", tmp_path / "model.safetensors", tmp_path / "out", str(folder))
    save_file({k.replace("base_causallm", "codi"): t for k, t in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="projector"):
        imported("codi", tmp_path / "model.safetensors", tmp_path / "out", str(folder))
    half = {"prj.1.weight": torch.zeros(8, 64), "prj.1.bias": torch.zeros(8)}
    save_file(
        {k.replace("base_causallm", "codi"): t for k, t in (weights | half).items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"projector isn't CODI's: down\.bias"):
        imported("codi", tmp_path / "model.safetensors", tmp_path / "out", str(folder))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match="can't be read as weights"):
        imported("codi", tmp_path / "model.safetensors", tmp_path / "out", str(folder))
    assert not (tmp_path / "out").exists()


def test_what_is_another_kinds_or_half_is_refused(
    base: tuple[Path, Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = base
    torch.save(torch.zeros(2), tmp_path / "one.pt")
    with pytest.raises(ConfigError, match="holds a Tensor"):
        stored(tmp_path / "one.pt")
    with pytest.raises(ConfigError, match="layer lacks its lora_B"):
        merged({"layer.lora_A.weight": torch.zeros(2, 4)}, 1.0)
    loaded = []
    monkeypatch.setattr(imports, "load", lambda *given, **named: loaded.append(given) or load(*given, **named))
    torch.save(prefixed(made.model, "codi.") | {"prj.1.weight": torch.zeros(8, 64)}, tmp_path / "plain.pt")
    with pytest.raises(ConfigError, match="too few for the method's tokens"):
        imported("codi", tmp_path / "plain.pt", tmp_path / "out", str(folder))
    assert len(loaded) == 1
    adapter = {"model.layers.0.self_attn.q_proj.change": torch.zeros(2, 5)}
    if "llama" in made.model.config.model_type:
        with pytest.raises(ConfigError, match=r"adapter of model\.layers\.0\.self_attn\.q_proj\.weight has the shape"):
            imports.filled(made.model, adapter, (0, 0), {})


def test_halves_and_pairs() -> None:
    weight = torch.arange(24.0).reshape(8, 3)
    assert torch.equal(in_halves(in_pairs(weight, 2), 2), weight)
    assert not torch.equal(in_pairs(weight, 2), weight)
