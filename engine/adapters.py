"""LoRA through peft: which parts get an adapter, how adapters are kept, found again and merged. Knows no method, no loop.

A model with an adapter in it stays the same object, so that backbones need not know. An adapter's folder holds what was
trained alone; it fits the model that it was trained on, with the same tokens added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.backbones.base import Backbone
from engine.backbones.load import around
from engine.config import ConfigError, at_least
from engine.methods.method import COMPANIONS

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"  # what makes a folder an adapter's
WEIGHTS = "adapter_model.safetensors"
PARTS = {"attention": ("attn", "attention"), "mlp": ("mlp",)}  # a part of a layer -> what its modules are called
ALIKE = 0.02  # of their length
MAIN = ""  # the model itself among adapters, which are otherwise named by companion


@dataclass(frozen=True)
class Lora:
    """
    targets: attention, mlp, output (the projection onto the vocabulary), or the ends of modules' names, such as q_proj.
    vision: adapters in the vision encoder too; otherwise it stays as it is.
    train_embeddings: the method's own tokens learn their input embeddings too. Where they are new to the model they are nearly
    one vector, and an adapter can hardly tell them apart without this.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention", "mlp", "output")
    vision: bool = False
    train_embeddings: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "r", "alpha", where="lora.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}: it must be 0 or more, and below 1.")
        if not self.targets:
            raise ConfigError("lora.targets: name at least one.")


def modules(backbone: Backbone, lora: Lora) -> list[str]:
    """The full names of the matrices that get an adapter. Errors: ConfigError for a target that names none."""
    whole = backbone.model if lora.vision else backbone.language_model()
    linear = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    chosen: set[str] = set()
    for target in lora.targets:
        if target == "output":
            found = [name for name in linear if whole.get_submodule(name) is backbone.model.get_output_embeddings()]
        elif target in PARTS:
            found = [name for name in linear if any(part in name for part in PARTS[target])]
        else:
            found = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not found:
            raise ConfigError(f"lora.targets: no matrix of this model is called {target!r}.")
        chosen.update(found)
    return [name for name in linear if name in chosen]


def attach(backbone: Backbone, lora: Lora, tokens: Sequence[str] = ()) -> PeftModel:
    """A new adapter in the model, which is changed in place; all else is frozen. `tokens`: the method's own."""
    from peft import LoraConfig, get_peft_model

    chosen = modules(backbone, lora)
    if backbone.model.get_output_embeddings() in map(backbone.model.get_submodule, chosen):
        untie(backbone.model)
    rows = sorted(backbone.token(token) for token in tokens) if lora.train_embeddings else []
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=chosen, trainable_token_indices=rows or None
    )  # fmt: skip
    return get_peft_model(backbone.model, config)


@torch.no_grad()
def alike(backbone: Backbone, tokens: Sequence[str]) -> bool:
    """Whether some of a method's tokens have nearly one input embedding, as where they were only just added to a model."""
    if len(tokens) < 2:
        return False
    ids = torch.tensor([backbone.token(token) for token in tokens], device=backbone.device)
    rows = backbone.embed_ids(ids).float()
    return bool(torch.pdist(rows).min() < ALIKE * rows.norm(dim=-1).mean())


def attach_saved(model: Any, folder: str | Path, trainable: bool = True) -> PeftModel:
    """The adapter of a folder or Hub id in the model, which is changed in place. Errors: ConfigError where there is none,
    for a pickled one, and for another model's: one that lacks weights, or has some that find no place.
    """
    from huggingface_hub import snapshot_download
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    if not Path(folder).is_dir() and not str(folder).startswith((".", "/", "~")):
        folder = snapshot_download(Path(folder).as_posix(), allow_patterns=[CONFIG, WEIGHTS])
    try:
        targets = PeftConfig.from_pretrained(str(folder)).target_modules
    except ValueError:
        raise ConfigError(f"{folder} holds no adapter ({CONFIG}).") from None
    if not (Path(folder) / WEIGHTS).is_file():
        raise ConfigError(f"{folder} holds no {WEIGHTS}; weights in other forms, such as pickles, aren't read.")
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if any(f".{head}".endswith(f".{target}") for target in targets):
        untie(model)
    try:
        # Read on the CPU, from where each weight goes to its place.
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, torch_device="cpu")
    except (RuntimeError, ValueError) as error:  # of another size; or it adapts parts that this model hasn't got
        raise ConfigError(f"{folder} holds another model's adapter: {' '.join(str(error).split())[:200]}") from None
    with safe_open(Path(folder) / WEIGHTS, "pt") as held:
        stored, wanted = set(held.keys()), get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if missing := wanted - stored:
        raise ConfigError(
            f"{folder} holds another model's adapter: it lacks {len(missing)} weights, such as {min(missing)}."
        )
    if strange := {name for name in stored - wanted if ".lora_" in name}:
        raise ConfigError(
            f"{folder} holds another model's adapter: {len(strange)} weights find no place, such as {min(strange)}."
        )
    return adapted


def merge(model: Any, folder: str | Path) -> None:
    """The adapter of a folder becomes part of the model's own weights, which can be trained as before."""
    attach_saved(model, folder, trainable=False).merge_and_unload()
    model.requires_grad_(True)


