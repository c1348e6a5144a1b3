"""A trained model out of its run, as others take it: a folder that transformers loads, with a card that says what it is.

A plain checkpoint: weights, tokenizer, greedy generation settings, what the base model's files say of its processor, and
`sotto.json`. Or the adapter alone, for peft. Nothing leaves this machine unless a Hub repository is named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from engine import adapters, models
from engine.backbones.base import Backbone
from engine.backbones.load import family_of, load
from engine.config import build
from engine.exchange.prompt import SERVED, How, prompt
from engine.folders import SETTINGS, as_a_whole
from engine.methods.method import COMPANIONS, META, Method
from engine.video import Sampling

Form = Literal["merged", "adapter"]
PROCESSOR = (
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
KEPT = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
UNKEPT = ("README.md", "scores.json", adapters.CONFIG, adapters.WEIGHTS)


@dataclass(frozen=True)
class Trained:
    """What is exported. folder: with the model or its adapter; base: the model that an adapter is for; settings: the run's."""

    folder: Path
    base: str
    settings: Mapping[str, Any]
    meta: Mapping[str, Any]
    scores: Mapping[str, Any]

    @property
    def adapter(self) -> bool:
        return (self.folder / adapters.CONFIG).is_file()

    @property
    def method(self) -> Method:
        return models.method_of(self.meta)

    @property
    def data(self) -> dict[str, Any]:
        """The run's data, by its source's name."""
        return {name: value for name, value in self.settings.items() if name.endswith("Source")}


def trained(source: str | Path, base: str = "") -> Trained:
    """A run's folder (its best model), a model's, or an adapter's. Errors: ValueError."""
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: name a run, a model or an adapter.")
    if (folder / "best").is_dir():
        folder = folder / "best"
    run = folder.parent / SETTINGS
    try:
        settings = _json(run) if folder.name == "best" else {}
        meta, scores = _json(folder / META), _json(folder / "scores.json")
        held = _json(folder / adapters.CONFIG)
    except ValueError as error:
        raise ValueError(f"{folder} holds a broken file: {error}.") from None
    if not held and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds neither a model (config.json) nor an adapter ({adapters.CONFIG}).")
    base = base or settings.get("training", {}).get("init", "") or _named(folder, held)
    if held and not base:
        raise ValueError(f"{folder} doesn't say which model its adapter is for: name it with --base.")
    return Trained(folder, base, settings, meta, scores)


def _named(folder: Path, held: Mapping[str, Any]) -> str:
    """The model that an adapter names: beside it, elsewhere on this machine, or on the Hub."""
    try:
        place, adapter = models.with_base(folder)
    except ValueError:
        return held.get("base_model_name_or_path") or ""
    return str(place) if adapter else ""


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def export(
    source: str | Path, out: str | Path, form: Form | None = None, base: str = "", scores: Sequence[str] = ()
) -> Path:
    """Writes the folder. form: default is the source's own; merged makes an adapter part of its model's weights.

    scores: `summary.json` files of benchmarks, for the card. Errors: ValueError.
    """
    found, target = trained(source, base), Path(out)
    if form == "adapter" and not found.adapter:
        raise ValueError(f"{found.folder} holds a whole model; only what was trained with LoRA has an adapter's form.")
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ValueError(f"{target} is there already: choose another folder.")
    summaries = [_summary(Path(file)) for file in scores]
    merged = not found.adapter or form == "merged"
    text = ""
    with as_a_whole(target) as made:
        if merged:
            backbone = plain(found)
            text = silent_text(backbone, found)
            backbone.save(made)
        else:
            made.mkdir(parents=True)
            shutil.copy2(found.folder / adapters.WEIGHTS, made / adapters.WEIGHTS)
            told = _json(found.folder / adapters.CONFIG)
            told["base_model_name_or_path"] = _public(found.base)
            (made / adapters.CONFIG).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        beside(found, made, merged)
        if merged:
            look_alike(made, backbone, looks(found))
        (made / META).write_text(json.dumps(found.meta, indent=1) + "\n", encoding="utf-8")
        (made / "README.md").write_text(card(found, merged, text, summaries), encoding="utf-8")
    return target


