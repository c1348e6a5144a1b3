"""A model ready to be asked: a backbone with what its folder says of it, loaded from a folder or the Hub.

model = load()    # the small one that ships; or a folder, a Hub id, either with an adapter
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from torch import nn

from engine import adapters, generate
from engine.backbones.base import Backbone
from engine.backbones.load import here, only_a_folder
from engine.backbones.load import load as load_backbone
from engine.config import ConfigError, build
from engine.data.samples import Dialect, Sample
from engine.familiarity import Familiarity
from engine.folders import fingerprint, header
from engine.insight.lens import TunedLens
from engine.layout import Layout, Segment, slots
from engine.methods import from_description
from engine.methods.method import META, Method
from engine.methods.pause import PauseDistillation
from engine.video import Sampling

SMALL = Path(__file__).parent.parent / "assets" / "small"
EMBEDDED = SMALL / "pause"  # what is loaded where no model is named
PUBLISHED_SAMPLING = Sampling(fps=2.0, min_frames=4, max_frames=16, pixels=128 * 28 * 28)
LONGEST_CHAIN = 1024  # tokens of a real model's written chain
CONTAINERS = (  # cgroup 2 and 1: the file of a container's limit, that of what it uses, how its memory.stat begins names
    ("memory.max", "memory.current", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
)


@dataclass(frozen=True)
class Untaught(Method):
    """A model as others published it: it knows none of the methods' tokens, so it is asked in plain words, and what is
    given to it before its answer are slots that mean nothing to it, if any are asked for.
    """

    marks: ClassVar[tuple[str, ...]] = ()

    def thinking(self, count: int) -> tuple[Segment, ...]:
        return (slots("<pause>", count),) if count else ()

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        raise ConfigError(f"Nothing in the model's folder ({META}) says how it was trained.")


@dataclass(frozen=True)
class Model:
    """A backbone with what its folder says about it."""

    backbone: Backbone
    name: str
    trained_pauses: tuple[int, int] | None  # fewest and most pauses in training; None = never trained for pauses
    sampling: Sampling
    familiarity: Familiarity | None  # None: knows no bounds to its world
    method: Method = field(default_factory=PauseDistillation)
    companions: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    tuned: TunedLens | None = None
    dialect: Dialect = "chat"  # in which it was taught
    image_pixels: int | None = None  # most of one image in training; None: as of a clip's frame
    folders: tuple[Path, ...] = ()  # that its files, and its adapter's, lie in

    @property
    def small(self) -> bool:
        return self.familiarity is not None

    @property
    def layers(self) -> int:
        return self.backbone.layers

    @property
    def taught(self) -> bool:
        """Whether it was trained by one of this project's methods, and knows their tokens."""
        return not isinstance(self.method, Untaught)

    @property
    def usual_pauses(self) -> int:
        """8, or the nearest number that it was trained with."""
        return self.pauses_near(8)

    def sampling_of(self, still: bool) -> Sampling:
        """How clips, or images, were looked at in training."""
        return replace(self.sampling, pixels=self.image_pixels) if still and self.image_pixels else self.sampling

    def pauses_near(self, wanted: int) -> int:
        """The nearest number to `wanted` that it was trained with; none where it was never trained for them."""
        if self.trained_pauses is None:
            return 0
        return min(max(wanted, self.trained_pauses[0]), self.trained_pauses[1])

    @property
    def longest_chain(self) -> int:
        return generate.LONGEST_CHAIN if self.small else LONGEST_CHAIN


