"""The page's answering function under spaces' own ZeroGPU: its stand-in for CUDA, its processes, weights packed and fetched.

python -m tests.zero FOLDER CLIP    # needs spaces, and a torch without CUDA

Of the machine alone there are substitutes: a scheduler that lends at once, and a "GPU" that is the CPU. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, ClassVar

import torch

LENT = {"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "none", "allowToken": "token"}
QUESTION, OPTIONS = "Where is the ball at the end?", ["left", "middle", "right"]


class Scheduler(BaseHTTPRequestHandler):
    """Whatever is asked of it is granted."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.asked.append(self.path.partition("?")[0])
        body = json.dumps(LENT).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def fetch() -> None:
    """What spaces does when a process gets its GPU, but to the CPU: every weight's values come back from the disk."""
    from spaces.zero.torch.patching import tensor_packs

    for pack in tensor_packs:
        with open(pack.path(), "rb") as held:
            for meta, _, size in chain(*pack.batches, pack.big_tensors):
                stored = torch.frombuffer(bytearray(held.read(size)), dtype=meta.dtype, count=meta.numel())
                real = stored.as_strided(meta.shape, meta.stride()).clone(memory_format=torch.preserve_format)
                for weight in pack.fakes[meta]:
                    weight.data = real


def move(callback: Any = None) -> None:
    """In a thread, as spaces does it: OpenMP's threads don't outlive a fork."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fetch).result()


def pretend(folder: Path) -> None:
    """Environment and torch as on ZeroGPU, before spaces is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scheduler)
    Thread(target=server.serve_forever, daemon=True).start()
    (folder / "cgroup").write_text("0::/kubepods/pod/container\n")
    os.environ |= {
        "SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{server.server_port}",
        "ZEROGPU_PROC_SELF_CGROUP_PATH": str(folder / "cgroup"), "ZEROGPU_OFFLOAD_DIR": str(folder / "weights"),
    }  # fmt: skip
    torch.version.cuda, torch._C._cuda_init, torch.cuda._is_in_bad_fork = "12.8", lambda: None, bool


def main() -> None:
    model, clip = sys.argv[1:]
    with TemporaryDirectory() as made:
        pretend(Path(made))
        import spaces.zero as zero

        import app
        from engine import models
        from engine.video import read

        zero.torch.init, zero.torch.move = (lambda _: None), move
        page = app.Page(models.load(model), [models.load()])
        device = str(page.model.backbone.device)
        zero.startup()  # when the page is launched
        (other,) = page.others
        given = clip, QUESTION, "\n".join(OPTIONS), 8, False
        replies = [item[0] for item in page.stages(*given, None, other) if isinstance(item, tuple)]
        wrong = page.thinking(other, read(clip, page.model.sampling), "Where?", OPTIONS[:1], 8, False)
        (refused,) = [item for item in wrong if not isinstance(item, str)]
        told = [[each.settings["model"], each.answer, each.thoughts] for each in replies]
        print(json.dumps({"device": device, "replies": told, "refused": str(refused), "scheduler": Scheduler.asked}))


if __name__ == "__main__":
    main()
