"""A Space on ZeroGPU: the answering function borrows a GPU, its weights and its sentences come through."""

import json
import subprocess
import sys

import pytest
import torch

from engine import models
from engine.ask import ask
from engine.video import read
from tests.serve import ROOT
from tests.zero import OPTIONS, QUESTION

CLIP = ROOT / "assets" / "examples" / "cups-3-2.mp4"


@pytest.mark.skipif(torch.version.cuda is not None, reason="spaces would look for its GPU")
def test_the_page_answers_on_zerogpu_as_elsewhere():
    """Weights that an adapter is merged into, another model from the same process, and an error's sentence."""
    command = [sys.executable, "-m", "tests.zero", str(models.SMALL / "heima"), str(CLIP)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["device"].startswith("cuda")
    assert told["refused"] == "1 option: give none, or 2 to 26."
    assert told["scheduler"].count("/allow") == 1  # one process serves both models
    assert told["scheduler"].count("/schedule") == 3
    for (name, answer, thoughts), place in zip(told["replies"], (models.SMALL / "heima", models.EMBEDDED)):
        model = models.load(place, device="cpu")
        own = ask(model, read(CLIP, model.sampling), QUESTION, OPTIONS, 8, write_chain=False)
        assert (name, answer, thoughts) == (model.name, own.answer, own.thoughts)