def plain(found: Trained) -> Backbone:
    """The model in the precision of its files, an adapter merged in, with settings under which `generate` is greedy."""
    place = models.local(found.base if found.adapter else found.folder)
    kept = _json(place / "config.json")
    name = str(kept.get("dtype") or kept.get("torch_dtype") or "float32")
    backbone = load(place, dtype=getattr(torch, name), tokens=found.method.tokens)
    if found.adapter:
        adapters.merge(backbone.model, found.folder)
    # A published model's own settings may sample, or punish repetition: then its answers were others than the engine's.
    backbone.model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=backbone.end, pad_token_id=backbone.pad, bos_token_id=None
    )
    return backbone


def beside(found: Trained, target: Path, whole: bool) -> None:
    """Copies what lies beside the weights and isn't written yet: companions, the tokenizer, what the page needs to know."""
    for file in found.folder.iterdir():
        weights = file.name.startswith("model") and ".safetensors" in file.name
        if file.is_dir() and (file / adapters.CONFIG).is_file():
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
        elif file.is_file() and not weights and file.name not in UNKEPT and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)
    if whole and found.base:
        from huggingface_hub import snapshot_download

        try:
            original = Path(found.base)
            if not original.is_dir():
                original = Path(snapshot_download(found.base, allow_patterns=list(PROCESSOR)))
        except (OSError, ValueError):  # a hub that can't be reached: the weights are here, and the card says what is missing  # fmt: skip
            return
        for name in PROCESSOR:
            if (original / name).is_file() and not (target / name).exists():
                shutil.copy2(original / name, target / name)


def looks(found: Trained) -> tuple[Sampling, int] | None:
    """How clips were looked at in training, and the most pixels of an image; None where nothing says it."""
    told = found.meta.get("sampling")
    if told is None:
        return None
    sampling = build(Sampling, told, "sampling.")
    return sampling, found.meta.get("image_pixels") or sampling.pixels


def look_alike(target: Path, backbone: Backbone, seen: tuple[Sampling, int] | None) -> None:
    """Sets the processors that the base model's files describe to look at clips as training did."""
    if seen is None:
        return
    for part, settings in backbone.processor_sizes(*seen).items():
        for name in (KEPT[part], "processor_config.json"):
            told = _json(target / name)
            own = told.get(part) if name == "processor_config.json" else told
            if not own:
                continue
            for older in ("min_pixels", "max_pixels"):  # they would override the size
                own.pop(older, None)
            own |= settings
            (target / name).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def silent_text(backbone: Backbone, found: Trained) -> str:
    """An example of the exact prompt, before the silent answer or, where it knows nothing else, the written chain; "" for a
    model that only the engine can answer silently with."""
    pauses = tuple(found.meta["pauses"]) if found.meta.get("pauses") else None
    method = found.method
    dialect = found.meta.get("dialect", "chat")
    model = models.Model(backbone, "", pauses, models.PUBLISHED_SAMPLING, None, method, dialect=dialect)
    how: How = "silent" if method.silent else "explicit"
    try:
        return prompt(model, None, "Where is the ball at the end?", ["left", "middle", "right"], how=how).text
    except ValueError:
        return ""


