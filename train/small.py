"""Retrains every shipped small model and holds the new scores against the shipped cards.

All start from assets/start, which can look up an option's letter and see what happens in a clip, and knows nothing else.

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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.benchmark import Benchmark, measure
from engine.config import read_yaml

CONFIGS = Path(__file__).parent / "configs" / "small"
STAGES = ("short", "silent", "sums", "tally", "pause", "polish")
WORDS_ALONE = "sums"  # the stage that every model goes through as it stands: no clips, no slots
MODELS = {  # model -> its script, and the stage after which it is shipped
    "pause": ("pause", "polish"),
    "explicit": ("explicit", "silent"),
    "answer-only": ("silent", "silent"),
    "filler": ("silent", "silent"),
}
ASSETS = Path(__file__).parent.parent / "assets"
START = ASSETS / "start"
EXPECTED = ASSETS / "small" / "scores.json"
SPLITS = ("test", "longer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="which of them (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--check", action="store_true", help="score what is shipped, without training")
    parser.add_argument("--write", action="store_true", help="write the scores that later checks are held against")
    parser.add_argument("--anew", action="store_true", help="make what they start from too")
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
        help="that learn one model on a CPU, a thread each: on small matrices, twice as fast as one with two",
    )
    options = parser.parse_args()
    if not options.check:
        start = anew(options.out) if options.anew else START
        retrain(options.models, options.out, start, options.device, options.processes, options.precision)
    figures = {split: measure(Benchmark(split), options.models, None, "cpu", print)["methods"] for split in SPLITS}
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {split: {} for split in SPLITS}
    if options.write:
        kept = {split: expected[split] | methods for split, methods in figures.items()}
        EXPECTED.write_text(json.dumps(kept, indent=1) + "\n")
        return 0
    worse = 0
    for split, methods in figures.items():
        for name, found in methods.items():
            floor = expected[split][name]["interval"][0]
            ok = found["accuracy"] >= floor
            worse += not ok
            print(f"{split} {name}: {found['accuracy']:.3f}, shipped {expected[split][name]['accuracy']:.3f}, at least {floor:.3f}: {'ok' if ok else 'WORSE'}")  # fmt: skip
    return 1 if worse else 0


def python(*words: str) -> None:
    subprocess.run([sys.executable, "-m", *words], check=True)


def anew(out: Path) -> Path:
    """What every model starts from, made from random weights on the CPU -> its folder."""
    if not (out / "fresh").exists():
        python("train.fresh", str(out / "fresh"))
    lookup = CONFIGS / "lookup.yaml"
    python("train.lookup", "--config", str(lookup), "--init", str(out / "fresh"), "--out", str(out / "lookup"), "--resume", "--device", "cpu")  # fmt: skip
    if not (out / "start").exists():
        python("train.perceive", str(out / "lookup" / "best"), str(out / "start"))
    return out / "start"


def retrain(models: Sequence[str], out: Path, beginning: Path, device: str, processes: int, precision: str) -> None:
    """Runs what isn't finished, in order, and publishes it over assets/small.

    On a CPU one model after another. A GPU is kept busy by none of them, since their kernels are over before the next can be
    launched: there they learn side by side, in one process each.
    """
    processes = 1 if device == "cuda" else processes
    where = ["--device", device, "--precision", precision]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    together = (
        ("torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m") if processes > 1 else ()
    )

    def learn(script: str, stage: str, start: Path, to: Path, *control: Path) -> None:
        """The stage's batch, divided among the processes; on a CPU each one's in passes of one length, so that it is padded less."""
        files = [CONFIGS / f"{stage}.yaml", *control]
        shared = read_yaml(files[0])["training"]
        passes = 1 if device == "cuda" else shared["accumulate"] // processes
        each = [f"--batch={shared['batch'] // processes}", f"--accumulate={passes}"]
        each += ["--workers=3"] if device == "cuda" else []
        words = ["--config", *map(str, files), "--init", str(start), "--out", str(to), "--resume", *where]
        subprocess.run([sys.executable, "-m", *together, f"train.{script}", *words, *each], check=True, env=one_thread)

    def staged(name: str) -> None:
        """One stage after another; a control goes through the same clips and steps with its own objective."""
        start, (script, last) = beginning, MODELS[name]
        control = [] if name == "pause" else [CONFIGS / f"{name.replace('-', '_')}.yaml"]
        for stage in STAGES[: STAGES.index(last) + 1]:
            if stage == WORDS_ALONE:
                learn("explicit", stage, start, out / name / stage)
            else:
                learn(script, stage, start, out / name / stage, *control)
            start = out / name / stage / "best"

    with ThreadPoolExecutor(len(models) if device == "cuda" else 1) as pool:
        for learnt in [pool.submit(staged, name) for name in models]:
            learnt.result()
    for name in models:
        python("train.publish", str(out / name / MODELS[name][1]), str(EXPECTED.parent / name))


if __name__ == "__main__":
    sys.exit(main())