def load(path: str | Path | None = None, adapter: str | Path | None = None, device: str = "auto") -> Model:
    """The embedded model (None), a folder, or a Hub id; with a PEFT adapter merged in if one is named, or if the folder holds
    one beside whose model it lies.

    Errors: ValueError with one sentence for a folder that is no model, another family, or a broken file.
    """
    place = Path(path) if path else EMBEDDED
    if not place.is_dir() and (path is None or only_a_folder(path)):
        raise ValueError(f"There is no folder {place}: name one that holds a model, or a Hub id.")
    device = here(device)
    try:
        place, adapter = with_base(local(place), local(adapter) if adapter else None)
        meta = {key: value for folder in (place, adapter) if folder for key, value in told_by(folder).items()}
        method = method_of(meta)
        # Put together on the CPU: on ZeroGPU none but it is there yet, and peft's sums fail on the stand-in.
        backbone = load_backbone(str(place), "cpu", precision(device, place), method.tokens)
        if adapter:
            adapters.merge(backbone.model, adapter)
            backbone.model.eval()
        pauses = tuple(meta["pauses"]) if meta.get("pauses") else None
        sampling = build(Sampling, meta["sampling"], "sampling.") if "sampling" in meta else PUBLISHED_SAMPLING
        companions = method.companions(backbone)
        adapters.load_companions(adapter or place, companions)
        backbone.model.to(torch.device(device))
        companions.to(device, backbone.model.dtype)
        familiarity = (Familiarity.load(adapter) if adapter else None) or Familiarity.load(place)
        tuned = TunedLens.load(adapter or place, backbone)  # of these weights, not of those under the adapter
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"Can't load {place}: ")[:300]
        raise ValueError(f"Can't load {adapter or place}: {reason}") from None
    return Model(
        backbone, meta.get("name", str(path)), pauses, sampling, familiarity, method, companions, tuned,
        meta.get("dialect", "chat"), meta.get("image_pixels"), (place, adapter) if adapter else (place,),
    )  # fmt: skip


def method_of(meta: Mapping[str, Any]) -> Method:
    """By what a folder says of its model. Errors: ConfigError for a method that isn't known."""
    return from_description(meta["method"]) if "method" in meta else Untaught()


def local(place: str | Path) -> Path:
    """A folder as it is; of a Hub id, the folder that its files are downloaded to, without pickles."""
    if Path(place).is_dir() or str(place).startswith((".", "/", "~")):
        return Path(place)
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    name = Path(place).as_posix()  # on Windows a path has its slash turned round
    return Path(snapshot_download(name, allow_patterns=kinds, ignore_patterns=["original/*", "consolidated*"]))


def with_base(place: Path, adapter: Path | None = None) -> tuple[Path, Path | None]:
    """-> (a model's folder, the adapter over it): of an adapter's folder alone, with the model beside it that it names (../NAME).

    Errors: ValueError for an adapter whose model must be named, since nothing is downloaded unasked, or no folder elsewhere
    opened; and for one that was trained on other weights than its model's.
    """
    if adapter or (place / "config.json").is_file() or not (place / adapters.CONFIG).is_file():
        return place, adapter
    name = json.loads((place / adapters.CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or "a model"
    if not re.fullmatch(r"\.\./[\w-][\w.-]*", name) or not (place / name / "config.json").is_file():
        raise ValueError(f"it holds an adapter for {name}: name that with --model, and this folder with --adapter.")
    base = place.resolve().parent / name.removeprefix("../")
    if (wanted := told_by(place).get("base")) and wanted != fingerprint(base):
        raise ValueError(f"its adapter was trained on other weights than {base} holds now.")
    return base, place


def precision(device: str, folder: Path) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU in whose free memory the weights wouldn't fit twice over in float32; else float32.

    Apple's GPUs compute in bfloat16 from macOS 14 on. float16 is never chosen: activations of such models overflow it.
    """
    if device == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    if device != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if 2 * 4 * parameters(folder) > free_memory() else torch.float32


def free_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that may still be taken: what the machine has free, or what its container's limit leaves, if that is less.

    Files in the cache make room, so they count as free, as psutil counts the machine's own.
    """
    free = [psutil.virtual_memory().available]
    for most, used, prefix in CONTAINERS:
        try:
            limit, taken = (int((root / name).read_text()) for name in (most, used))
            told = dict(line.split() for line in (root / most).with_name("memory.stat").read_text().splitlines())
            free.append(limit - taken + sum(int(told[f"{prefix}{kind}_file"]) for kind in ("active", "inactive")))
        except (OSError, ValueError, KeyError):  # there is no limit: no such file, or "max" in it
            continue
    return min(free)


def parameters(folder: Path) -> int:
    """How many numbers the folder's weights hold, by the files' headers alone; those of unreadable files don't count."""
    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as stored:
                told = json.loads(header(stored))
            count += sum(math.prod(each["shape"]) for name, each in told.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return count


def told_by(folder: Path) -> dict[str, Any]:
    """What a folder says of its model beside the weights: how it was taught, how its clips were looked at."""
    return json.loads((folder / META).read_text(encoding="utf-8")) if (folder / META).is_file() else {}
