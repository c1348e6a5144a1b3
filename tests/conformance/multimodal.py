"""Multimodal CoCoNuT's numbers, met by Coconut over images through layout, pack, latents, Outcome and loss.

The folder's prompts come as ids, so they stand in for the engine's own; everything after them is the method's layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.backbones.internvl import InternVL
from engine.data.samples import Sample
from engine.layout import Layout, Packed, Piece, Segment, Visual, pack
from engine.methods.coconut import LATENT, START, STOP, Coconut
from engine.methods.method import run
from tests.conformance.folder import (
    IGNORED,
    Numerals,
    below,
    gradients,
    model,
    needed,
    numerals,
    read_json,
    told,
    whose,
)
from tests.conformance.quantities import Quantity, array, number, same, unchecked

NAMES = {  # the folder's names for special tokens -> the engine's
    "start_latent": START, "latent": LATENT, "end_latent": STOP, "img_start": "<img>", "img_end": "</img>",
}  # fmt: skip


class GivenPixels(InternVL):
    """The backbone, taking tiles that are normalised already; their features are constants, as in the folder."""

    @torch.no_grad()
    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        return self.encode_pixels(patches)


@dataclass(frozen=True)
class Folder:
    backbone: GivenPixels
    special: dict[str, int]
    samples: list[Sample]
    ends: list[tuple[list[int], list[int]]]  # ids of each sample's prompt and answer
    pixels: Tensor  # [tiles, 3, side, side], of all samples

    def layouts(self, case: dict[str, Any]) -> list[Layout]:
        """The method's own layouts, behind the given prompts. Tiles go to the image tokens of the batch in their order."""
        made, tiles = [], iter(self.pixels.split(1))
        batch = zip(*(torch.tensor(case["batch"][key]) for key in ("input_ids", "attention_mask")), strict=True)
        for place, (ids, real) in enumerate(batch):
            row = ids[real > 0].tolist()
            start, count = row.index(self.special["start_latent"]), row.count(self.special["latent"])
            # A row may be at an earlier stage than its case, as `uniform_prob` has it.
            method = Coconut(c_thought=case["c_thought"], epochs_per_stage=1, max_latent_stage=case["stage"])
            sample = self.samples[whose(row, self.ends, place)]
            own = method.layout(sample, np.random.default_rng(0), epoch=count // case["c_thought"])
            prompt = self.prompt(row[:start], tiles)
            made.append(replace(own, branches={name: (prompt, *path[1:]) for name, path in own.branches.items()}))
        return made

    def prompt(self, ids: list[int], tiles: Iterator[Tensor]) -> Segment:
        """Text and images; the tokens around an image are the backbone's to write."""
        special, pieces = self.special, list[Piece]()
        for is_image, group in groupby(ids, lambda i: i == special["image_token_id"]):
            run_of_ids = list(group)
            if is_image:
                count = len(run_of_ids) // self.backbone.tile_tokens
                shown = torch.cat([next(tiles) for _ in range(count)])
                pieces.append(Visual(shown, (1, 1, count), 0.0, still=True))
            else:
                around = special["img_start"], special["img_end"]
                pieces.append(numerals(i for i in run_of_ids if i not in around))
        return Segment("context", tuple(pieces))


def check(folder: Path) -> list[Quantity]:
    """Every quantity of a folder, in the order of its cases."""
    given, inputs = _load(folder), read_json(folder / "inputs.json")
    numbers, arrays, found = told(folder, "cases")
    expected = numbers["cases"]
    if "image_features" in arrays:
        with torch.no_grad():
            features = given.backbone.encode_pixels(given.pixels)
        value = arrays.pop("image_features")
        found.append(array("image_features", value, features.unflatten(0, (len(given.pixels), -1))))
    for case in inputs["cases"]:
        name = case["name"]
        found += needed(name, expected.get(name, {}), "loss")
        found += _case(given, case, expected.get(name, {}), below(arrays, name))
    names = [case["name"] for case in inputs["cases"]]
    found += [unchecked(name) for name in expected if name not in names]
    return found + [unchecked(key) for key in arrays if not key.startswith(tuple(f"{name}." for name in names))]


def _load(folder: Path) -> Folder:
    config, inputs = read_json(folder / "config.json"), read_json(folder / "inputs.json")
    special = inputs["special_ids"]
    # Steps and answers come as they stand: the engine's line breaks and "###" are among their ids, or nowhere.
    ids = {ours: special[theirs] for theirs, ours in NAMES.items()}
    words = Numerals(ids, {"\n": [], "###": []}, special["pad"], special["eos"])
    samples = []
    for sample in inputs["samples"]:
        steps = tuple(map(numerals, sample["steps"]))
        if sample["answer"][-1] != special["eos"]:
            raise ValueError(f"The answer {sample['answer']} should end with {special['eos']}.")
        answer = numerals(sample["answer"][:-1])
        samples.append(Sample(None, "", (), steps, answer, dialect="plain"))
    ends = [(sample["question"], sample["answer"]) for sample in inputs["samples"]]
    backbone = GivenPixels(model(folder, next(iter(config["models"]))), words)
    return Folder(backbone, special, samples, ends, load_file(folder / "inputs.safetensors")["pixel_values"])


def _case(given: Folder, case: dict[str, Any], expected: dict[str, Any], arrays: dict[str, Tensor]) -> list[Quantity]:
    name, backbone = case["name"], given.backbone
    backbone.model.zero_grad(set_to_none=True)
    packed = pack(given.layouts(case), backbone.encode, backbone.pad)
    out = run(backbone, packed)
    total, _ = Coconut().loss(out)
    total.backward()
    theirs, ours = torch.tensor(case["batch"]["attention_mask"]) > 0, packed.node >= 0
    found = _inputs(name, case["batch"], packed, theirs, ours)
    for key, value in expected.items():
        if key == "loss":
            found.append(number(f"{name}.loss", value, total.item()))
        elif key == "grad_norms_language_model":
            found += gradients(name, value, dict(backbone.model.named_parameters(remove_duplicate=False)))
        else:
            found.append(unchecked(f"{name}.{key}"))
    for key, array_ in arrays.items():
        if key == "logits":
            logits = backbone.logits(out.hidden[-1]).detach()
            found.append(array(f"{name}.logits", array_[theirs], logits[ours]))
        elif key == "thought_embeds":
            found.append(array(f"{name}.thought_embeds", array_, out.hidden[0][packed.latents].detach()))
        else:
            found.append(unchecked(f"{name}.{key}"))
    return found


def _inputs(name: str, batch: dict[str, Any], packed: Packed, theirs: Tensor, ours: Tensor) -> list[Quantity]:
    """The method's layout is the published one: on every row that isn't padding."""
    rows = packed.branches["answer"]
    labels = torch.full_like(packed.ids, IGNORED)
    labels[rows.sample, rows.row + 1] = rows.target
    made = {"input_ids": packed.ids, "labels": labels, "position_ids": packed.positions[0]}
    found = [same(f"{name}.attention_mask", theirs.sum(1), ours.sum(1))]
    for key, value in batch.items():
        if key in made:
            found.append(same(f"{name}.{key}", torch.tensor(value)[theirs], made[key][ours]))
        elif key != "attention_mask":
            found.append(unchecked(f"{name}.{key}"))
    return found
