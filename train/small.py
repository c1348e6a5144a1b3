"""Retrains every shipped small model and holds the new scores against the shipped cards.

The pause model and its controls start from assets/start, which can look up an option's letter and see what happens in a clip,
and knows nothing else; the other methods' models from the pause model, which writes its chain and knows the silent answers.

    python -m train.small --out runs            # some hours on two CPU cores; goes on where it stopped
    python -m train.small --anew                # makes the start too, from random weights
    python -m train.small --processes 1         # on one
    python -m train.small --device cuda         # all models side by side on one GPU, in minutes
    python -m train.small --check               # scores the shipped weights again, a few minutes

Exit code 1 if a model scores below the lower end of its shipped 95 % interval.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.benchmark import Benchmark, measure, shipped
from engine.config import read_yaml

CONFIGS = Path(__file__).parent / "configs" / "small"
STAGES = ("short", "silent", "sums", "tally", "pause", "polish", "decoder", "digits", "settle")
WORDS_ALONE = "sums"  # the stage that every model goes through as it stands: no clips, no slots
SHORTER = ("short", "silent", "polish")  # the controls', in which they learn all that they will: a third of the samples
MODELS = {  # model -> its script and its stages
    "pause": ("pause", STAGES),
    "explicit": ("explicit", SHORTER),
    "answer-only": ("silent", SHORTER),
    "filler": ("silent", SHORTER),
}
METHODS = {  # model, and its script -> its presets, one after another, and where in the last one's run the last of its stages lies
    "coconut": (("coconut",), ""),
    "codi": (("codi_projector", "codi"), ""),
    "heima": (("heima",), "interpreters"),
}
ASSETS = Path(__file__).parent.parent / "assets"
START = ASSETS / "start"
EXPECTED = ASSETS / "small" / "scores.json"
PAUSE = EXPECTED.with_name("pause")
SPLITS = ("test", "longer")


@dataclass(frozen=True)
class Workshop:
    """Where small models are trained, and how."""

    out: Path
    device: str
    precision: str
    processes: int  # that learn one model on a CPU

    def own(self, start: Path, to: Path) -> list[str]:
        """What every run is told beside its preset; one that was begun is gone on with."""
        places = ["--init", str(start), "--out", str(to), "--resume"]
        return [*places, "--device", self.device, "--precision", self.precision]

    def learn(self, script: str, stage: str, start: Path, to: Path, *more: str | Path) -> None:
        """One stage, gone on with if it was begun. Its batch is divided among the processes; on a CPU each one's into passes of one
        length, so that it is padded less. more: further files, then further words of the command line."""
        many = 1 if self.device == "cuda" else self.processes
        shared = read_yaml(CONFIGS / f"{stage}.yaml")["training"]
        passes = 1 if self.device == "cuda" else shared["accumulate"] // many
        words = ["--config", str(CONFIGS / f"{stage}.yaml"), *map(str, more), *self.own(start, to)]
        words += [f"--batch={shared['batch'] // many}", f"--accumulate={passes}"]
        words += ["--workers=3"] if self.device == "cuda" else []
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(many), "-m"] if many > 1 else []
        python(*launcher, f"train.{script}", *words, threads=1)

    def stages(self, script: str, name: str, start: Path, stages: Sequence[str], *more: str | Path) -> Path:
        """One stage after another, all alike but for the words that stand alone -> the last one's folder."""
        for stage in stages:
            to = self.out / name / stage
            if stage == WORDS_ALONE:
                self.learn("explicit", stage, start, to)
            else:
                self.learn(script, stage, start, to, *more)
            start = to / "best"
        return to

    def presets(self, name: str) -> Path:
        """A method's runs as its presets say, a thread on a CPU -> the folder of the last stage."""
        presets, last = METHODS[name]
        start = PAUSE
        for preset in presets:
            to = self.out / preset.replace("_", "-")
            python(f"train.{name}", "--config", str(CONFIGS / f"{preset}.yaml"), *self.own(start, to), threads=1)
            start = to / "best"
        return to / last

    def side_by_side(self, work: Callable[[str], Path], names: Sequence[str], on_cpu: int = 1) -> list[Path]:
        """`work` for each name, on a CPU so many at once. A GPU is kept busy by none of them, since their kernels are over
        before the next can be launched: there all at once."""
        with ThreadPoolExecutor(max(1, len(names)) if self.device == "cuda" else on_cpu) as pool:
            return list(pool.map(work, names))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What this script and train.baselines take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--write", action="store_true", help="keep the scores, beside the shipped models")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument(
        "--precision",
        choices=("bf16", "no"),
        default="bf16",
        help="no: float32, several times as fast on a CPU without bfloat16 arithmetic (lscpu tells: avx512_bf16, amx_bf16)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        choices=(1, 2),
        help="that learn on a CPU, a thread each: one model together, twice as fast as one with two threads, or one model each",
    )
    return parser


