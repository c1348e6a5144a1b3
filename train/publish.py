"""Turns a finished run into a shipped model: weights in bf16, what the page needs to know, a model card with its scores.

python -m train.publish runs/pause/settle assets/small/pause
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file, save_model
from torch import nn

from engine import adapters, models
from engine.backbones.base import Backbone
from engine.backbones.load import load
from engine.benchmark import Benchmark
from engine.data.worlds import WITHOUT_CLIP, WorldsSource, frames
from engine.evaluation import How, evaluate, summary
from engine.familiarity import Asked, Familiarity, fit
from engine.folders import SETTINGS, as_a_whole, fingerprint
from engine.methods import from_description
from engine.methods.method import COMPANIONS, META

HISTORY = "history.json"  # beside a published model: the stages that it went through
Stage = tuple[dict, int, float]  # a run's settings, the samples that it saw, the seconds that they took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder, with best/ and settings.json in it")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--clips", type=int, default=504, help="test clips for the card's scores")
    options = parser.parse_args()
    try:
        publish(options.run, options.out, options.clips)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def publish(run: Path, out: Path, clips: int) -> None:
    """An old model stays until the new one is whole, and leaves nothing beside it, such as a tuned lens of other weights.
    Errors: ValueError, see `fill`."""
    with as_a_whole(out) as made:
        fill(run, made, out.name)
        describe(run, made, out.name, clips)


def fill(run: Path, made: Path, name: str) -> None:
    """Writes a run's best model into the folder `made`: whole, or as an adapter that names the model beside which it lies.
    Errors: ValueError where it doesn't lie beside it."""
    settings = json.loads((run / SETTINGS).read_text())
    method, training, best = from_description(settings["method"]), settings["training"], run / "best"
    lora = settings.get("lora")
    own = not method.frozen  # the run's model is its own, or that of the run before, which it only looked at
    base = Path(best if own and not lora else training["init"])
    adapter = best if own and lora else Path(training["adapter"]) if not own and training.get("adapter") else None
    if adapter and base.resolve().parent != made.resolve().parent:
        raise ValueError(f"{run} has an adapter, which ships beside its model: publish into {base.parent}.")
    backbone = load(base, tokens=method.tokens)
    companions = method.companions(backbone)
    adapters.load_companions(best, companions)
    if adapter:
        keep_adapter(adapter, made, f"../{base.name}")
        backbone.tokenizer.save_pretrained(made)
    else:
        backbone.model.bfloat16()
        backbone.save(made)
    adapted = [name for name in companions if (best / name / adapters.CONFIG).is_file()]
    for companion in adapted:
        keep_adapter(best / companion, made / companion)
    if whole := nn.ModuleDict({name: module for name, module in companions.items() if name not in adapted}):
        save_model(whole.bfloat16(), str(made / COMPANIONS))
    meta: dict[str, Any] = {
        "name": f"small {name}",
        "method": settings["method"],
        "pauses": list(method.slot_range) if method.silent else None,
        **WorldsSource().looks,
    }
    if adapter:
        meta["base"] = fingerprint(base)
    (made / META).write_text(json.dumps(meta, indent=1) + "\n")


def bounds(backbone: Backbone, known: int = 1800, held_out: int = 600) -> Familiarity:
    """What the model knows of the worlds: fitted on so many clips of training, limited by so many of validation."""
    source, other = WorldsSource(), WorldsSource(split="validation")
    taught = (source.record(i) for i in range(known))
    asked = ((Asked(record.question, record.options), frames(record)) for record in taught)
    return fit(backbone, asked, (frames(other.record(i)) for i in range(held_out)))


def describe(run: Path, made: Path, name: str, clips: int) -> None:
    """Writes what is told of the model in the folder `made`: its bounds, its history, its card with its scores."""
    model = models.load(made, device="cpu")  # the shipped weights
    backbone, method = model.backbone, model.method
    lora = json.loads((run / SETTINGS).read_text()).get("lora")
    if len(model.folders) == 1 or (lora and lora["vision"]):  # any other adapter changes nothing in what its model sees
        bounds(backbone).save(made)

    scores = {}
    for split in ("test", "longer"):
        benchmark = Benchmark(split, limit=clips)
        records = benchmark.records()
        samples = benchmark.samples(records)
        how: How = "silent" if method.silent else "explicit"
        results = evaluate(backbone, samples, method, how, method.trained_slots, model.companions, speak=True)
        scores[split] = summary(results, [r.family for r in records], [r.difficulty for r in records])
    stages = lineage(run)
    (made / HISTORY).write_text(json.dumps(stages, indent=1) + "\n")
    (made / "README.md").write_text(card(name, stages, scores, sum(p.numel() for p in backbone.model.parameters())))


