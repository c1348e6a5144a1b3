"""What a training run costs, before it is begun: parameters, tokens, memory and time a step, from a model's shape alone.

The model is built without weights (torch's meta device), so that parameters are counted, not estimated; tokens are counted
on packed samples. FLOPs follow from both: two a weight and token in a matrix product, four a pair of tokens and dimension
in attention, which is computed for every pair. Memory of activations is estimated from what autograd keeps of a layer.
Communication between GPUs, waiting for data and fragmented memory are left out. Knows no method and no data format.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from engine import adapters, objectives
from engine.adapters import Lora
from engine.backbones import text
from engine.backbones.base import Backbone
from engine.backbones.load import around, family
from engine.config import ConfigError
from engine.latents import segments_of
from engine.layout import Packed
from engine.loop import looped
from engine.methods.method import Method
from engine.muon import Muon
from engine.recipe import Training, companions_alone, freeze_vision, optimizers

SHAPES = Path(__file__).with_name("shapes.json")  # published models' configurations, as far as they decide their size
GPUS = (1, 4, 8)  # that a plan is made for
CHARACTERS = 4  # a token of English, where there is no tokenizer


@dataclass(frozen=True)
class Card:
    """Dense matrix products and memory, as the maker states them."""

    memory: float  # bytes
    half: float  # FLOP/s in bfloat16
    single: float  # FLOP/s in float32
    bandwidth: float  # bytes a second


CARDS = {
    "H100": Card(80e9, 989e12, 67e12, 3.35e12),
    "H200": Card(141e9, 989e12, 67e12, 4.8e12),
    "A100": Card(80e9, 312e12, 19.5e12, 2.0e12),
    "4090": Card(24e9, 165e12, 82.6e12, 1.0e12),
    "CPU": Card(64e9, 1e12, 0.5e12, 50e9),  # a guess: CPUs differ more than cards
}


class Pretended:
    """A tokenizer's place where there is none: as many tokens as English would have, all the same."""

    pad_token_id = eos_token_id = 0
    unk_token_id = chat_template = None
    bos_token = eos_token = ""
    specials = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<img>", "</img>")

    def encode(self, written: str, **_: Any) -> list[int]:
        return [0] * math.ceil(len(written) / CHARACTERS)

    def convert_tokens_to_ids(self, _: str) -> int:
        return 0

    def get_added_vocab(self) -> dict[str, int]:
        return dict.fromkeys(self.specials, 0)


def shape(name: str) -> Any:
    """The configuration in a folder or a JSON file, or of a published model that this project knows the shape of.

    Errors: ConfigError for anything else; nothing is downloaded.
    """
    place = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if place.is_file():
        told = written_shape(place)
    else:
        known = json.loads(SHAPES.read_text(encoding="utf-8"))
        if name not in known:
            raise ConfigError(
                f"{name} is no folder with a config.json, and no shape that is known ({', '.join(known)}): name one that is "
                "there, or name a model whose shape it has with --shape."
            )
        told = known[name]
    kind = family(name, told["model_type"]).kind
    own = issubclass(kind, PreTrainedModel)  # else an Auto class
    try:
        return (kind.config_class if own else CONFIG_MAPPING[told["model_type"]]).from_dict(told)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name} doesn't describe a {told['model_type']} model: {reason}") from None


