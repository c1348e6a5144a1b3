"""A short run of tests/kill.py: a training run that is killed loses nothing beyond its last save."""

import json
import subprocess
import sys

from tests.serve import ROOT


def test_nothing_is_lost_beyond_the_last_save() -> None:
    """In a process of its own, because forks don't inherit the threads that other tests have started."""
    run = subprocess.run([sys.executable, "-m", "tests.kill", "--kills", "4"], cwd=ROOT, capture_output=True, text=True)
    told = json.loads(run.stdout)
    assert told["faults"] == []
    assert told["kills"] == 4
    assert told["steps_lost_beyond_the_last_save"] == 0
    assert run.returncode == 0