def _summary(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"name": found["settings"]["name"], "mode": found["settings"]["mode"], **found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no benchmark's summary.json: {error}.") from None


def card(found: Trained, whole: bool, text: str, summaries: Sequence[Mapping[str, Any]]) -> str:
    """The model card, in Markdown: method, data, configuration, scores, the exact prompt."""
    method = dict(found.meta.get("method") or {})
    name = str(method.pop("name", ""))
    base = found.base if found.base and not Path(found.base).exists() else ""
    sees = sighted(found)
    task = "image-text-to-text" if sees else "text-generation"
    head = ["---", f"library_name: {'transformers' if whole else 'peft'}", f"pipeline_tag: {task}"]
    head += [f"base_model: {base}"] * bool(base) + ["tags: [latent-reasoning, chain-of-thought, sotto]", "---", ""]
    training = found.settings.get("training", {})
    origin = _public(found.base)
    title = Path(training.get("out") or "").name or found.meta.get("name") or name or "A model"
    lines = [
        *head,
        f"# {title}",
        "",
        (f"Trained with Sotto by the method `{name}`" if name else "Its folder doesn't name the method that trained it")
        + (f", from `{origin}`." if origin else "."),
        "",
        "## Method",
        "",
        *_listed(method),
        *([f"- pauses in training: {' to '.join(map(str, found.meta['pauses']))}"] if found.meta.get("pauses") else []),
        "",
        "## Data",
        "",
        *([f"- {kind}: `{json.dumps(_public(value))}`" for kind, value in found.data.items()] or ["Not recorded."]),
        "",
        "## Training",
        "",
        *(_listed(training) or ["Not recorded."]),
        *([f"- LoRA: `{json.dumps(found.settings['lora'])}`"] if "lora" in found.settings else []),
        "",
        "## Scores",
        "",
        *_scores(found.scores, summaries),
        "",
        "## Use",
        "",
        *_use(found, whole, text, "CLIP" if sees else "-"),
        "",
    ]
    return "\n".join(lines)


def sighted(found: Trained) -> bool:
    """Whether the model takes clips or images; one whose config can't be reached is taken to."""
    try:
        return family_of(found.base if found.adapter else found.folder).sighted
    except (OSError, ValueError):
        return True


def _listed(settings: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: `{json.dumps(_public(value))}`" for name, value in settings.items()]


def _public(value: Any) -> Any:
    """Settings as others may read them: of a path on this machine its last part alone."""
    if isinstance(value, dict):
        return {name: _public(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    return Path(value).name if isinstance(value, str) and value and _placed(value) else value


def _placed(value: str) -> bool:
    """Whether it is a path, or names a file that is there; words may be longer than any name."""
    try:
        return value.startswith((".", "/", "~")) or Path(value).exists()
    except OSError:
        return False


def _scores(own: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"- validation, {name}: {value:.4g}" for name, value in own.items() if isinstance(value, float)]
    if summaries:
        lines += [
            "",
            "| benchmark | answers | score (95 % interval) | questions | generated tokens |",
            "|---|---|---|---|---|",
        ]
    for each in summaries:
        low, high = each["interval"]
        score = f"{each['score']:.1%} ({low:.1%} to {high:.1%})"
        part = "" if each["complete"] else f" (shard {each['shard']})"
        lines.append(
            f"| {each['name']}{part} | {each['mode']} | {score} | {each['n']} | {each['generated_tokens']:.1f} |"
        )
    return lines or ["None were measured."]


def _use(found: Trained, whole: bool, text: str, clip: str) -> list[str]:
    """clip: what stands for one on the command line."""
    if not whole:
        base = _public(found.base)
        return [
            f"An adapter for `{base}`, with this folder's tokenizer: `python -m engine answer {clip} QUESTION --model {base} "
            f"--adapter FOLDER`. `python -m engine export FOLDER OUT --merge --base {base}` makes a plain checkpoint of it."
        ]
    own = [f"With Sotto: `python -m engine answer {clip} QUESTION --model FOLDER`, or `python app.py --model FOLDER`."]
    if not text:
        return [
            *own,
            "",
            f"Its slots are fed back, or read by modules of their own (`{COMPANIONS}`): it needs the engine.",
        ]
    return [
        *own,
        "",
        "With transformers' own `generate`, or vLLM: a plain checkpoint, whose answer is what greedy decoding writes "
        f"behind this prompt ({'here without a clip; ' * (clip != '-')}`python -m engine prompt {clip} QUESTION --model FOLDER` "
        f"gives that of another question). {SERVED}",
        *_looked(looks(found) if clip != "-" else None),
        "",
        "```text",
        text,
        "```",
    ]


def _looked(seen: tuple[Sampling, int] | None) -> list[str]:
    if seen is None:
        return []
    sampling, image_pixels = seen
    rate = f"{sampling.fps:g} frames a second" if sampling.fps else "frames spread evenly"
    return [
        "",
        f"In training clips were looked at as {rate}, {sampling.min_frames} to {sampling.max_frames} of them, with at most "
        f"{sampling.pixels:,} pixels a frame, and images with at most {image_pixels:,}; a family that cuts tiles has sizes of its "
        "own instead. A server whose processor takes other frames or sizes shows the model something else.",
    ]


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Uploads the folder to the Hub -> its address. Errors: ValueError with one sentence, offline or not let in."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        name = hub.create_repo(repository, private=private, exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=str(folder))
    except (OSError, ValueError) as error:  # the Hub's own errors are of these kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder} is written, but {repository} on the Hub couldn't be reached or written to ({reason}): log in with "
            "`hf auth login`, or push the folder later."
        ) from None
    return f"https://huggingface.co/{name}"