def written_shape(file: Path) -> dict[str, Any]:
    """Errors: ConfigError for a file that isn't a model's configuration."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read as JSON: {error}.") from None
    if not isinstance(told, dict) or not isinstance(told.get("model_type"), str):
        raise ConfigError(f"{file} names no model_type: give a model's configuration, as its config.json has it.")
    return told


def outline(name: str, method: Method) -> Backbone:
    """The model of that shape, without weights, with the method's tokens. Errors: ConfigError for a family that isn't supported."""
    config = shape(name)
    kind = family(name, config.model_type)
    inner = config.get_text_config()
    tokenizer: Any = Pretended()
    if (Path(name) / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.add_tokens(list(method.tokens), special_tokens=True)
        inner.vocab_size = max(inner.vocab_size, len(tokenizer))
    elif config.model_type in text.FAMILIES[:2]:  # no rows to spare
        inner.vocab_size += len(method.tokens)
    with torch.device("meta"):
        model = kind.kind(config) if issubclass(kind.kind, PreTrainedModel) else kind.kind.from_config(config)
    return around(model, tokenizer)


@dataclass(frozen=True)
class Part:
    """Layers of one kind with what belongs to them: a language model, or a vision encoder."""

    weights: float  # of all matrix products in the layers
    layers: int
    dim: int  # of what goes between layers
    attention: int  # of all heads together
    keys: int  # of all key heads together
    inner: int  # of the feed-forward part
    largest: float  # weights of one layer

    def flops(self, tokens: float, pairs: float, backward: int, again: bool) -> float:
        """For so many tokens, and pairs of tokens that may see each other. backward: 2 where the weights learn, 1 where what
        stands before them does, 0 for a forward alone. again: it is computed again in the backward pass."""
        product, attention = 2 * self.weights * tokens, 4 * self.layers * self.attention * pairs
        repeated = again and backward > 0
        return product * (1 + backward + repeated) + attention * (1 + 2 * (backward > 0) + repeated)

    def kept(self, tokens: float, size: int, again: bool) -> float:
        """Bytes that a forward keeps for the backward pass. size: bytes a number; what goes between layers has 4.

        Of a layer: the input of both norms, and what they make of it; queries, keys and values (as wide as the queries, where
        heads share them), what attention makes of them; and of the feed-forward part four times its inner width.
        """
        one = tokens * (16 * self.dim + size * (3 * self.dim + 4 * self.attention + 4 * self.inner))
        return self.layers * tokens * 4 * self.dim + one if again else self.layers * one


def matrices(modules: Iterable[nn.Module]) -> float:
    return sum(math.prod(m.weight.shape) for m in modules if isinstance(m, nn.Linear | Conv1D | nn.Conv2d | nn.Conv3d))


def language_part(backbone: Backbone) -> Part:
    config = backbone.text_config
    blocks = backbone.blocks(backbone.model)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = max(max(m.weight.shape) for m in blocks[0].mlp.modules() if isinstance(m, nn.Linear | Conv1D))
    keys = getattr(config, "num_key_value_heads", heads) * width
    each = [matrices(block.modules()) for block in blocks]
    return Part(sum(each), len(each), config.hidden_size, heads * width, keys, inner, max(each))


def vision_parts(backbone: Backbone) -> tuple[Part, float] | None:
    """The layers of the vision encoder, and the weights of all that follows them, where visual tokens are made of patches."""
    language = {id(module) for module in backbone.language_model().modules()}
    others = [m for m in backbone.model.modules() if id(m) not in language]
    blocks: list[nn.Module] = [m for m in others if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:  # Mllama's aren't of that class
        blocks = [
            layer for m in others if isinstance(m, nn.ModuleList) for layer in m if not isinstance(layer, nn.ModuleList)
        ]
    if not blocks:
        return None
    inside = {id(module) for block in blocks for module in block.modules()}
    first = [m for m in others if isinstance(m, nn.Conv2d | nn.Conv3d)]
    rest = [m for m in others if id(m) not in inside and isinstance(m, nn.Linear)]
    products = [m for m in blocks[0].modules() if isinstance(m, nn.Linear)]
    width, inner = products[0].in_features, max(m.in_features for m in products)
    each = [matrices(block.modules()) for block in blocks]
    part = Part(sum(each) + matrices(first), len(each), width, width, width, inner, max(each))
    return part, matrices(rest)


@dataclass(frozen=True)
class Plan:
    """A run's cost. Bytes and FLOPs are those of one GPU."""

    config: Training
    backbone: Backbone
    companions: nn.ModuleDict
    passed: Packed  # one pass
    frozen: bool  # the model isn't trained, only its companions

    @cached_property
    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.backbone.model, self.companions])

    @cached_property
    def total(self) -> int:
        return sum(parameter.numel() for parameter in self.modules.parameters())

    @cached_property
    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.modules.parameters() if parameter.requires_grad)

    @cached_property
    def tokens(self) -> dict[str, float]:
        """Of an average sample: all, from pictures, slots, and those that each branch and reading must predict."""
        packed, batch = self.passed, len(self.passed.ids)
        found = {
            "all": int((packed.node >= 0).sum()), "seen": len(packed.visual_row), "slots": len(packed.slot_row),
            **{f"learnt in {name}": len(rows.target) for name, rows in packed.branches.items()},
        }  # fmt: skip
        for kind, readings in packed.readings.items():
            found[f"read by {kind}"] = int((readings.packed.node >= 0).sum())
        return {name: count / batch for name, count in found.items()}

    @property
    def computed(self) -> int:
        """Tokens a step and process, padding included."""
        return self.passed.ids.numel() * self.config.accumulate

    @cached_property
    def language(self) -> Part:
        return language_part(self.backbone)

    @cached_property
    def vision(self) -> tuple[Part, float] | None:
        return vision_parts(self.backbone) if self.passed.grids else None

    def _backward(self, part: nn.Module) -> int:
        """How many forwards' FLOPs a part's backward pass takes: gradients of its input, and of its weights if they are trained."""
        if self.frozen and part is self.backbone.model:
            return 0
        whole = sum(p.numel() for p in part.parameters() if p.requires_grad) > 0.5 * sum(
            p.numel() for p in part.parameters()
        )
        return 2 if whole else 1

    @cached_property
    def flops(self) -> float:
        """Of a step, in one process."""
        packed, again = self.passed, self.config.gradient_checkpointing
        batch, length = packed.ids.shape
        backward = self._backward(self.backbone.model)
        found = self.language.flops(batch * length, batch * length**2, backward, again)
        head = 2.0 * self.backbone.text_config.vocab_size * self.language.dim
        rows = sum(len(rows.target) for rows in packed.branches.values())
        found += head * rows * (0 if self.frozen else 1 + backward + self._chunks(rows))
        if self.vision:
            part, rest = self.vision
            patches, pairs = (sum(count * each**power for count, each in self.looks) for power in (1, 2))
            learns = 2 * self._vision_learns
            found += part.flops(patches, pairs, learns, again) + 2 * rest * len(packed.visual_row) * (1 + learns)
        for kind, readings in packed.readings.items():
            inner, wide = readings.packed.ids.shape
            learns = self._backward(self.companions[kind])
            rows = len(readings.packed.branches["read"].target)
            found += self._reader(kind).flops(inner * wide, inner * wide**2, learns, again)
            found += head * rows * (1 + learns + self._chunks(rows))
        return found * self.config.accumulate

    def _reader(self, kind: str) -> Part:
        return language_part(replace(self.backbone, model=self.companions[kind]))

    def _chunks(self, rows: int) -> int:
        return int(rows * self.backbone.text_config.vocab_size > objectives.CHUNK)

    @property
    def _vision_learns(self) -> bool:
        language = {id(p) for p in self.backbone.language_model().parameters()}
        return any(p.requires_grad and id(p) not in language for p in self.backbone.model.parameters())

    @cached_property
    def looks(self) -> list[tuple[int, int]]:
        """As the backbone's."""
        return self.backbone.looks(self.passed)

    @cached_property
    def optimizer_bytes(self) -> float:
        """Two numbers a weight for AdamW, one for Muon."""
        return sum(
            4.0 * (1 if isinstance(optimizer, Muon) else 2) * parameter.numel()
            for optimizer in optimizers(self.config, self.modules)
            for group in optimizer.param_groups
            for parameter in group["params"]
        )

    def activations(self, again: bool) -> float:
        """Bytes that one pass keeps. again: with gradient checkpointing."""
        packed, size = self.passed, self._size
        batch, length = packed.ids.shape
        found = 4.0 * batch * length**2  # the mask
        if not self.frozen:
            found += self.language.kept(batch * length, size, again)
            if packed.latents.any():  # keys and values outlive their layers
                found += 2.0 * size * self.language.layers * self.language.keys * batch * length * again
        if self.vision and self._vision_learns:
            found += self.vision[0].kept(sum(count * each for count, each in self.looks), size, again)
        for kind, readings in packed.readings.items():
            inner, wide = readings.packed.ids.shape
            found += self._reader(kind).kept(inner * wide, size, again) + 4.0 * inner * wide**2
        return found

    @property
    def _size(self) -> int:
        return 2 if self.config.precision == "bf16" else 4

    def memory(self, gpus: int, shared: bool) -> dict[str, float]:
        """Bytes a GPU. shared: by FSDP2 or ZeRO-3, rather than whole on each."""
        share = gpus if shared else 1
        rows = max(len(rows.target) for rows in self.passed.branches.values())
        vocabulary = self.backbone.text_config.vocab_size
        whole = self.language.weights + (self.vision[0].weights if self.vision else 0)
        if shared:  # two layers, and what belongs to none
            gathered = self._size * (2 * self.language.largest + self.total - whole)
        else:
            gathered = 2 * whole if self.config.precision == "bf16" else 0  # autocast's copies
        return {
            "weights": 4 * self.total / share,
            "gathered or cast": gathered,
            "gradients": 4 * self.trained / share,
            "optimizer": self.optimizer_bytes / share,
            "activations": self.activations(self.config.gradient_checkpointing),
            "logits": 12.0 * min(rows * vocabulary, max(objectives.CHUNK, vocabulary)),
        }

    def seconds(self, card: Card, share: float) -> float:
        """A step, if matrix products run at this share of the card's peak; each latent reads all weights once a pass."""
        peak = card.half if self.config.precision == "bf16" else card.single
        serial = (segments_of(self.passed) - 1) * self.language.weights * self._size / card.bandwidth
        times = 1 + self._backward(self.backbone.model) + self.config.gradient_checkpointing
        return self.flops / (peak * share) + serial * times * self.config.accumulate


