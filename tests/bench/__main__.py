"""`python -m tests.bench [NAME ...] --json`: a list of {name, size, ours, other, ratio (= other / ours), limit, unit}.

Messages, a line as soon as a figure is there, go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> int:
    import torch

    from tests.bench import answer, data, generate, gpu, interventions, loop, packed, video

    benches = {
        "packed": packed.bench, "loop": loop.bench, "generate": generate.bench, "answer": answer.bench,
        "interventions": interventions.bench, "video": video.bench, "data": data.bench,
        "gpu": gpu.bench,
    }  # fmt: skip
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", default=[], help=f"among {', '.join(benches)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON (the default, and the only form)")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in benches]
    if unknown:
        print(f"There is no benchmark {unknown[0]!r}: choose among {', '.join(benches)}.", file=sys.stderr)
        return 2
    names = options.names or list(benches)
    if "gpu" in names and not torch.cuda.is_available():
        print("The benchmark gpu needs a CUDA GPU with 80 GB, and there is none.", file=sys.stderr)
        if options.names:
            return 2
        names.remove("gpu")
    rows = []
    for row in (row for name in names for row in benches[name]()):
        print(f"{row['name']}, {row['size']}: {row['ours']:.3g} / {row['other']:.3g} {row['unit']}", file=sys.stderr)
        rows.append(row)
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
