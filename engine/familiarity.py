"""Is this clip like the ones a small model was trained on? A Gaussian over what its vision encoder sees.

A clip's feature is the mean and the spread of its visual tokens; its distance is Mahalanobis', in the training clips'
own covariance. The limit is a quantile over validation clips, so the share of known clips turned away is known too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.backbones.base import Backbone
from engine.layout import Frames

TENSORS, WORDS = "familiarity.safetensors", "familiarity.json"
SHRINK = 0.05  # share of the covariance's mean variance added to its diagonal


@dataclass(frozen=True)
class Familiarity:
    mean: Tensor  # [features]
    whiten: Tensor  # [features, features]: distance = |whiten (feature - mean)| / sqrt(features)
    limit: float
    questions: tuple[str, ...]  # the questions that were trained on

    def distance(self, backbone: Backbone, clip: Frames) -> float:
        """How far the clip is from those of training; more than `limit` is unlike them."""
        return float(_distance(feature(backbone, clip), self.mean, self.whiten))

    def save(self, folder: Path) -> None:
        save_file({"mean": self.mean, "whiten": self.whiten.contiguous()}, folder / TENSORS)
        words = {"limit": self.limit, "questions": list(self.questions)}
        (folder / WORDS).write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Familiarity | None:
        """None where the folder has none: the model knows no bounds."""
        if not (folder / WORDS).is_file():
            return None
        tensors = load_file(folder / TENSORS)
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        return cls(tensors["mean"], tensors["whiten"], words["limit"], tuple(words["questions"]))


@torch.no_grad()
def feature(backbone: Backbone, clip: Frames) -> Tensor:
    """Mean and standard deviation over a clip's visual tokens: [2 x dim], float64 on the CPU."""
    visual = backbone.cut(clip)
    tokens = backbone.encode_patches(visual.patches.to(backbone.device), [visual.grid])
    tokens = tokens.float().cpu()  # Apple's GPUs know no float64
    return torch.cat([tokens.mean(0), tokens.std(0)]).double()


def _distance(features: Tensor, mean: Tensor, whiten: Tensor) -> Tensor:
    return ((features - mean) @ whiten.T).norm(dim=-1) / len(mean) ** 0.5


def fit(
    backbone: Backbone, known: Iterable[Frames], held_out: Iterable[Frames], questions: Iterable[str],
    pass_share: float = 0.99,
) -> Familiarity:  # fmt: skip
    """Fits on `known` clips; the limit lets `pass_share` of the `held_out` clips through."""
    features = torch.stack([feature(backbone, clip) for clip in known])
    mean = features.mean(0)
    covariance = torch.cov(features.T)
    covariance += SHRINK * covariance.diagonal().mean() * torch.eye(len(mean), dtype=covariance.dtype)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    distances = torch.stack([_distance(feature(backbone, clip), mean, whiten) for clip in held_out])
    return Familiarity(mean, whiten, float(distances.quantile(pass_share)), tuple(questions))
