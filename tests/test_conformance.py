"""The engine gives the published code's numbers; and the check says so when it doesn't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conformance.__main__ import main
from tests.conformance.folder import whose

FOLDERS = Path(__file__).parent / "golden"
GOLDEN = FOLDERS / "A"


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


@pytest.mark.parametrize(("name", "at_least"), [("A", 200), ("B1", 80), ("B2", 130), ("B3", 200)])
def test_published_numbers(name: str, at_least: int, capsys: pytest.CaptureFixture) -> None:
    assert main([str(FOLDERS / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("  ok") for line in lines) == len(lines) - 1 > at_least
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
        change_array(folder, "expected.safetensors", f"image-N5.{key}", partial(torch.add, other=amount))
    assert main([str(folder)]) == 1
    names = "answer.labels", "kd", "kd_positions_teacher", "grad_norms.lm_head.weight", "surprise"
    expected = [f"image-N5.{name}" for name in (*names, *spoiled, "decoder_with_mrope.total")]
    assert sorted(missed(capsys)) == sorted(expected)


def test_other_weights_miss(folder: Path, capsys: pytest.CaptureFixture) -> None:
    change_array(folder, "weights.safetensors", "model.visual.merger.mlp.2.bias", lambda x: x + 0.01)
    assert main([str(folder)]) == 1
    assert {"image-N5.ce_teacher", "image-N5.kd", "batch.total"} <= set(missed(capsys))


def change_at(folder: Path, name: str, path: str, by: float) -> None:
    """Adds to one number of a JSON file: `path` holds keys and indices between slashes."""

    def edit(content: Any) -> None:
        *way, last = [int(step) if step.lstrip("-").isdigit() else step for step in path.split("/")]
        for step in way:
            content = content[step]
        content[last] += by

    change(folder, name, edit)


SPOILED = {  # folder -> where in which file a number is made wrong, and which quantities must miss
    "B1": {
        ("expected.json", "cases/stage2-c2-max3.llama/loss"): ["stage2-c2-max3.llama.loss"],
        ("expected.json", "cases/stage0-c1-max3.llama/grad_norms/lm_head.weight"): [
            "stage0-c1-max3.llama.grad_norms.lm_head.weight"
        ],
        ("inputs.json", "cases/0/batch/input_ids/1/-1"): ["stage0-c1-max3.llama.input_ids"],
        ("inputs.json", "cases/1/batch/labels/1/20"): ["stage2-c2-max3.llama.labels"],
        ("inputs.json", "cases/2/batch/position_ids/1/4"): ["stage4-c2-max3-mixed.llama.position_ids"],
        ("expected.safetensors", "stage4-c2-max3-mixed.llama.logits"): ["stage4-c2-max3-mixed.llama.logits"],
        ("expected.safetensors", "stage2-c2-max3.llama.thought_embeds"): ["stage2-c2-max3.llama.thought_embeds"],
    },
    "B2": {
        ("expected.json", "cases/stage1-c1-max3/answer_loss"): ["stage1-c1-max3.answer_loss"],
        ("expected.json", "cases/stage4-c2-max3/aux_loss"): ["stage4-c2-max3.aux_loss"],
        ("expected.json", "cases/stage4-c2-max3/aux_loss_per_thought/2"): ["stage4-c2-max3.aux_loss_per_thought"],
        ("expected.json", "cases/stage4-c2-max3/grad_norms/aux.transformer.wpe.weight"): [
            "stage4-c2-max3.grad_norms.aux.transformer.wpe.weight"
        ],
        ("inputs.json", "cases/1/batch/explainable_ids_list/0/1"): ["stage4-c2-max3.explainable_ids_list"],
        ("expected.safetensors", "stage4-c2-max3.aux_logits_thought1"): ["stage4-c2-max3.aux_logits_thought1"],
    },
    "B3": {
        ("expected.json", "variants/codi_factor20/distill_loss"): ["codi_factor20.distill_loss"],
        ("expected.json", "variants/codi_factor20/grad_norms/prj.fc1.weight"): [
            "codi_factor20.grad_norms.prj.fc1.weight"
        ],
        ("expected.json", "variants/simcot/explain_loss"): [
            "simcot.explain_loss", "simcot.by_default.explain_loss", "simcot_reversed.by_default.explain_loss",
        ],
        ("expected.json", "variants/simcot/loss_fn_calls_in_order/3"): ["simcot.loss_fn_calls_in_order"],
        ("expected.json", "variants/simcot_reversed/explain_loss_per_slot/3"): ["simcot_reversed.explain_loss_per_slot"],
        ("inputs.json", "batches/reversed/ref_answer_position/1"): ["reversed.ref_answer_position"],
        ("inputs.json", "batches/reversed/decoder_input_ids/1/2"): ["reversed.decoder_input_ids"],
        ("inputs.json", "batches/row0_longest/ref_labels/1/9"): ["row0_longest.ref_labels"],
        ("inputs.json", "explain_slots_row0_longest/0/3/2"): ["explain_slots_row0_longest"],
        ("expected.safetensors", "simcot.latents"): ["simcot.latents"],
        ("expected.safetensors", "simcot.student_logits"): ["simcot.student_logits"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_wrong_numbers_miss_and_no_others(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / name
    shutil.copytree(FOLDERS / name, copy)
    for file, place in SPOILED[name]:
        if file.endswith("json"):
            change_at(copy, file, place, 1 if file == "inputs.json" else 0.01)
        else:
            change_array(copy, file, place, lambda x: x + 1e-3)
    first = {"B1": "stage0-c1-max3.llama", "B2": "stage1-c1-max3", "B3": "codi_factor20"}[name]
    part = "variants" if name == "B3" else "cases"
    change(copy, "expected.json", lambda d: d[part][first].update(surprise=1.0))
    assert main([str(copy)]) == 1
    expected = [f"{first}.surprise", *(quantity for each in SPOILED[name].values() for quantity in each)]
    assert sorted(missed(capsys)) == sorted(expected)


@pytest.mark.parametrize(("name", "part"), [("B1", "cases"), ("B3", "variants")])
def test_what_nothing_computes_is_a_miss(name: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / name
    shutil.copytree(FOLDERS / name, copy)
    change(copy, "expected.json", lambda d: d[part].update(telepathy={"loss": 1.0}))
    save_file(
        load_file(copy / "expected.safetensors") | {"empathy.states": torch.ones(2)}, copy / "expected.safetensors"
    )
    assert main([str(copy)]) == 1
    assert missed(capsys) == ["telepathy", "empathy.states"]


@pytest.mark.parametrize(
    ("name", "weights", "key"),
    [
        ("B1", "weights_llama", "model.norm.weight"),
        ("B2", "weights_aux", "transformer.ln_f.bias"),
        ("B3", "weights_prj", "fc2.bias"),
    ],
)
def test_every_model_counts(name: str, weights: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / name
    shutil.copytree(FOLDERS / name, copy)
    change_array(copy, f"{weights}.safetensors", key, lambda x: x + torch.linspace(0, 0.02, len(x)))
    assert main([str(copy)]) == 1
    assert sum(quantity.endswith("loss") for quantity in missed(capsys)) >= 2


def test_weights_are_loaded_strictly(folder: Path, capsys: pytest.CaptureFixture) -> None:
    arrays = load_file(folder / "weights.safetensors")
    arrays.pop("model.visual.merger.mlp.2.bias")
    save_file(arrays, folder / "weights.safetensors")
    assert main([str(folder)]) == 1
    assert "merger.mlp.2.bias" in capsys.readouterr().err


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


def longvideo(folder: Path, stem: str) -> dict[str, Any]:
    return json.loads((folder / f"{stem}.json").read_text())["samples"]["longvideo-N8"]


def test_the_library_s_own_positions_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Where they differ from the training's, behind a long video."""
    copy = tmp_path / "A"
    shutil.copytree(FOLDERS / "A", copy)
    given = longvideo(copy, "expected_independent")
    assert not given["native_5_23_positions_agree_with_4_52"]
    assert abs(given["with_5_23_positions"]["ce_answer"] - longvideo(copy, "expected")["ce_answer"]) > 1e-3

    def spoil(d: dict) -> None:
        numbers = d["samples"]["longvideo-N8"]["with_5_23_positions"]
        numbers.update({key: value + 1e-3 for key, value in numbers.items()})

    change(copy, "expected_independent.json", spoil)
    assert main([str(copy)]) == 1
    assert missed(capsys) == [f"longvideo-N8.with_5_23_positions.{key}" for key in given["with_5_23_positions"]]


