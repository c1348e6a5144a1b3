"""LoRA: what gets an adapter, what is saved, and that training goes on from it exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from engine import adapters, ask, models
from engine.adapters import MAIN, Lora
from engine.backbones.base import Backbone, add_tokens
from engine.backbones.load import load
from engine.config import ConfigError
from engine.data.worlds import WorldsSource
from engine.folders import checkpoints
from engine.methods import from_description
from engine.methods.codi import PROJECTOR, Codi
from engine.methods.heima import Heima, Interpreters
from engine.recipe import Training
from engine.training import made_ready, train
from engine.video import Sampling, read
from tests import tiny

HEIMA = Heima(tags="tokens")
SOURCE = WorldsSource(difficulties=(1, 2), sections=True)
MODELS: list[Callable[[], Backbone]] = [tiny.tiny_backbone, tiny.tiny_internvl, tiny.tiny_gpt2, tiny.tiny_llama]


def grown(make: Callable[[], Backbone]) -> Backbone:
    made = make()
    add_tokens(made.model, made.tokenizer, HEIMA.tokens)
    return made


def logits(model: Backbone) -> Tensor:
    """Of every token of the method and some others."""
    ids = torch.tensor([[model.token(token) for token in HEIMA.tokens] + list(range(20))])
    length = ids.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        states = model.forward(model.embed_ids(ids), torch.arange(length).expand(model.axes, 1, -1), mask)
        return model.logits(states.last)


def moved(model: Any) -> None:
    """As if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("lora", [Lora(r=4), Lora(r=4, train_embeddings=True, targets=("attention",))])
