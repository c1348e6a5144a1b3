"""Published checkpoints of CODI, SIM-CoT and Heima as folders that this project reads: weights are renamed, adapters merged.

Their tokens stand in rows behind (or among) the base model's; here they are found by name, so rows are moved. Only tensors
are read: pickles with weights_only, which refuses anything else. Layouts, after their released code:

codi     codi.base_model.model.<model> with .base_layer and .lora_A.default / .lora_B.default, or codi.<model> without LoRA;
         prj.1, prj.3, prj.ln; SIM-CoT adds decoder.<model>. Three new rows: padding, begin and end of the thoughts.
coconut  base_causallm.<model>; SIM-CoT adds expainable_llm.<model> (its spelling). Three new rows: start, end, latent.
heima    <model>, or an adapter of it, by transformers' names or torchtune's. Its thinking tokens may have any id.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import adapters
from engine.backbones.base import Backbone, add_tokens
from engine.backbones.load import load
from engine.config import ConfigError
from engine.folders import as_a_whole
from engine.methods import described
from engine.methods.coconut import LATENT, START, STOP, Coconut
from engine.methods.codi import PROJECTOR, Codi, projector
from engine.methods.heima import Heima
from engine.methods.method import META, Method
from engine.methods.steps import DECODER, StepSupervision

Kind = Literal["codi", "coconut", "heima"]
Weights = dict[str, Tensor]

CHANGE = ".change"  # what an adapter adds to a matrix that isn't in the checkpoint
CONV = ("c_attn", "c_proj", "c_fc")  # GPT-2's
PROJECTION = {"prj.1.": "up.", "prj.3.": "down.", "prj.ln.": "norm."}
KINDS = (".safetensors", ".bin", ".pt", ".pth")
NAMED = ("model", "pytorch_model", "adapter_model")  # what files of weights are called
KEPT_BESIDE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # what a Trainer leaves beside them
OLDER = {  # names before transformers 5, of models with eyes
    "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
    "vision_model.": "model.vision_model.", "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.": "model.vision_tower.", "image_newline": "model.image_newline",
}  # fmt: skip
TORCHTUNE = (
    (r"^tok_embeddings\.", "model.embed_tokens."), (r"^norm\.scale", "model.norm.weight"), (r"^output\.", "lm_head."),
    (r"^layers\.(\d+)\.attn\.output_proj\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^layers\.(\d+)\.attn\.", r"model.layers.\1.self_attn."),
    (r"^layers\.(\d+)\.sa_norm\.scale", r"model.layers.\1.input_layernorm.weight"),
    (r"^layers\.(\d+)\.mlp_norm\.scale", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"^layers\.(\d+)\.mlp\.w1\.", r"model.layers.\1.mlp.gate_proj."),
    (r"^layers\.(\d+)\.mlp\.w2\.", r"model.layers.\1.mlp.down_proj."),
    (r"^layers\.(\d+)\.mlp\.w3\.", r"model.layers.\1.mlp.up_proj."),
)  # fmt: skip


def stored(source: Path) -> Weights:
    """Every tensor of a file, or of a folder's files. Errors: ConfigError for what holds none, or more than tensors."""
    found: Weights = {}
    for path in weight_files(source) if source.is_dir() else [source]:
        safe = path.suffix == ".safetensors"
        try:
            whole: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"{path} can't be read as weights alone, and nothing else is read: {reason}") from None
        if not isinstance(whole, Mapping):
            raise ConfigError(f"{path} holds a {type(whole).__name__}, where weights stand under their names.")
        for name in ("state_dict", "model", "model_state_dict"):
            whole = whole[name] if isinstance(whole.get(name), Mapping) else whole
        found |= {name: tensor for name, tensor in whole.items() if isinstance(tensor, Tensor)}
    if not found:
        raise ConfigError(f"{source} holds no weights (.safetensors, .bin, .pt).")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that its weights are in: those that its index names, or whose names say weights, or all of their
    kind but what a trainer keeps beside them. Safetensors where the same weights lie there in both forms.

    Errors: ConfigError for an index that can't be read.
    """
    for index in sorted(folder.glob("*.index.json"), key=lambda path: "safetensors" not in path.name):
        try:
            return [
                folder / name
                for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{index} doesn't say which files hold the weights: name one of those files instead."
            ) from None
    files = sorted(path for path in folder.iterdir() if path.suffix in KINDS and not path.stem.startswith(KEPT_BESIDE))
    safe = [path for path in files if path.suffix == KINDS[0]] or files
    return [path for path in safe if path.stem.startswith(NAMED)] or safe


def under(weights: Weights, *prefixes: str) -> Weights:
    """The weights whose names begin so, without it; of several prefixes those that stand behind each other."""
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        weights = inside or weights
    return weights


def merged(weights: Weights, alpha: float) -> Weights:
    """LoRA's pairs added to their matrices: W + alpha / r x B A. Those whose matrix isn't there stay, under its name.

    Conv1D's matrices (GPT-2's) are stored transposed. Errors: ConfigError for half a pair.
    """
    pair = re.compile(r"^(.*)\.lora_([AaBb])(?:\.default)?\.weight$")
    found = {name.replace(".base_layer.", "."): t for name, t in weights.items() if not pair.match(name)}
    found = {
        name.replace(".modules_to_save.default.", "."): t for name, t in found.items() if "original_module" not in name
    }
    parts = {(m[1], m[2].upper()): t.float() for name, t in weights.items() if (m := pair.match(name))}
    for module in dict.fromkeys(module for module, _ in parts):
        if lacking := [which for which in "AB" if (module, which) not in parts]:
            raise ConfigError(f"The checkpoint's adapter isn't whole: {module} lacks its lora_{lacking[0]}.")
        down, up = parts[module, "A"], parts[module, "B"]
        change = (alpha / len(down)) * (up @ down)
        change = change.T if module.rpartition(".")[2] in CONV else change
        name = f"{module}.weight"
        if name in found:
            found[name] = found[name].float() + change
        else:
            found[f"{module}{CHANGE}"] = change
    return found


def renamed(weights: Weights, backbone: Backbone) -> Weights:
    """By transformers 5's names. torchtune's queries and keys are ordered in pairs, transformers' in halves."""
    tuned = any(name.startswith(("layers.", "tok_embeddings.")) for name in weights)
    config, found = backbone.text_config, {}
    known = backbone.model.state_dict().keys()
    for given, tensor in weights.items():
        name, value = given, tensor
        if tuned:
            for pattern, new in TORCHTUNE:
                name = re.sub(pattern, new, name)
            if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.change", "k_proj.change")):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                value = in_halves(tensor, heads)
        else:
            for old, new in OLDER.items():
                if name.startswith(old) and name.replace(CHANGE, ".weight") not in known:
                    name = new + name.removeprefix(old)
        found[name] = value
    return found


