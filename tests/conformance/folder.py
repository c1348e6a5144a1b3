"""What the checks share: a folder's models and text, and parts of an answer compared. Knows no method."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    InternVLForConditionalGeneration,
    LlamaForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
)

from engine.backbones.base import States
from engine.backbones.text import TextLM
from tests.conformance.quantities import Quantity, array, gradient, unchecked, ungiven

CLASSES = GPT2LMHeadModel, InternVLForConditionalGeneration, LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration
KINDS = {kind.__name__: kind for kind in CLASSES}
IGNORED = -100
ABOUT = "source", "peer_run_under"  # of a file of numbers: where they are from


@dataclass(frozen=True)
class Numerals:
    """A tokenizer whose text is written in ids ("57 10 14"), since the folders give ids and no words.

    `phrases`: what the engine writes between them (a line break, "###") -> the ids that stand there in the folder.
    """

    ids: Mapping[str, int]  # of special tokens
    phrases: Mapping[str, Sequence[int]]
    pad_token_id: int
    eos_token_id: int
    unk_token_id: int | None = None
    chat_template: str | None = None
    bos_token: str | None = None

    def get_added_vocab(self) -> Mapping[str, int]:
        return self.ids

    def convert_tokens_to_ids(self, name: str) -> int:
        return self.ids[name]

    def encode(self, text: str, **_: bool) -> list[int]:
        for phrase, ids in self.phrases.items():
            text = text.replace(phrase, f" {numerals(ids)} ")
        return [int(word) for word in text.split()]


def numerals(ids: Iterable[int]) -> str:
    """ids -> text."""
    return " ".join(map(str, ids))


@dataclass(frozen=True)
class Watched(TextLM):
    """A language model that notes what it is fed and what comes out, call by call."""

    calls: list[tuple[Tensor, Tensor]]  # embeddings, last states: [batch, columns, dim]

    def forward(self, embeds: Tensor, *args: Any, **kwargs: Any) -> States:
        states = super().forward(embeds, *args, **kwargs)
        self.calls.append((embeds.detach(), states.last.detach()))
        return states


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def told(
    folder: Path, *parts: str, optional: str = "", stem: str = "expected"
) -> tuple[dict[str, Any], dict[str, Tensor], list[Quantity]]:
    """A folder's numbers: -> those of the JSON file, the arrays, and a miss for a part of the file that isn't known, for one of
    `parts` that is empty, and for no arrays."""
    numbers, arrays = read_json(folder / f"{stem}.json"), load_file(folder / f"{stem}.safetensors")
    missed = [unchecked(key) for key in numbers if key not in (*parts, optional, *ABOUT)]
    missed += [ungiven(f"{stem}.json {part}") for part in parts if not numbers.get(part)]
    return numbers, arrays, missed + ([] if arrays else [ungiven(f"{stem}.safetensors")])


def needed(name: str, given: Collection[str], *keys: str) -> list[Quantity]:
    """A miss for every number that a case must have and hasn't."""
    return [ungiven(f"{name}.{key}") for key in keys if key not in given]


def model(folder: Path, tag: str) -> Any:
    """One of the models that config.json names, with its weights. Errors: ValueError for a class that isn't known."""
    given = read_json(folder / "config.json")["models"][tag]
    if given["class"] not in KINDS:
        raise ValueError(f"{folder} needs the class {given['class']}; known: {', '.join(KINDS)}.")
    kind: Any = KINDS[given["class"]]
    made = kind(kind.config_class.from_dict(given["config"]))
    made.load_state_dict(load_file(folder / given["weights"]), strict=True)
    return made.eval()


def whose(row: Sequence[int], ends: Sequence[tuple[Sequence[int], Sequence[int]]], place: int) -> int:
    """Which sample a batch's row is: one whose first of two `ends` it begins with, and if possible ends with the other; of
    several, the one at the row's own place in the batch, else the first. Errors: ValueError for a row that is no sample's."""
    begun = [i for i, (first, _) in enumerate(ends) if row[: len(first)] == [*first]]
    found = [i for i in begun if row[len(row) - len(ends[i][1]) :] == [*ends[i][1]]] or begun
    if not found:
        raise ValueError(f"the row {place} of a batch belongs to no sample.")
    return place if place in found else found[0]


def below(arrays: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The arrays of one case, by what follows its name."""
    return {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}


def parameters(**modules: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by "module.name"; a tied one by each of its names."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def gradients(name: str, expected: Mapping[str, float], known: Mapping[str, nn.Parameter]) -> list[Quantity]:
    """Norms of the gradients that a backward pass has left."""
    found = []
    for key, norm in expected.items():
        grad = known[key].grad if key in known else None
        found.append(gradient(f"{name}.grad_norms.{key}", norm, 0.0 if grad is None else float(grad.norm())))
    return found


def where(name: str, mask: Tensor, expected: Tensor, got: Tensor) -> Quantity:
    """Arrays of the same shape, compared where `mask` (over their first axes) is set; elsewhere nothing is defined."""
    same_shape = expected.shape == got.shape and mask.shape == got.shape[: mask.dim()]
    return array(name, expected[mask], got[mask]) if same_shape else array(name, expected, got)