def workshop(options: argparse.Namespace) -> Workshop:
    return Workshop(options.out.resolve(), options.device, options.precision, options.processes)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=(*MODELS, *METHODS), help="which (default: all; of --check, those that ship)"
    )
    parser.add_argument("--check", action="store_true", help="score what is shipped, without training")
    parser.add_argument("--anew", action="store_true", help="make what they start from too")
    options = parser.parse_args()
    every = [*MODELS, *METHODS]
    models = options.models or [name for name in every if name in shipped() or not options.check]
    if options.check and (missing := [name for name in models if name not in shipped()]):
        print(f"{missing[0]} isn't shipped: there is nothing to score.", file=sys.stderr)
        return 2
    if not options.check:
        at = workshop(options)
        retrain(at, models, anew(at.out) if options.anew else START)
    figures = {split: measure(Benchmark(split), models, None, "cpu", print)["methods"] for split in SPLITS}
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {split: {} for split in SPLITS}
    if options.write:
        kept = {split: expected[split] | methods for split, methods in figures.items()}
        EXPECTED.write_text(json.dumps(kept, indent=1) + "\n")
        return 0
    worse = 0
    for split, methods in figures.items():
        for name, found in methods.items():
            if name not in expected[split]:
                print(f"{split} {name}: {found['accuracy']:.3f}; --write keeps it for later checks")
                continue
            floor = expected[split][name]["interval"][0]
            ok = found["accuracy"] >= floor
            worse += not ok
            print(f"{split} {name}: {found['accuracy']:.3f}, shipped {expected[split][name]['accuracy']:.3f}, at least {floor:.3f}: {'ok' if ok else 'WORSE'}")  # fmt: skip
    return 1 if worse else 0


def python(*words: str, threads: int | None = None) -> None:
    """Runs a module where the project lies, since configurations name what they start from as seen from there."""
    bound = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", *words], check=True, cwd=ASSETS.parent, env=os.environ | bound)


def anew(out: Path) -> Path:
    """What every model starts from, made from random weights on the CPU -> its folder."""
    if not (out / "fresh").exists():
        python("train.fresh", str(out / "fresh"))
    lookup = CONFIGS / "lookup.yaml"
    python("train.lookup", "--config", str(lookup), "--init", str(out / "fresh"), "--out", str(out / "lookup"), "--resume", "--device", "cpu")  # fmt: skip
    if not (out / "start").exists():
        python("train.perceive", str(out / "lookup" / "best"), str(out / "start"))
    return out / "start"


def retrain(at: Workshop, models: Sequence[str], start: Path) -> None:
    """Runs what isn't finished, and publishes it over assets/small."""

    def trained(name: str) -> Path:
        """A control goes through its stages' clips and steps with its own objective."""
        script, stages = MODELS[name]
        control = [] if name == "pause" else [CONFIGS / f"{name.replace('-', '_')}.yaml"]
        return at.stages(script, name, start, stages, *control)

    staged = [name for name in models if name in MODELS]
    for name, run in zip(staged, at.side_by_side(trained, staged), strict=True):
        python("train.publish", str(run), str(EXPECTED.parent / name))
    if "pause" in models:
        python("train.lens", str(PAUSE))
    others = [name for name in models if name in METHODS]  # from the pause model as it is now
    for name, run in zip(others, at.side_by_side(at.presets, others, at.processes), strict=True):
        python("train.publish", str(run), str(EXPECTED.parent / name))


if __name__ == "__main__":
    sys.exit(main())
