"""Is this what a small model was trained on: the clip, the question, its options, and this question about such a clip?

A clip's feature is the mean and the spread of its visual tokens; its distance is Mahalanobis', in the training clips'
own covariance. The limit is a quantile over validation clips, so the share of known clips turned away is known too. A clip
belongs to the question whose training clips' mean is nearest. A clip that is longer than all of them is known by its length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.backbones.base import Backbone
from engine.layout import Frames

TENSORS, WORDS = "familiarity.safetensors", "familiarity.json"
LONGER = 1.05  # times the longest clip of training, since files round their times
SHRINK = 0.05  # share of the covariance's mean variance added to its diagonal


@dataclass(frozen=True)
class Asked:
    """A question that was trained on, with every option that it came with."""

    question: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Familiarity:
    mean: Tensor  # [features]
    means: Tensor  # [questions, features]: of the clips that each is asked about
    whiten: Tensor  # [features, features]: distance = |whiten (feature - mean)| / sqrt(features)
    limit: float
    asked: tuple[Asked, ...]
    longest: float  # seconds of the longest clip that was trained on

    def strange(self, backbone: Backbone, clip: Frames | None, question: str, options: Sequence[str]) -> str:
        """What here is unlike all that was trained on, in a sentence; "" where nothing is."""
        if clip is None:
            return "it was trained on questions about clips, and no clip was given."
        seen = feature(backbone, clip)
        if not _distance(seen, self.mean, self.whiten) <= self.limit:  # what is no number isn't known either
            return "this clip is unlike the three small worlds that it was trained on."
        place = next((i for i, known in enumerate(self.asked) if known.question == question.strip()), None)
        if place is None:
            return "it wasn't trained on this question, only on those of the examples."
        if not options or not set(options) <= set(self.asked[place].options):
            return f"it needs options for this question, among {', '.join(self.asked[place].options)}."
        if int(_distance(seen, self.means, self.whiten).argmin()) != place:
            return "it knows this question, but not for this kind of clip."
        return ""

    def longer(self, clip: Frames) -> str:
        """That a clip is longer than those that were trained on, in a sentence; "" where it isn't."""
        if clip.duration < self.longest * LONGER:
            return ""
        return (
            f"This clip, {clip.duration:.1f} s long, is longer than all that this model was trained on (up to {self.longest:g} s): "
            "hardly anything it has learnt carries over to longer clips."
        )

    def save(self, folder: Path) -> None:
        """In float32, half the size: what it measures moves by a millionth."""
        tensors = {"mean": self.mean, "means": self.means, "whiten": self.whiten}
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        words = {"limit": self.limit, "longest": self.longest, "asked": [asdict(each) for each in self.asked]}
        (folder / WORDS).write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Familiarity | None:
        """None where the folder has none: the model knows no bounds."""
        if not (folder / WORDS).is_file():
            return None
        tensors = {name: tensor.double() for name, tensor in load_file(folder / TENSORS).items()}
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        asked = tuple(Asked(each["question"], tuple(each["options"])) for each in words["asked"])
        return cls(tensors["mean"], tensors["means"], tensors["whiten"], words["limit"], asked, words["longest"])


@torch.no_grad()
def feature(backbone: Backbone, clip: Frames) -> Tensor:
    """Mean and standard deviation over a clip's visual tokens: [2 x dim], float64 on the CPU."""
    visual = backbone.cut(clip)
    tokens = backbone.encode_patches(visual.patches.to(backbone.device), [visual.grid])
    tokens = tokens.float().cpu()  # Apple's GPUs know no float64
    return torch.cat([tokens.mean(0), tokens.std(0, correction=0)]).double()  # of one token too


def _distance(features: Tensor, mean: Tensor, whiten: Tensor) -> Tensor:
    return ((features - mean) @ whiten.T).norm(dim=-1) / len(mean) ** 0.5


def fit(
    backbone: Backbone, known: Iterable[tuple[Asked, Frames]], held_out: Iterable[Frames], pass_share: float = 0.99
) -> Familiarity:
    """Fits on `known` clips, each with what was asked about it; the limit lets `pass_share` of the `held_out` clips through."""
    told = ((each, feature(backbone, clip), clip.duration) for each, clip in known)
    asked, found, seconds = zip(*told, strict=True)
    features, questions = torch.stack(found), [each.question for each in asked]
    names = tuple(dict.fromkeys(questions))
    means = torch.stack([features[[each == name for each in questions]].mean(0) for name in names])
    options = {name: sorted({o for each in asked if each.question == name for o in each.options}) for name in names}
    mean = features.mean(0)
    covariance = torch.cov(features.T)
    covariance += SHRINK * covariance.diagonal().mean() * torch.eye(len(mean), dtype=covariance.dtype)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    distances = torch.stack([_distance(feature(backbone, clip), mean, whiten) for clip in held_out])
    limit = float(distances.quantile(pass_share))
    every = tuple(Asked(name, tuple(options[name])) for name in names)
    return Familiarity(mean, means, whiten, limit, every, max(seconds))
