"""The engine gives the published code's numbers; and the check says so when it doesn't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conformance.__main__ import main

GOLDEN = Path(__file__).parent / "golden" / "A"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy with its image alone, under another name, to be tampered with."""
    copy = tmp_path / "numbers"
    shutil.copytree(GOLDEN, copy)
    change(copy, "inputs.json", lambda d: d.update(samples=[s for s in d["samples"] if s["name"] == "image-N5"]))
    for stem in ("expected", "expected_independent"):
        change(copy, f"{stem}.json", lambda d: d["samples"].pop("longvideo-N8"))
        arrays = load_file(copy / f"{stem}.safetensors")
        save_file({k: v for k, v in arrays.items() if k.startswith("image-N5.")}, copy / f"{stem}.safetensors")
    return copy


def change(folder: Path, name: str, edit: Callable[[dict], None]) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def change_array(folder: Path, name: str, key: str, edit: Callable[[Tensor], Tensor]) -> None:
    arrays = load_file(folder / name)
    arrays[key] = edit(arrays[key])
    save_file(arrays, folder / name)


def missed(capsys: pytest.CaptureFixture) -> list[str]:
    """Names of the missed quantities."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split("  ")[0] for line in lines if line.endswith("MISS")]


def test_published_numbers(capsys: pytest.CaptureFixture) -> None:
    assert main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("  ok") for line in lines) == len(lines) - 1 > 200
    assert "0 missed" in lines[-1]


def test_a_wrong_number_of_each_kind_is_a_miss(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def spoil(d: dict) -> None:
        sample = d["samples"]["image-N5"]
        sample["kd"] += 1e-4
        sample["kd_positions_teacher"][0] -= 1
        sample["grad_norms"]["lm_head.weight"] *= 1.0005
        sample["surprise"] = 1.0

    change(folder, "expected.json", spoil)
    change(folder, "inputs.json", lambda d: d["samples"][0]["labels"]["answer"].__setitem__(-1, -100))
    change(
        folder, "expected_independent.json", lambda d: d["samples"]["image-N5"]["decoder_with_mrope"].update(total=17.0)
    )
    spoiled = "decoder_visible", "teacher.kd_hidden", "decoder.position_ids_mrope", "answer.logits_from_prompt_end"
    change_array(folder, "expected.safetensors", "image-N5.decoder_visible", lambda x: torch.ones_like(x))
    for key in spoiled[1:]:
        amount = 1 if "position" in key else 1e-3
        change_array(folder, "expected.safetensors", f"image-N5.{key}", lambda x, by=amount: x + by)
    assert main([str(folder)]) == 1
    names = "answer.labels", "kd", "kd_positions_teacher", "grad_norms.lm_head.weight", "surprise"
    expected = [f"image-N5.{name}" for name in (*names, *spoiled, "decoder_with_mrope.total")]
    assert sorted(missed(capsys)) == sorted(expected)


def test_other_weights_miss(folder: Path, capsys: pytest.CaptureFixture) -> None:
    change_array(folder, "weights.safetensors", "model.visual.merger.mlp.2.bias", lambda x: x + 0.01)
    assert main([str(folder)]) == 1
    assert {"image-N5.ce_teacher", "image-N5.kd", "batch.total"} <= set(missed(capsys))


def test_weights_are_loaded_strictly(folder: Path) -> None:
    arrays = load_file(folder / "weights.safetensors")
    arrays.pop("model.visual.merger.mlp.2.bias")
    save_file(arrays, folder / "weights.safetensors")
    with pytest.raises(RuntimeError, match=r"merger\.mlp\.2\.bias"):
        main([str(folder)])


def test_unsupported_method_names_the_supported_ones(folder: Path, capsys: pytest.CaptureFixture) -> None:
    change(folder, "config.json", lambda d: d.update(method="telepathy"))
    assert main([str(folder)]) == 1
    message = capsys.readouterr().err
    assert "'telepathy'" in message
    assert "implicit-video-reasoning" in message
    assert message.count("\n") == 1


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 1
    assert main([str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err