@pytest.mark.parametrize("make", MODELS)
def test_an_adapter_comes_back_as_it_was(make: Callable[[], Backbone], lora: Lora, tmp_path: Path) -> None:
    """Attached again it gives the same; merged too, to rounding. The first model and the vision encoder stay as they were."""
    model = grown(make)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    untouched = logits(model)
    adapter = adapters.attach(model, lora, HEIMA.tokens)
    assert torch.equal(logits(model), untouched)  # a new adapter adds nothing
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    assert not any("vis" in name for name in trained)
    moved(model.model)
    expected = logits(model)
    assert (expected - untouched).abs().max() > 0.1
    adapters.save(tmp_path / "saved", model, nn.ModuleDict(), {MAIN: adapter}, frozen=False)
    assert not (tmp_path / "saved" / "model.safetensors").exists()

    again, merged = grown(make), grown(make)
    adapters.attach_saved(again.model, tmp_path / "saved")
    assert {name for name, p in again.model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(logits(again), expected)
    adapters.merge(merged.model, tmp_path / "saved")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    after = merged.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "vis" in name)
    merged.save(tmp_path / "whole")
    torch.testing.assert_close(logits(load(tmp_path / "whole")), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_output_gets_an_adapter_of_its_own() -> None:
    """The embeddings stay as they are."""
    model = tiny.tiny_gpt2()
    table = model.model.get_input_embeddings().weight.clone()
    adapters.attach(model, Lora(r=2, targets=("output",)))
    assert model.model.lm_head.base_layer.weight is not model.model.get_input_embeddings().weight
    assert torch.equal(model.model.get_input_embeddings().weight, table)


def test_targets_are_parts_or_names() -> None:
    model = tiny.tiny_internvl()

    def names(**changes: Any) -> list[str]:
        return adapters.modules(model, Lora(**changes))

    layers = model.layers
    assert len(names(targets=("attention",))) == 4 * layers
    assert len(names(targets=("mlp",))) == 3 * layers
    assert names(targets=("output",)) == ["lm_head"]
    assert len(names(targets=("q_proj", "output"))) == layers + 1
    assert len(names()) == 7 * layers + 1
    eyes = [name for name in names(vision=True) if "vision" in name]
    assert any("attention" in name for name in eyes)
    assert any("mlp" in name for name in eyes)
    with pytest.raises(ConfigError, match="no matrix of this model is called 'c_attn'"):
        names(targets=("c_attn",))


def test_new_rows_are_the_same_each_time() -> None:
    """So an adapter fits a model to which its tokens are added again."""
    torch.manual_seed(3)
    one = grown(tiny.tiny_llama)
    made = tiny.tiny_llama()
    torch.manual_seed(4)
    add_tokens(made.model, made.tokenizer, HEIMA.tokens)
    assert torch.equal(one.model.get_input_embeddings().weight, made.model.get_input_embeddings().weight)
    assert torch.equal(one.model.lm_head.weight, made.model.lm_head.weight)


# Training


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("start")
    tiny.tiny_backbone(layers=2).save(folder)
    return str(folder)


def settings(start: str, out: Path, steps: int, **changes: Any) -> Training:
    values = {
        "init": start, "out": str(out), "steps": steps, "batch": 2, "accumulate": 1, "lr": 3e-3, "warmup": 0,
        "schedule": "constant", "device": "cpu", "workers": 0, "log_every": 1, "validate_every": 2, "save_every": 2,
    }  # fmt: skip
    return Training(**(values | changes))


def accuracy(backbone: Backbone, companions: nn.ModuleDict, epoch: int) -> dict[str, float]:
    return {"accuracy": 0.5}


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


DROPPED = Lora(r=4, dropout=0.1, train_embeddings=True)


@pytest.mark.parametrize(("method", "parts"), [(HEIMA, 1), (Interpreters(tags="tokens", interpreted=("SUMMARY",)), 2)])
def test_a_resumed_run_goes_on_exactly(start: str, tmp_path: Path, method: Heima, parts: int) -> None:
    """Its checkpoints hold the adapter alone; dropout too is decided by the step."""
    train(settings(start, tmp_path / "whole", 4), method, SOURCE, accuracy, lora=DROPPED)
    train(settings(start, tmp_path / "parts", 2), method, SOURCE, accuracy, lora=DROPPED)
    train(settings(start, tmp_path / "parts", 4), method, SOURCE, accuracy, resume=True, lora=DROPPED)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    names = ["model.safetensors", "model_1.safetensors"][:parts]
    for name in names:
        one, other = (load_file(checkpoints(tmp_path / run)[-1] / name) for run in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert all("lora_" in key or "trainable_tokens" in key for key in one)
    assert one


def test_a_run_goes_on_with_the_adapter_of_another(start: str, tmp_path: Path) -> None:
    """The second run's first loss is that of the first run's adapter, merged; and it changes the adapter."""
    lora = Lora(r=4, train_embeddings=True)
    first = train(settings(start, tmp_path / "one", 2), HEIMA, SOURCE, accuracy, lora=lora)
    second = train(settings(start, tmp_path / "two", 2, adapter=str(first)), HEIMA, SOURCE, accuracy, lora=lora)
    train(settings(start, tmp_path / "merged", 1, adapter=str(first)), HEIMA, SOURCE, accuracy)
    train(settings(start, tmp_path / "anew", 1), HEIMA, SOURCE, accuracy)
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "merged")[0], rel=1e-5)
    assert losses(tmp_path / "two")[0] < losses(tmp_path / "anew")[0]
    one, two = (load_file(best / "adapter_model.safetensors") for best in (first, second))
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "merged" / "best" / "model.safetensors").exists()  # every weight was trained
    told = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert told["lora"]["r"] == 4
    assert told["training"]["adapter"] == str(first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 2}, "lora.r is 2, .* was trained with 4: use"),
        ({"alpha": 8}, "lora.alpha is 8"),
        ({"train_embeddings": True}, "lora.train_embeddings is True"),
        ({"targets": ("mlp",)}, r"lora.targets is .* was trained with \['k_proj', 'o_proj', 'q_proj', 'v_proj'\]"),
    ],
)
def test_an_adapter_is_gone_on_with_as_it_was_made(start: str, tmp_path: Path, change: dict, words: str) -> None:
    lora, model = Lora(r=4, targets=("attention",)), load(start, tokens=HEIMA.tokens)
    adapters.attach(model, lora, HEIMA.tokens).save_pretrained(tmp_path, save_embedding_layers=False)
    for asked in (lora, replace(lora, **change)):
        fresh = load(start, tokens=HEIMA.tokens)
        with pytest.raises(ConfigError, match=words) if asked != lora else nullcontext():
            adapters.for_training(fresh, nn.ModuleDict(), asked, False, str(tmp_path), HEIMA.tokens)


