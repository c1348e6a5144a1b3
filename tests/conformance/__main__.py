"""`python -m tests.conformance FOLDER ...`: a line a quantity (name, expected, got, ok), exit code 1 on any miss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.conformance import coconut, codi, heima, multimodal, pause
from tests.conformance.quantities import unchecked

CHECKS = {  # the `method` key of config.json -> its check
    "implicit-video-reasoning": pause.check,
    "coconut": coconut.check,
    "multimodal-coconut": multimodal.check,
    "sim-cot-coconut": coconut.check,
    "codi": codi.check,
    "heima": heima.check,
}


def report(folder: Path) -> bool:
    """Prints every quantity of one folder. Errors: ValueError with one sentence for a folder that can't be checked."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: name a folder of golden numbers.")
    try:
        method = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("method")
        quantities = CHECKS[method](folder) if method in CHECKS else []
    except Exception as error:  # whatever a strange folder may bring about; the next one is still to be checked
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder} can't be checked: is it of the form of tests/golden? {reason}") from error
    if method not in CHECKS:
        raise ValueError(f"{folder} holds numbers of the method {method!r}; supported: {', '.join(CHECKS)}.")
    if method != "implicit-video-reasoning" and (folder / "expected_independent.json").exists():
        quantities.append(unchecked("expected_independent.json"))
    for q in quantities:
        print(f"{q.name}  {q.expected}  {q.got}  {'ok' if q.ok else 'MISS'}")
    missed = sum(not q.ok for q in quantities)
    worst = max((q for q in quantities if q.ok), key=lambda q: q.used, default=None)
    closest = f"; of the hits, {worst.name} came closest to its tolerance ({worst.used:.1%})" if worst else ""
    print(f"{folder}: {len(quantities)} quantities, {missed} missed{closest}")
    return bool(quantities) and not missed


def main(folders: list[str]) -> int:
    if not folders:
        print("usage: python -m tests.conformance FOLDER ...", file=sys.stderr)
        return 1
    good = True
    for folder in folders:
        try:
            good &= report(Path(folder))
        except ValueError as error:
            print(error, file=sys.stderr)
            good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