def test_seconds_that_arent_said_are_one(tmp_path: Path) -> None:
    copy = tmp_path / "A"
    shutil.copytree(FOLDERS / "A", copy)

    def unsay(d: dict) -> None:
        (video,) = (sample for sample in d["samples"] if sample["kind"] == "video")
        assert video["second_per_grid_ts"] == 1.0
        video["second_per_grid_ts"] = None

    change(copy, "inputs.json", unsay)
    assert main([str(copy)]) == 0


def test_words_around_the_last_answer_are_of_the_layout(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """An answer before it, and words behind it: the same ids and labels; distilled is the last answer."""

    def widen(d: dict) -> None:
        (sample,), special = d["samples"], d["special_ids"]
        for sequence in ("answer", "teacher"):
            ids, labels = sample["input_ids"][sequence], sample["labels"][sequence]
            first = len(ids) - 1 - ids[::-1].index(special["answer_start"])
            last = len(ids) - ids[::-1].index(special["answer_end"])
            before, behind = [special["answer_start"], 7, special["answer_end"], 9], [11, 12]
            sample["input_ids"][sequence] = [*ids[:first], *before, *ids[first:last], *behind, *ids[last:]]
            sample["labels"][sequence] = [*labels[:first], *before, *labels[first:last], *behind, *labels[last:]]

    change(folder, "inputs.json", widen)

    def further(d: dict) -> None:
        for sequence in ("answer", "teacher"):
            d["samples"]["image-N5"][f"kd_positions_{sequence}"] = [
                4 + place for place in d["samples"]["image-N5"][f"kd_positions_{sequence}"]
            ]

    change(folder, "expected.json", further)
    assert main([str(folder)]) == 1
    names = missed(capsys)
    assert "image-N5.ce_answer" in names  # the words count
    assert not [name for name in names if name.endswith(("input_ids", "labels")) or "kd_positions" in name]


@pytest.mark.parametrize(("part", "said"), [("total", "image-N5.total"), ("ce_teacher", "image-N5.ce_teacher")])
def test_a_number_that_is_not_given_is_a_miss(
    part: str, said: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    change(folder, "expected.json", lambda d: d["samples"]["image-N5"].pop(part))
    assert main([str(folder)]) == 1
    assert missed(capsys) == [said]


@pytest.mark.parametrize("name", ["A", "B1", "B2", "B3", "C", "D"])
def test_no_numbers_are_no_hit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / name
    shutil.copytree(FOLDERS / name, copy)
    change(copy, "expected.json", lambda d: [d[key].clear() for key in d if isinstance(d[key], dict)])
    save_file({}, copy / "expected.safetensors")
    change(copy, "expected.json", lambda d: d.update(telepathy=1.0))
    assert main([str(copy)]) == 1
    names = missed(capsys)
    assert {"telepathy", "expected.safetensors"} <= set(names)
    assert any(quantity.startswith("expected.json ") for quantity in names)


@pytest.mark.parametrize("spoiled", ["expected.json", "weights", "special_ids", "batch", "not JSON", "a list"])
def test_a_folder_of_another_form_gets_a_sentence_and_the_next_is_checked(
    spoiled: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "B1"
    shutil.copytree(FOLDERS / "B1", copy)
    if spoiled == "expected.json":
        (copy / spoiled).unlink()
    elif spoiled == "weights":
        (copy / "weights_llama.safetensors").write_bytes(b"no weights")
    elif spoiled == "special_ids":
        change(copy, "inputs.json", lambda d: d["special_ids"].clear())
    elif spoiled == "batch":
        change(copy, "inputs.json", lambda d: d["cases"][0].pop("batch"))
    else:
        (copy / "config.json").write_text("{" if spoiled == "not JSON" else "[]")
    assert main([str(copy), str(FOLDERS / "B2")]) == 1
    told = capsys.readouterr()
    assert f"{copy} can't be checked" in told.err
    assert told.err.count("\n") == 1
    assert f"{FOLDERS / 'B2'}: " in told.out


def test_rows_that_begin_alike_are_told_apart() -> None:
    """By what they end with; and where that is the same too, by their places."""
    ends = [([1, 2], [8]), ([1, 2], [9]), ([1, 2], [9])]
    assert [whose(row, ends, 0) for row in ([1, 2, 5, 8], [1, 2, 5, 9])] == [0, 1]
    assert whose([1, 2, 9], ends, 2) == 2
    with pytest.raises(ValueError, match="the row 1"):
        whose([1, 3, 9], ends, 1)
