"""A short run of tests/two.py: two processes learn what one does, and a kill changes nothing."""

import json
import subprocess
import sys

from tests.serve import ROOT


def test_two_processes_killed_and_resumed_have_the_losses_of_one() -> None:
    """In a process of its own, because forks don't inherit the threads that other tests have started."""
    command = [sys.executable, "-m", "tests.two", "--cases", "coconut", "interpreters", "lora"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout)
    assert set(told) == {"coconut-ddp", "coconut-fsdp2", "interpreters-ddp", "interpreters-fsdp2", "lora-fsdp2"}
    for out, found in told.items():
        assert found["loss"] < 1e-5
        assert found["best"] < 1e-3
        assert found["told"] == 1
        parts = {"__0_0.distcp", "__1_0.distcp"}  # each process's own
        assert (parts <= set(found["files"])) == out.endswith("fsdp2")
