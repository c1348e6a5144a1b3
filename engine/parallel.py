"""How one training step is spread over processes: replicas (DDP), FSDP2's shards, or DeepSpeed's ZeRO-3. Knows no method.

The engine calls a model's parts (embedding, layers, head), never the model itself. So what is trained stands in one module,
`Together`, whose forward is whatever is computed with its parts; that is what is wrapped or sharded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from engine import adapters
from engine.config import ConfigError

T = TypeVar("T")
How = Literal["auto", "ddp", "fsdp2"]
Learnt = tuple[Tensor, dict[str, Tensor]]  # the loss, and what of it is logged


class Together(nn.Module):
    """The model and its companions as one."""

    def __init__(self, model: nn.Module, companions: nn.ModuleDict) -> None:
        super().__init__()
        self.model, self.companions = model, companions

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def partly(self) -> bool:
        """Whether something in it is frozen; then checkpoints hold the rest alone."""
        return len(self.trained) < len(list(self.parameters()))


class Replicas:
    """One process, or several with all weights each, which average their gradients (DDP)."""

    sharded = False

    def __init__(self, accelerator: Any, together: Together, optimizers: list[torch.optim.Optimizer]) -> None:
        self.accelerator, self.together = accelerator, together
        for module in (together.model, together.companions):
            if len(list(module.parameters())):
                accelerator.prepare_model(module, evaluation_mode=True)
        self.optimizers: list[Any] = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
        if together.partly:
            accelerator.register_save_state_pre_hook(adapters.only_trained)
        self.whole: nn.Module = together
        if accelerator.num_processes > 1:  # a batch without pictures leaves the vision encoder without gradients
            self.whole = DistributedDataParallel(
                together, find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def learn(self, compute: Callable[[], Learnt], share: float, last: bool) -> Learnt:
        """Computes a loss and adds its gradients, times `share`; on the `last` pass of a step all processes' are averaged."""
        waits = isinstance(self.whole, DistributedDataParallel) and not last
        with self.whole.no_sync() if waits else nullcontext():  # type: ignore[operator]
            total, terms = self.whole(compute)
            self.accelerator.backward(total * share)
        return total.detach(), terms

    def update(self, clip: float) -> float:
        """Clips the gradients to this norm, steps, and clears them -> their norm before."""
        norm = self.accelerator.clip_grad_norm_(self.together.trained, clip)
        self._step()
        return float(norm)

    def _step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """A new start for the optimizers."""
        for optimizer in self.optimizers:
            optimizer.optimizer.state.clear()

    def look(self, compute: Callable[[], T]) -> T:
        """Computes without learning."""
        return compute()

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        if sharded(folder):
            load_shards(folder, self.together, [optimizer.optimizer for optimizer in self.optimizers])
        else:
            self.accelerator.load_state(str(folder), strict=not self.together.partly)

    def weights(self) -> dict[str, Tensor] | None:
        """All weights on the first process, by their names in `Together`; None where every process has them anyway."""
        return None