def untie(model: Any) -> None:
    """The output projection gets its own copy of the embeddings where they are shared: its adapter isn't theirs."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def for_training(
    backbone: Backbone, companions: nn.ModuleDict, lora: Lora | None, frozen: bool, folder: str, tokens: Sequence[str]
) -> dict[str, PeftModel]:
    """Adapters in what is trained: the model (going on with the adapter in `folder`, if one is named), or, where that is
    frozen, its companions that are language models. -> by companion; the model's own under MAIN.
    Errors: ConfigError for an adapter to go on with that was made with other settings than `lora`.
    """
    if frozen:
        backbone.model.requires_grad_(False)
    if lora is None:
        return {}
    if frozen:
        readers = {name: around(companion, backbone.tokenizer) for name, companion in companions.items()}
        return {name: attach(reader, lora) for name, reader in readers.items()}
    if not folder:
        return {MAIN: attach(backbone, lora, tokens)}
    chosen = modules(backbone, lora)
    return {MAIN: _as_asked(attach_saved(backbone.model, folder), lora, chosen, folder)}


def _as_asked(adapter: PeftModel, lora: Lora, chosen: Sequence[str], folder: str) -> PeftModel:
    """A saved adapter. chosen: the matrices that `lora` means. Errors: ConfigError for one that was made with other settings."""
    from peft.tuners.lora import LoraLayer

    made: Any = adapter.peft_config["default"]
    placed = [name for name, module in adapter.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    held = {
        "r": made.r, "alpha": made.lora_alpha, "dropout": made.lora_dropout,
        "train_embeddings": bool(made.trainable_token_indices),
        "targets": lora.targets if set(placed) == set(chosen) else sorted({name.rpartition(".")[2] for name in placed}),
    }  # fmt: skip
    for name, value in held.items():
        if value != getattr(lora, name):
            raise ConfigError(
                f"lora.{name} is {getattr(lora, name)}, and the adapter in {folder} was trained with {value}: use that value."
            )
    return adapter


def only_trained(models: Sequence[nn.Module], states: Sequence[dict[str, Any]], _: str) -> None:
    """accelerate's hook before a checkpoint is written: leaves the weights that are trained."""
    for model, state in zip(models, states, strict=True):
        frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        for name in frozen & state.keys():
            del state[name]


def save(
    folder: Path, backbone: Backbone, companions: nn.ModuleDict, adapters: Mapping[str, PeftModel], frozen: bool,
    weights: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """What was trained, and the tokenizer: the model or its adapter, companions or theirs.

    weights: where the modules hold a share of theirs alone, all of them, by name: model.*, companions.*.
    """

    def under(prefix: str, new: str = "") -> dict[str, Tensor] | None:
        if weights is None:
            return None
        return {new + name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}

    folder.mkdir(parents=True)
    if not frozen and MAIN not in adapters:
        own = under("model.")
        if own is not None:  # of weights that are shared, as of embedding and head, the first alone
            names = {name for name, _ in backbone.model.named_parameters(remove_duplicate=False)}
            twice = names - {name for name, _ in backbone.model.named_parameters()}
            own = {name: tensor for name, tensor in own.items() if name not in twice}
        backbone.model.save_pretrained(folder, state_dict=own)
    backbone.tokenizer.save_pretrained(folder)
    for name, adapter in adapters.items():
        own = under(f"companions.{name}." if name else "model.", "base_model.model.")
        adapter.save_pretrained(str(folder / name), save_embedding_layers=False, state_dict=own)
        (folder / name / "README.md").unlink()  # peft's empty form
    if whole := nn.ModuleDict({name: module for name, module in companions.items() if name not in adapters}):
        if weights is None:
            save_model(whole, str(folder / COMPANIONS))
        else:
            own = {
                f"{name}.{key}": tensor
                for name in whole
                for key, tensor in (under(f"companions.{name}.") or {}).items()
            }
            save_file(own, folder / COMPANIONS)


def hold_companions(folder: Path, companions: nn.ModuleDict) -> bool:
    """Whether `save` has left companions in a folder, whole or as adapters."""
    return (folder / COMPANIONS).is_file() or any((folder / name / CONFIG).is_file() for name in companions)


def load_companions(folder: Path, companions: nn.ModuleDict) -> None:
    """Fills companions with what `save` has left. Errors: ConfigError where it left none, or those of other settings."""
    adapted = {name for name in companions if (folder / name / CONFIG).is_file()}
    for name in adapted:
        merge(companions[name], folder / name)
    if whole := nn.ModuleDict({name: module for name, module in companions.items() if name not in adapted}):
        if not (folder / COMPANIONS).is_file():
            raise ConfigError(
                f"{folder} holds no {COMPANIONS} with the method's {', '.join(whole)}: name a folder that its training left."
            )
        try:
            load_model(whole, str(folder / COMPANIONS))
        except (RuntimeError, SafetensorError):
            raise ConfigError(f"{folder / COMPANIONS} was made with other settings of the method.") from None
    companions.eval()