def test_companions_go_on_from_those_kept_as_adapters() -> None:
    place = models.SMALL / "heima"
    method = from_description(models.told_by(place)["method"])
    backbone, readers, _ = made_ready(Training(init=f"{models.SMALL}/pause", adapter=str(place)), method, None)
    fresh = backbone.language_model().state_dict()
    for reader in readers.values():
        assert any(not torch.equal(tensor, fresh[name]) for name, tensor in reader.state_dict().items())


def test_companions_go_on_from_those_beside_the_adapter(start: str, tmp_path: Path) -> None:
    method, lora = Codi(num_latent=2, prj_dim=16), Lora(r=4)
    clips = WorldsSource(difficulties=(1, 1))
    first = train(settings(start, tmp_path / "one", 2), method, clips, accuracy, lora=lora)
    still = settings(start, tmp_path / "two", 1, adapter=str(first), lr=1e-300)  # nothing moves
    second = train(still, method, clips, accuracy, lora=lora)
    one, two = (load_file(best / "companions.safetensors") for best in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    """Larger in the same way, so that all that this model asks for is there; of another width; of another family."""
    adapters.attach(tiny.tiny_llama(layers=4), Lora(r=4)).save_pretrained(
        tmp_path / "deep", save_embedding_layers=False
    )
    with pytest.raises(ConfigError, match="another model's adapter: 14 weights find no place"):
        adapters.attach_saved(tiny.tiny_llama().model, tmp_path / "deep")
    with pytest.raises(ConfigError, match="another model's adapter"):
        adapters.attach_saved(tiny.tiny_gpt2().model, tmp_path / "deep")
    wide = LlamaForCausalLM(LlamaConfig(**tiny.tiny_llama().model.config.to_dict() | {"hidden_size": 32}))
    with pytest.raises(ConfigError, match=r"another model's adapter: .*size mismatch"):
        adapters.attach_saved(wide, tmp_path / "deep")


def test_a_frozen_model_is_neither_trained_nor_saved(start: str, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in load(start, tokens=HEIMA.tokens).model.state_dict().items()}
    states: list[dict[str, Tensor]] = []

    def look(backbone: Backbone, companions: nn.ModuleDict, epoch: int) -> dict[str, float]:
        states.append({name: value.clone() for name, value in backbone.model.state_dict().items()})
        assert not any(p.requires_grad for p in backbone.model.parameters())
        return {"accuracy": 0.5}

    method = Interpreters(tags="tokens")
    best = train(settings(start, tmp_path, 2), method, SOURCE, look)
    assert all(torch.equal(states[-1][name], before[name]) for name in before)
    assert not (best / "model.safetensors").exists()
    assert load_file(checkpoints(tmp_path)[-1] / "model.safetensors") == {}
    made = load(start, tokens=HEIMA.tokens)
    companions = method.companions(made)
    untrained = {name: value.clone() for name, value in companions.state_dict().items()}
    adapters.load_companions(best, companions)
    assert any(not torch.equal(value, untrained[name]) for name, value in companions.state_dict().items())


def test_companions_come_back_with_and_without_adapters(start: str, tmp_path: Path) -> None:
    """What is scored afterwards is what was trained."""
    packed: list[Tensor] = []
    for name, lora in (("whole", None), ("lora", Lora(r=4))):
        method = Interpreters(tags="tokens", interpreted=("CAPTION",))
        kept: list[Tensor] = []

        def look(
            backbone: Backbone, companions: nn.ModuleDict, epoch: int, kept: list[Tensor] = kept
        ) -> dict[str, float]:
            kept.append(logits(replace(backbone, model=companions["CAPTION"])))
            return {"accuracy": 0.5}

        best = train(settings(start, tmp_path / name, 2), method, SOURCE, look, lora=lora)
        assert (best / "CAPTION" / "adapter_model.safetensors").exists() == (lora is not None)
        backbone = load(start, tokens=method.tokens)
        companions = method.companions(backbone)
        adapters.load_companions(best, companions)
        found = logits(replace(backbone, model=companions["CAPTION"]))
        torch.testing.assert_close(found, kept[-1], rtol=1e-4, atol=1e-4)
        packed.append(found)
    assert not torch.allclose(*packed, atol=1e-2)


def test_a_projector_is_trained_whole_beside_an_adapter(start: str, tmp_path: Path) -> None:
    method = Codi(num_latent=2, prj_dim=16)
    best = train(settings(start, tmp_path, 2), method, WorldsSource(difficulties=(1, 1)), accuracy, lora=Lora(r=4))
    assert set(load_file(best / "companions.safetensors")) == {f"{PROJECTOR}.{k}" for k in method.companions(load(start))[PROJECTOR].state_dict()}  # fmt: skip
    assert (best / "adapter_model.safetensors").exists()


def test_the_page_loads_an_adapter(start: str, tmp_path: Path) -> None:
    """With its method and its tokens, from the folder that training left."""
    from engine import worlds

    best = train(
        settings(start, tmp_path / "run", 2, lr=0.05), HEIMA, SOURCE, accuracy, lora=Lora(r=4, train_embeddings=True)
    )
    model = models.load(start, adapter=best, device="cpu")
    assert model.method == HEIMA
    expected = load(start, tokens=HEIMA.tokens)
    adapters.merge(expected.model, best)
    assert torch.equal(logits(model.backbone), logits(expected))
    assert not torch.allclose(logits(model.backbone), logits(load(start, tokens=HEIMA.tokens)), atol=1e-3)
    path = tmp_path / "clip.mp4"
    worlds.write(worlds.make("cups", 1, 0, "fresh"), path, width=168, height=112)
    monkey = replace(model, method=short(HEIMA))
    reply = ask.ask(monkey, read(path, Sampling(pixels=4704)), "Where?", ["left", "right"], pauses=0, write_chain=False)
    assert reply.answer in ("left", "right")
    assert reply.slots == 0


def short(method: Heima) -> Heima:
    """The same, which writes no more than a few tokens: an untrained model never ends."""

    class Short(Heima):
        longest = 8

    return Short(tags=method.tags)


def test_an_adapter_that_is_none_is_refused(start: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no adapter \(adapter_config\.json\)"):
        adapters.merge(load(start).model, tmp_path)
    with pytest.raises(ValueError, match="Can't load"):
        models.load(start, adapter=tmp_path)


def test_every_kind_of_gradient_is_for_the_adapter(start: str) -> None:
    """Nothing flows into what is frozen, and something into every adapter's matrices."""
    from engine.layout import pack
    from engine.methods.method import run

    model = load(start, tokens=HEIMA.tokens)
    adapters.attach(model, Lora(r=4), HEIMA.tokens)
    moved(model.model)
    layouts = [HEIMA.layout(SOURCE(i), np.random.default_rng(i)) for i in range(2)]
    total, _ = HEIMA.loss(run(model, pack(layouts, model.encode, model.pad)))
    total.backward()
    for name, parameter in model.model.named_parameters():
        assert (parameter.grad is not None and float(parameter.grad.norm()) > 0) == ("lora_" in name), name


def test_who_can_hardly_tell_its_tokens_apart_is_told(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    method = Codi(num_latent=1, prj_dim=8)  # its tokens are new to this model
    clips = WorldsSource(difficulties=(1, 1))
    for name, lora in (("not", Lora(r=2)), ("learnt", Lora(r=2, train_embeddings=True))):
        train(settings(start, tmp_path / name, 1), method, clips, accuracy, lora=lora)
        assert ("set lora.train_embeddings to true" in capsys.readouterr().out) == (name == "not")
    assert not adapters.alike(load(start), ["<pause>", "<ANS>"])


def test_an_adapter_does_not_go_on_over_another_model(start: str, tmp_path: Path) -> None:
    """Its checkpoints hold the adapter alone."""
    lora = Lora(r=2)
    train(settings(start, tmp_path / "run", 2), HEIMA, SOURCE, accuracy, lora=lora)
    tiny.tiny_backbone(seed=1, layers=2).save(tmp_path / "other")
    other = settings(str(tmp_path / "other"), tmp_path / "run", 4)
    with pytest.raises(ConfigError, match=f"other weights than {tmp_path / 'other'} hold now"):
        train(other, HEIMA, SOURCE, accuracy, resume=True, lora=lora)