class Shards(Replicas):
    """FSDP2: every process keeps a share of weights, gradients and optimizer, and gathers a layer while it is computed."""

    sharded = True

    def __init__(
        self, accelerator: Any, together: Together, make: Callable[[nn.Module], list[torch.optim.Optimizer]]
    ) -> None:
        self.accelerator, self.together = accelerator, together.to(accelerator.device)
        half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
            # What goes between layers stays as it is: a mask's lowest float32 would be infinite in bfloat16.
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False),
        }
        for module in together.modules():
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module, **settings)
        self.root: FSDPModule = fully_shard(together, **settings)
        self.whole = together
        self.optimizers = make(together)  # of the shares, which are other parameters than those before

    def learn(self, compute: Callable[[], Learnt], share: float, last: bool) -> Learnt:
        total, terms = self.whole(compute)
        (total * share).backward()
        return total.detach(), terms

    def update(self, clip: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.together.trained, clip)
        self._step()
        return float(norm.full_tensor())  # type: ignore[attr-defined]

    def forget(self) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def look(self, compute: Callable[[], T]) -> T:
        with torch.no_grad():
            found = self.whole(compute)
        self.root.reshard()
        return found

    def save(self, folder: Path) -> None:
        """A weight that had no gradient yet has no state, and gets none: it is to start anew when it has one."""
        owned = _owned(self.together, self.optimizers)
        learning = {name: dict(o.state[p]) for name, (p, o) in owned.items() if o.state.get(p)}
        dcp.save({"weights": _weights(self.together), "optimizers": learning}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Errors: ConfigError for a checkpoint of whole models."""
        if not sharded(folder):
            raise ConfigError(f"The checkpoint {folder} isn't sharded: choose --parallel ddp.")
        load_shards(folder, self.together, self.optimizers)

    def weights(self) -> dict[str, Tensor] | None:
        whole: Any = get_model_state_dict(
            self.together, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        return whole


def sharded(folder: Path) -> bool:
    """Whether a checkpoint is of a model that is shared."""
    return (folder / ".metadata").is_file()


def load_shards(folder: Path, together: Together, optimizers: list[torch.optim.Optimizer]) -> None:
    """What `Shards` have saved, into as many processes as there are now, whether they share the model or each has a whole one."""
    held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    owned = _owned(together, optimizers)
    learning = {
        name: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for name, (p, _) in owned.items()
        if f"optimizers.{name}.step" in held
    }
    state: dict[str, Any] = {"weights": _weights(together), "optimizers": learning}
    dcp.load(state, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    set_model_state_dict(together, state["weights"], options=_options(together))
    for name, loaded in learning.items():
        parameter, optimizer = owned[name]
        optimizer.state[parameter] = loaded


def _weights(together: Together) -> dict[str, Any]:
    return get_model_state_dict(together, options=_options(together))


def _options(together: Together) -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=together.partly, strict=not together.partly)


def _owned(
    together: Together, optimizers: list[torch.optim.Optimizer]
) -> dict[str, tuple[nn.Parameter, torch.optim.Optimizer]]:
    """The weights that are trained, by name, each with its optimizer."""
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    return {name: (p, owner[id(p)]) for name, p in together.named_parameters() if p.requires_grad}


class Zero(Replicas):
    """DeepSpeed, as its launch file says (train/launch/zero3.yaml): shards like FSDP2's, the optimizer's step inside."""

    sharded = True

    def __init__(
        self, accelerator: Any, together: Together, optimizers: list[torch.optim.Optimizer], clip: float
    ) -> None:
        self.accelerator, self.together = accelerator, together
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        # Passes are counted here, and each one's loss is divided before it comes there.
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": clip}
        self.whole, *self.optimizers = accelerator.prepare(together, *optimizers)

    def learn(self, compute: Callable[[], Learnt], share: float, last: bool) -> Learnt:
        self.accelerator.gradient_state._set_sync_gradients(last)  # then the backward pass ends with the step
        total, terms = self.whole(compute)
        self.accelerator.backward(total * share)
        return total.detach(), terms

    def update(self, clip: float) -> float:
        return float(self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm())

    def forget(self) -> None:
        raise ConfigError("Under ZeRO-3 the optimizer can't start anew at a curriculum's stages: use --parallel fsdp2.")

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))

    def weights(self) -> dict[str, Tensor] | None:
        return self.accelerator.get_state_dict(self.whole)


def way(accelerator: Any, how: How) -> Literal["ddp", "fsdp2", "zero3"]:
    """How a step is spread. how: auto = as the launch file says, which without one is ddp. Errors: ConfigError for another
    way than that of the launch file, and for DeepSpeed without a GPU, where accelerate would leave it out without a word."""
    kind = str(accelerator.distributed_type.value)
    if kind != "DEEPSPEED" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(
            "The launch file asks for DeepSpeed, which needs a GPU here: use --parallel fsdp2 under torchrun."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # left out likewise, but shards need no GPU
        kind = "FSDP"
    if (kind == "DEEPSPEED" and how != "auto") or (kind == "FSDP" and how == "ddp"):
        raise ConfigError(f"parallel: {how}, but the launch file says {kind}: choose parallel: auto, or another file.")
    if how == "fsdp2" or (how == "auto" and kind == "FSDP"):
        return "fsdp2"
    return "zero3" if kind == "DEEPSPEED" else "ddp"


def spread(
    accelerator: Any,
    together: Together,
    make: Callable[[nn.Module], list[torch.optim.Optimizer]],
    how: How,
    clip: float,
) -> Replicas:
    """make: the optimizers of a module's weights. how: as in `way`. Errors: ConfigError for what can't be combined."""
    chosen = way(accelerator, how)
    if chosen == "fsdp2":
        if not distributed.is_initialized():
            raise ConfigError(
                "fsdp2 shares one model among several processes: start them with torchrun or accelerate launch."
            )
        return Shards(accelerator, together, make)
    if chosen == "zero3":
        return Zero(accelerator, together, make(together), clip)
    return Replicas(accelerator, together, make(together))


def gathered(value: T, accelerator: Any) -> list[T]:
    """Every process's value, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    every: list[Any] = [None] * accelerator.num_processes
    distributed.all_gather_object(every, value)
    return every