def in_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of [heads x (pairs x 2), dim] -> [heads x (2 x pairs), dim]."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class Based:
    """The base model with the method's tokens. tokens: its own, which are the first rows of the embedding and of the head
    (Mllama's predicts one less); rows: of its embedding, those that no token uses included."""

    backbone: Backbone
    tokens: tuple[int, int]
    rows: int


def based(base: str, tokens: Iterable[str]) -> Based:
    backbone = load(base, tokens=())
    rows = backbone.model.get_input_embeddings().num_embeddings
    predicted, known = backbone.model.get_output_embeddings().weight.shape[0], len(backbone.tokenizer)
    add_tokens(backbone.model, backbone.tokenizer, tuple(tokens))
    return Based(backbone, (min(known, rows), min(known, predicted)), rows)


def filled(model: nn.Module, weights: Weights, tokens: tuple[int, int], places: Mapping[int, int]) -> None:
    """Puts a checkpoint's weights into a model. The first `tokens` rows of embedding and head are the checkpoint's first;
    places: this model's row -> the checkpoint's.

    Errors: ConfigError for weights that are missing, left over, or of another shape.
    """
    own: Any = model
    tables = {id(own.get_output_embeddings().weight): tokens[1], id(own.get_input_embeddings().weight): tokens[0]}
    parameters = list(model.named_parameters(remove_duplicate=False))  # a shared one under each of its names
    left = {
        name: t for name, t in weights.items() if not name.endswith(("inv_freq", ".attn.bias", ".attn.masked_bias"))
    }
    is_adapter = any(name.endswith(CHANGE) for name in weights)
    there = {id(weight) for name, weight in parameters if name in weights}
    if lacking := [name for name, weight in parameters if id(weight) not in there and not is_adapter]:
        raise ConfigError(f"The checkpoint isn't one of this base model's: it lacks {lacking[0]}.")
    with torch.no_grad():
        for name, weight in parameters:
            given, change = left.pop(name, None), left.pop(name.removesuffix(".weight") + CHANGE, None)
            if given is not None and id(weight) in tables:
                first = tables[id(weight)]
                if len(given) < first or given.shape[1:] != weight.shape[1:]:
                    wanted = (first, *weight.shape[1:])
                    raise ConfigError(f"{name} has the shape {tuple(given.shape)}, the base model {wanted} without its spare rows.")  # fmt: skip
                if (last := max(places.values(), default=-1)) >= len(given):
                    raise ConfigError(f"{name} has {len(given)} rows, too few for the method's tokens (up to row {last}): it is of another kind, or another base model's.")  # fmt: skip
                weight[:first] = given[:first].to(weight)
                for here, row in places.items():
                    weight[here] = given[row].to(weight)
            elif given is not None:
                if given.shape != weight.shape:
                    raise ConfigError(f"{name} has the shape {tuple(given.shape)}, the base model's {tuple(weight.shape)}.")  # fmt: skip
                weight.copy_(given)
            if change is not None:
                if change.shape[1:] != weight.shape[1:] or len(change) > len(weight):
                    raise ConfigError(f"The adapter of {name} has the shape {tuple(change.shape)}, the base model's {tuple(weight.shape)}.")  # fmt: skip
                weight[: len(change)] += change.to(weight)
    if left:
        raise ConfigError(f"The checkpoint isn't one of this base model's: it has an extra weight, {min(left)}.")


