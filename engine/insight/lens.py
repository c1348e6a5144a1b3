"""What every layer would say of a slot: the logit lens, a tuned lens, and which of a world's words they name.

The logit lens puts a layer's states through the model's last norm and head, as if nothing came after. The tuned lens
(Belrose et al. 2023, arXiv 2303.08112) first moves them by one affine map a layer, trained (train/lens.py) to match what the
model says in the end; the plain one underestimates what early layers hold. Neither shows that anything is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.backbones.base import Backbone

FILE = "lens.safetensors"  # beside a model


class TunedLens(nn.Module):
    """h -> h + A h + b, an A and a b a layer, the embeddings included and the last layer left out. Begins as no change."""

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, dim, dim))
        self.bias = nn.Parameter(torch.zeros(layers, dim))

    def forward(self, states: Tensor) -> Tensor:
        """states: [layers, ..., dim] -> the same shape."""
        flat = states.flatten(1, -2)
        return states + torch.baddbmm(self.bias[:, None], flat, self.weight).view_as(states)

    def save(self, folder: str | Path) -> None:
        save_file({name: p.detach().bfloat16().cpu() for name, p in self.named_parameters()}, Path(folder) / FILE)

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> TunedLens | None:
        """None where the folder has none. Errors: ValueError for one of another model's shape."""
        if not (Path(folder) / FILE).is_file():
            return None
        tensors = load_file(Path(folder) / FILE)
        lens = cls(backbone.layers, backbone.text_config.hidden_size)
        if tensors["weight"].shape != lens.weight.shape:
            raise ValueError(f"{Path(folder) / FILE} is not this model's lens: train it with python -m train.lens.")
        lens.load_state_dict(tensors)
        return lens.to(backbone.device)


def logits(backbone: Backbone, states: Tensor, lens: TunedLens | None = None) -> Tensor:
    """What each layer says: states [layers + 1, ..., dim] -> [layers + 1, ..., vocabulary]; the last is the model's own."""
    inner = states[:-1] if lens is None else lens(states[:-1].float()).to(states.dtype)
    said = torch.cat([backbone.final_norm(inner), states[-1:]])
    return backbone.logits(said.to(backbone.model.dtype))


def divergence(said: Tensor) -> Tensor:
    """How far each layer is from what the model says in the end, in nats: KL(last || layer).

    said: logits [layers + 1, ..., vocabulary] -> [layers + 1, ...].
    """
    logs = said.float().log_softmax(-1)
    return (logs[-1].exp() * (logs[-1] - logs)).sum(-1)


def loss(backbone: Backbone, lens: TunedLens, states: Tensor) -> Tensor:
    """What training lowers: mean divergence of states [layers + 1, rows, dim], the model itself held fast."""
    return divergence(logits(backbone, states, lens))[:-1].mean()


def words(backbone: Backbone, said: Tensor, count: int = 3) -> list[list[list[tuple[str, float]]]]:
    """The likeliest tokens: logits [layers + 1, slots, vocabulary] -> a layer's slots' (text, probability), best first."""
    best = said.float().softmax(-1).topk(count, dim=-1)
    return [
        [[(backbone.decode([i]), p) for i, p in zip(ids, shares)] for ids, shares in zip(*layer)]
        for layer in zip(best.indices.tolist(), best.values.tolist())
    ]


def first_tokens(backbone: Backbone, names: Sequence[str]) -> Tensor:
    """The token that begins each word where it stands behind a space, blanks left out: [names].

    Errors: ValueError for two that begin alike, which a lens can't tell apart.
    """
    spelled = [backbone.text_ids(f" {name}") for name in names]
    found = [next((i for i in ids if backbone.decode([i]).strip()), ids[0]) for ids in spelled]
    if len(set(found)) < len(found):
        raise ValueError(f"Two of {', '.join(names)} begin with the same token.")
    return torch.tensor(found, device=backbone.device)


def likeliest(said: Tensor, tokens: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The likeliest of the words that it could be, as a place in `tokens`.

    said: logits [layers + 1, samples, slots, vocabulary]; tokens: the words'; groups: for each sample the words that it could
    be, as places in `tokens`. -> [layers + 1, samples, slots]
    """
    allowed = torch.zeros(len(groups), len(tokens), dtype=torch.bool, device=said.device)
    for sample, group in enumerate(groups):
        allowed[sample, list(group)] = True
    return said[..., tokens].masked_fill(~allowed[:, None], float("-inf")).argmax(-1)
