"""The lowest versions that requirements.txt allows, in an environment of their own: installs them there and runs a part of the
tests that touches every library.

python -m tests.pins FOLDER                         # a new folder, or one that an earlier call has made
python -m tests.pins FOLDER --instead torch==2.13.0 # where the lowest of one can't be had: PyPI's torch for Linux wants CUDA

The other end is the ordinary test run: requirements.txt installs the highest versions.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
RUNNERS = ("pytest>=8", "pytest-timeout>=2.3")
# torch, transformers, safetensors; peft; av, cv2, decord; plotly; scikit-learn; accelerate, tensorboard, tqdm; pyyaml; gradio, psutil
PART = (
    "test_backbone_qwen.py", "test_weights.py", "test_video.py", "test_sandbox.py", "test_insight.py", "test_insight_measures.py",
    "test_insight_study.py", "test_training.py", "test_config.py", "test_served.py",
)  # fmt: skip


def required(instead: Sequence[str] = ()) -> list[Requirement]:
    """What requirements.txt asks for on this machine, but for those named in `instead`, which come in their place."""
    written = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in written if line.strip() and not line.startswith("#")]
    changed = [Requirement(each) for each in instead]
    kept = [each for each in found if each.name not in {other.name for other in changed}]
    return [each for each in kept + changed if each.marker is None or each.marker.evaluate()]


def lowest(wanted: Requirement, offered: Sequence[str]) -> str:
    """The requirement for the lowest version of those offered that will do. Errors: ValueError if none will."""
    fitting = [version for version in map(Version, offered) if wanted.specifier.contains(version, prereleases=False)]
    if not fitting:
        raise ValueError(f"Of {wanted.name}, {wanted.specifier} can't be had here: name another by --instead.")
    return f"{wanted.name}=={min(fitting)}"


def offered(python: Path, name: str) -> list[str]:
    """Versions of a package that the index has for this machine."""
    told = subprocess.run(
        [python, "-m", "pip", "index", "versions", name], capture_output=True, text=True, check=True
    ).stdout
    (versions,) = re.findall(r"^Available versions: (.*)$", told, re.MULTILINE)
    return versions.split(", ")


def main() -> int:
    known = argparse.ArgumentParser(prog="python -m tests.pins", description=__doc__)
    known.add_argument("folder", type=Path, help="for the environment; some gigabytes")
    known.add_argument("--instead", nargs="+", default=[], help="requirements in the place of the file's")
    known.add_argument("--tests", nargs="+", default=PART, help="files of tests/ to run")
    options = known.parse_args()
    python = options.folder.absolute() / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", options.folder], check=True)
    try:
        pins = [lowest(each, offered(python, each.name)) for each in required(options.instead)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(pins), flush=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, *RUNNERS], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    files = [f"tests/{name}" for name in options.tests]
    own = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([python, "-m", "pytest", *files], cwd=ROOT, env=own).returncode


if __name__ == "__main__":
    sys.exit(main())
