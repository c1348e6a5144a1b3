"""How much of a chain its thinking tokens still hold: interpreters say it, and libraries that others use compare the texts.

BLEU-4 by sacrebleu, METEOR by nltk, ROUGE-L by rouge-score, BERTScore by bert-score with an encoder from a local folder;
all from 0 to 1. Nothing here reaches the network: METEOR matches synonyms only where nltk's WordNet lies on this machine,
and says whether it did. A judge is whatever function the caller has. Knows no file formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine import generate
from engine.backbones.base import Backbone
from engine.config import ConfigError
from engine.data.samples import Sample
from engine.layout import pack
from engine.methods.heima import Interpreters
from engine.methods.method import holes_filled, run

LONGEST = 256  # tokens that an interpreter says at most
Judge = Callable[[str, str], float]  # (what was said, what is true) -> how alike, as the judge counts


@dataclass(frozen=True)
class Said:
    """One section of one sample, as its interpreter says it and as it was written."""

    section: str
    said: str
    true: str


@dataclass(frozen=True)
class Likeness:
    """Means over pairs; BLEU-4 is the corpus's. None: not asked for."""

    bleu4: float
    meteor: float
    synonyms: bool  # METEOR's: did it have WordNet
    rouge_l: float
    bertscore: float | None
    judged: float | None
    pairs: int


@torch.no_grad()
def interpreted(
    backbone: Backbone, companions: nn.ModuleDict, method: Interpreters, samples: Sequence[Sample], batch: int = 16,
    heed: Callable[[], None] = generate.unheeded,
) -> list[Said]:  # fmt: skip
    """Every thinking token of every sample put into words by greedy decoding; templates are drawn from the sample's place.

    The thinking tokens' states are those of the true line: what stands before a thinking token is the same in all samples.
    """
    found = []
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        layouts = [method.layout(s, np.random.default_rng(i)) for i, s in enumerate(part, first)]
        prompts = [
            replace(layout, readings=tuple(replace(r, path=r.path[:-1]) for r in layout.readings)) for layout in layouts
        ]
        out = run(backbone, pack(prompts, backbone.encode, backbone.pad).to(backbone.device), companions=companions)
        for name, readings in out.packed.readings.items():
            reader = method.reader(backbone, companions, name)
            written = generate.go_on(reader, readings.packed, holes_filled(out, readings, reader), LONGEST, heed)
            true = [r.path[-1].pieces[0] for layout in layouts for r in layout.readings if r.kind == name]
            found += [Said(name, said.strip(), str(text)) for said, text in zip(written.text, true, strict=True)]
    return found


def unfolded(
    backbone: Backbone, companions: nn.ModuleDict, method: Interpreters, sample: Sample,
    heed: Callable[[], None] = generate.unheeded,
) -> str:  # fmt: skip
    """What the interpreters say of one sample's thinking tokens, a line a section. Its chain need not be known.

    They are given the question too, so not all that they say need come from the thought.
    """
    names = method.sections[: method.compressed]
    asked = replace(sample, steps=("",) * len(names), sections=names)
    found = interpreted(backbone, companions, method, [asked], heed=heed)
    return "\n".join(f"{one.section}: {on_one_line(one.said)}" for one in found)


def on_one_line(text: str) -> str:
    """A section's lines behind each other, with a semicolon between them."""
    return "; ".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def likeness(
    said: Sequence[str], true: Sequence[str], encoder: str | Path | None = None, layer: int | None = None,
    judge: Judge | None = None,
) -> Likeness:  # fmt: skip
    """encoder: the folder of BERTScore's encoder, whose layer `layer` is read (default: its last).

    Errors: ValueError for no pair; ConfigError for an encoder that can't be read; ModuleNotFoundError with what to install.
    """
    if not said or len(said) != len(true):
        raise ValueError(f"{len(said)} texts said and {len(true)} true ones: there must be as many, at least one.")
    pairs = list(zip(said, true, strict=True))
    meteor, synonyms = _meteor(pairs)
    return Likeness(
        _library("sacrebleu").corpus_bleu(list(said), [list(true)]).score / 100,
        meteor,
        synonyms,
        _rouge_l(pairs),
        None if encoder is None else _bertscore(pairs, Path(encoder), layer),
        None if judge is None else float(np.mean([judge(ours, theirs) for ours, theirs in pairs])),
        len(pairs),
    )


def by_section(found: Sequence[Said], **options: Any) -> dict[str, Likeness]:
    """A section -> how alike what was said of it is; options as of `likeness`."""
    told: dict[str, list[Said]] = {}
    for one in found:
        told.setdefault(one.section, []).append(one)
    return {name: likeness([o.said for o in part], [o.true for o in part], **options) for name, part in told.items()}


class _NoSynonyms:
    """Stands where nltk wants WordNet."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor(pairs: Sequence[tuple[str, str]]) -> tuple[float, bool]:
    """-> (mean, whether synonyms counted). Words are cut without nltk's data, which may not be there."""
    meteor = _library("nltk.translate.meteor_score").meteor_score
    cut = _library("nltk.tokenize").wordpunct_tokenize
    wordnet: Any = _library("nltk.corpus").wordnet
    try:
        wordnet.ensure_loaded()  # looks on this machine alone
    except LookupError:
        wordnet = _NoSynonyms()
    each = [meteor([cut(true)], cut(said), wordnet=wordnet) for said, true in pairs]
    return float(np.mean(each)), not isinstance(wordnet, _NoSynonyms)


def _rouge_l(pairs: Sequence[tuple[str, str]]) -> float:
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return float(np.mean([scorer.score(true, said)["rougeL"].fmeasure for said, true in pairs]))


def expect_encoder(folder: Path) -> None:
    """Errors: ConfigError for a folder that has no model in it."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"BERTScore's encoder must be a folder with a model in it; {folder} is none.")


def _bertscore(pairs: Sequence[tuple[str, str]], encoder: Path, layer: int | None) -> float:
    """F1; a text of which nothing was said scores 0."""
    library = _library("bert_score")
    expect_encoder(encoder)
    layers = layer or json.loads((encoder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    full = [(said, true) for said, true in pairs if said.strip() and true.strip()]
    if not full:
        return 0.0
    try:
        scorer = library.BERTScorer(model_type=str(encoder), num_layers=layers)
        _, _, f1 = scorer.score(*map(list, zip(*full, strict=True)))
    except OverflowError:  # the library cuts texts to what the tokenizer says is longest
        raise ConfigError(f"{encoder}: its tokenizer_config.json must say model_max_length, such as 512.") from None
    return float(f1.sum()) / len(pairs)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        need = "sacrebleu nltk rouge-score bert-score"
        raise ModuleNotFoundError(f"{error.name} is missing: pip install {need}.", name=error.name) from None