def plan(
    config: Training, method: Method, lora: Lora | None, backbone: Backbone, companions: nn.ModuleDict, passed: Packed
) -> Plan:
    """A run with a model, companions and one pass. The model, which has no weights, is changed as training would."""
    frozen = companions_alone(config, method)
    if config.looped != (0, 0):
        looped(backbone, *config.looped)
    with torch.device("meta"):
        adapters.for_training(backbone, companions, lora, frozen, "", method.tokens)
    freeze_vision(config, backbone)
    return Plan(config, backbone, companions, passed, frozen)


def outlined_companions(backbone: Backbone, method: Method) -> nn.ModuleDict:
    """What is trained beside the model, without weights."""
    with torch.device("meta"):
        return method.companions(replace(backbone, model=copy.copy(backbone.model)))


def table(made: Plan, card: str, share: float, whole: float) -> str:
    """The plan in words. whole: seconds of all the run's steps, of which those of this plan may be a part."""
    config, chosen = made.config, CARDS[card]
    batch = len(made.passed.ids)
    seconds = made.seconds(chosen, share)
    lines = [
        f"model        {config.init}",
        f"parameters   {made.total:,}, of which {made.trained:,} are trained",
        "a sample     " + ", ".join(f"{count:,.0f} {name}" for name, count in made.tokens.items()) + " tokens",
        f"a step       {config.accumulate} passes of {batch} samples a GPU: {made.computed:,} tokens with padding, "
        f"{made.flops / 1e12:,.1f} TFLOP, {segments_of(made.passed)} calls of the language model a pass",
        f"time a step  {seconds:.2f} s on one {card} at {share:.0%} of its peak; the run's {config.steps:,} steps take "
        f"{whole / 3600:,.1f} h (communication and data not counted)",
        f"activations  {gigabytes(made.activations(True))} a pass with gradient checkpointing, "
        f"{gigabytes(made.activations(False))} without; this run is {'with' if config.gradient_checkpointing else 'without'}",
        "",
        f"{'memory a GPU':28}" + "".join(f"{name:>18}" for name in (*made.memory(1, False), "together")),
    ]
    for gpus in GPUS:
        for how in ("ddp", "fsdp2, zero3")[: 1 if gpus == 1 or config.looped != (0, 0) else 2]:
            parts = made.memory(gpus, how != "ddp")
            needed = sum(parts.values())
            told = "fits" if needed < 0.92 * chosen.memory else "too much"
            name = f"{gpus} x {card}" + (f", {how}" if gpus > 1 else "")
            lines.append(
                f"{name:28}" + "".join(f"{gigabytes(value):>18}" for value in (*parts.values(), needed)) + f"  {told}"
                f", {gpus * batch * config.accumulate / seconds:,.1f} samples/s"
            )
    return "\n".join(lines)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