def codi(weights: Weights, base: str, alpha: float, latents: int) -> tuple[Backbone, nn.ModuleDict, Method]:
    """CODI, and SIM-CoT on it."""
    parts = {
        new + name.removeprefix(old): t
        for name, t in weights.items()
        for old, new in PROJECTION.items()
        if name.startswith(old)
    }
    if "up.weight" not in parts:
        raise ConfigError("The checkpoint has no projector (prj.1, prj.3, prj.ln): it isn't CODI's.")
    start = based(base, Codi.tokens)
    backbone, rows = start.backbone, start.rows
    language = merged(under(weights, "codi.", "base_model.model."), alpha)
    language = {name: tensor for name, tensor in language.items() if not name.startswith(("prj.", "decoder."))}
    filled(backbone.model, language, start.tokens, {backbone.token(START): rows + 1, backbone.token(STOP): rows + 2})
    inner, dim = parts["up.weight"].shape
    companions = nn.ModuleDict({PROJECTOR: projector(dim, inner, 0.0)})
    if lacking := sorted(companions[PROJECTOR].state_dict().keys() ^ parts.keys()):
        raise ConfigError(f"The checkpoint's projector isn't CODI's: {lacking[0]} has no counterpart.")
    companions[PROJECTOR].load_state_dict(parts)
    steps = None
    if explained := under_only(weights, "decoder."):
        steps = StepSupervision(mean="tokens", missing="ignore", first_position=0)
        companions[DECODER] = steps.decoder(backbone)
        filled(companions[DECODER], merged(under(explained, "base_model.model."), alpha), start.tokens, {})
    method = Codi(num_latent=latents, prj_dim=inner, last_step=False, steps=steps, text="icot")
    return backbone, companions, method


def coconut(weights: Weights, base: str, alpha: float, latents: int) -> tuple[Backbone, nn.ModuleDict, Method]:
    """Coconut, and SIM-CoT on it. latents: of its last stage, two a step."""
    start = based(base, Coconut.tokens)
    backbone, rows = start.backbone, start.rows
    language = under_only(weights, "base_causallm.")
    if not language:
        raise ConfigError("The checkpoint has no base_causallm: it isn't Coconut's.")
    places = {backbone.token(token): rows + place for place, token in enumerate((START, STOP, LATENT))}
    filled(backbone.model, merged(under(language, "base_model.model."), alpha), start.tokens, places)
    companions, steps = nn.ModuleDict(), None
    if explained := under_only(weights, "expainable_llm."):
        steps = StepSupervision()
        companions[DECODER] = steps.decoder(backbone)
        filled(companions[DECODER], merged(under(explained, "base_model.model."), alpha), start.tokens, {})
    return backbone, companions, Coconut(c_thought=2, max_latent_stage=max(1, latents // 2), steps=steps)


def heima(
    weights: Weights, base: str, alpha: float, places: Mapping[str, int]
) -> tuple[Backbone, nn.ModuleDict, Method]:
    """Heima, or one of its interpreters. places: where the checkpoint has each thinking token."""
    method = Heima()
    start = based(base, method.tokens)
    backbone = start.backbone
    if strange := sorted(set(places) - set(method.tokens)):
        raise ConfigError(f"{strange[0]} is no token of Heima's: {', '.join(method.thinking_tokens)}.")
    language = renamed(merged(under(weights, "base_model.model."), alpha), backbone)
    filled(backbone.model, language, start.tokens, {backbone.token(token): place for token, place in places.items()})
    return backbone, nn.ModuleDict(), method


def under_only(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def imported(
    kind: Kind, source: Path, out: Path, base: str, alpha: float = 32.0, latents: int = 6,
    places: Mapping[str, int] | None = None,
) -> Path:  # fmt: skip
    """Writes the folder of a published checkpoint: a model, its companions, its method.

    base: the model that it was trained from, a folder or Hub id. alpha: LoRA's, which their files don't say. Errors:
    ConfigError for a folder that is there, and for weights that aren't this kind's or this base's.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: choose another folder.")
    if not source.exists():
        raise ConfigError(f"{source} isn't there.")
    weights = stored(source)
    if kind == "heima":
        backbone, companions, method = heima(weights, base, alpha, places or {})
    else:
        backbone, companions, method = (codi if kind == "codi" else coconut)(weights, base, alpha, latents)
    pauses = list(method.slot_range)
    dialect = "chat" if kind == "heima" else "plain"
    with as_a_whole(out) as made:
        adapters.save(made, backbone, companions, {}, frozen=False)
        (made / META).write_text(json.dumps({"method": described(method), "pauses": pauses, "dialect": dialect}))
    return out