def keep_adapter(place: Path, to: Path, base: str = "") -> None:
    """An adapter's files in bf16. base: the model that it is for."""
    to.mkdir(parents=True, exist_ok=True)
    told = json.loads((place / adapters.CONFIG).read_text()) | {"base_model_name_or_path": base}
    (to / adapters.CONFIG).write_text(json.dumps(told, indent=1) + "\n")
    save_file(
        {name: tensor.bfloat16() for name, tensor in load_file(place / adapters.WEIGHTS).items()}, to / adapters.WEIGHTS
    )


def lineage(run: Path) -> list[Stage]:
    """The run and those that it was started from, first to last; what a published model tells of itself stands for those
    before it."""
    stages: list[Stage] = []
    while (run / SETTINGS).is_file():
        settings = json.loads((run / SETTINGS).read_text())
        start = Path(settings["training"].get("adapter") or settings["training"]["init"])
        places = {name: nearby(settings["training"].get(name, "")) for name in ("init", "adapter", "out")}
        settings["training"] |= places
        stages.insert(0, (settings, *seen(run, settings)))
        if (start / HISTORY).is_file():
            return [*map(tuple, json.loads((start / HISTORY).read_text())), *stages]
        run = start.parent
    return stages


def nearby(path: str) -> str:
    """As seen from here, where it lies below: a published card names no folder of the machine that it was made on."""
    place = Path(path)
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else path


def seen(run: Path, settings: dict) -> tuple[int, float]:
    """Samples that a run has seen, and the seconds that they took, by the rate in its log's last line."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if "samples_per_second" in line][-1]
    samples = last["step"] * settings["training"]["batch"] * settings["processes"]
    return samples, samples / last["samples_per_second"]


def seconds(run: Path) -> float:
    """Training time of one run."""
    return seen(run, json.loads((run / SETTINGS).read_text()))[1]


def card(name: str, stages: list[Stage], scores: dict, parameters: int) -> str:
    settings = stages[-1][0]
    history = "\n".join(stage(*each) for each in stages)
    minutes = sum(seconds for _, _, seconds in stages) / 60
    used = dict.fromkeys(f"{each['processes']} on {each['hardware']}" for each, _, _ in stages)
    rows = []
    for split, figures in scores.items():
        low, high = figures["interval"]
        families = ", ".join(f"{f} {v['accuracy']:.1%}" for f, v in figures["by_family"].items())
        rows.append(f"| {split} | {figures['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {families} | {figures['generated_tokens']:.1f} | {figures['n']} |")  # fmt: skip
    return f"""---
license: apache-2.0
pipeline_tag: video-text-to-text
---

# Sotto small: {name}

A small Qwen2.5-VL (the real class, {parameters / 1e6:.1f} M parameters) trained from scratch on Sotto's three procedural worlds. It
knows these worlds and nothing else.

- Method: {json.dumps(settings["method"])}
- Start: `{stages[0][0]["training"]["init"]}`, which `train.lookup` and `train.perceive` made from random weights
- Data: `engine.worlds`, training split; {sum(clips for _, clips, _ in stages):,} samples in all, about {minutes:.0f} minutes of training (processes: {", ".join(used)}), stage by stage:
{history}

| split | accuracy (95 % interval) | by family | generated tokens | clips |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def stage(settings: dict, clips: int, seconds: float) -> str:
    training, worlds = settings["training"], settings["WorldsSource"]
    low, high = worlds["difficulties"]
    shown = "rows of text" if worlds["corrupt"] in WITHOUT_CLIP else "clips"
    precision = "float32" if training["precision"] == "no" else training["precision"]
    part = f"LoRA of rank {settings['lora']['r']}, " if "lora" in settings else ""
    if training.get("frozen"):  # which an older run's settings don't name
        part = "its companions alone, "
    rate = f"{part}{training['optimizer']} at {training['lr']}, {training['schedule']}, {precision}"
    return f"  - {Path(training['out']).name}: {clips:,} {shown} of {low} to {high} steps ({', '.join(dict.fromkeys(worlds['families']))}), {rate}, seed {worlds['seed']}, {seconds / 60:.0f} minutes"  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
