"""Weights, tokenizers and settings that are broken, another model's, or hostile: refused with the reason, never run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from engine import models
from engine.config import ConfigError
from engine.folders import fingerprint
from engine.methods.method import META
from tests.tiny import tiny_backbone, tiny_gpt2, tiny_internvl, tiny_llama, words

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_backbone().save(folder)
    method = {"name": "pause", "pauses": [4, 8]}
    meta = {"name": "tiny", "method": method, "pauses": [4, 8], "sampling": {"fps": 4.0, "pixels": 4704}}
    (folder / META).write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny_backbone().model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


class Evil:
    """What a pickle could do to whoever opens it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def edited(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, metadata={"format": "pt"})

    return edit


def written(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def configured(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def pickled(name: str, to: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / to).write_bytes(pickle.dumps(Evil(folder / "ran")))

    return change


BROKEN = {
    "truncated": (cut(WEIGHTS, 20_000), "not fully covered"),
    "cut in its head": (cut(WEIGHTS, 5), "header too small"),
    "empty": (cut(WEIGHTS, 0), "header too small"),
    "a head of exabytes": (written(WEIGHTS, (2**62).to_bytes(8, "little") + bytes(100)), "header too large"),
    "text": (written(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "header"),
    "a weight of another shape": (
        edited(WEIGHTS, lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:-3].clone()})),
        r"1 weights are missing or of another model: lm_head.weight \(shape\)",
    ),
    "a weight missing": (edited(WEIGHTS, lambda w: w.pop("lm_head.weight")), "1 weights are missing .*lm_head.weight"),
    "another model's weights": (
        edited(WEIGHTS, lambda w: [w.update({f"other.{name}": w.pop(name)}) for name in list(w)]),
        "weights are missing",
    ),
    "pickled": (pickled(WEIGHTS, "pytorch_model.bin"), "no file named model.safetensors"),
    "a larger tokenizer": (lambda folder: words(4000).save_pretrained(folder), "tokenizer is another model's"),
    "a smaller tokenizer": (lambda folder: words(300).save_pretrained(folder), "tokenizer is another model's"),
    "no tokenizer": (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "tokenizer is another model's"),
    "a broken tokenizer": (written("tokenizer.json", '{"a": 1}'), "added_tokens"),
    "another size": (configured(tie_word_embeddings=False, image_token_id=3), "tokenizer is another model's"),
    "another family": (configured(model_type="bert"), "is a bert model. Supported: qwen2_5_vl"),
    "no family": (written("config.json", "{}"), "nameless model"),
    "a broken config": (written("config.json", "{nope"), "not a valid JSON"),
    "broken notes": (written(META, "{nope"), "line 1"),
    "notes of another kind": (written(META, "[]"), "Can't load"),
    "an unknown setting": (written(META, '{"sampling": {"fpps": 3}}'), "Unknown key 'sampling.fpps'. Did you mean 'fps'"),
    "an unknown method": (written(META, '{"method": {"name": "../../evil"}}'), "There is no method"),
    "a method's unknown setting": (
        written(META, '{"method": {"name": "pause", "puases": [1, 2]}}'),
        "Unknown key 'method.puases'. Did you mean 'pauses'",
    ),
    "half a familiarity": (written("familiarity.json", "{}"), "familiarity.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_with_the_reason(whole: Path, tmp_path: Path, name: str) -> None:
    change, reason = BROKEN[name]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises(ValueError, match=reason) as refused:
        models.load(folder, device="cpu")
    assert str(refused.value).startswith(f"Can't load {folder}")
    assert "\n" not in str(refused.value)
    assert not (folder / "ran").exists()


ADAPTERS = {
    "truncated": (cut(ADAPTER, 100), "header"),
    "pickled": (pickled(ADAPTER, "adapter_model.bin"), "pickles, aren't read"),
    "of another shape": (
        edited(ADAPTER, lambda w: [w.update({n: w[n][:, :10].clone()}) for n in w if "lora_A" in n]), "size mismatch"
    ),
    "of another model": (
        edited(ADAPTER, lambda w: [w.update({n.replace("layers", "strata"): w.pop(n)}) for n in list(w)]),
        "another model's adapter: it lacks 6 weights",
    ),
    "broken": (written("adapter_config.json", "{nope"), "holds no adapter"),
    "none": (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_broken_adapter_is_refused_with_the_reason(whole: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    change, reason = ADAPTERS[name]
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    change(folder)
    with pytest.raises(ValueError, match=reason) as refused:
        models.load(whole, folder, "cpu")
    assert "\n" not in str(refused.value)
    assert not (folder / "ran").exists()


def test_code_that_comes_with_a_model_is_not_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    configured(auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})(
        folder
    )
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(folder / 'ran')!r})")
    models.load(folder, device="cpu")
    assert not (folder / "ran").exists()


def test_whole_models_of_every_family_load(whole: Path, adapter: Path, tmp_path: Path) -> None:
    for made in (tiny_internvl, tiny_gpt2, tiny_llama):
        made().save(tmp_path / made.__name__)
        assert models.load(tmp_path / made.__name__, device="cpu").layers == 3
    assert models.load(whole, adapter, "cpu").trained_pauses == (4, 8)


def test_any_tensor_tells_weights_from_others(tmp_path: Path) -> None:
    """The middle one too, of a file of three mebibytes."""
    tensors, seen = {name: torch.zeros(2**18) for name in "abc"}, set()
    for name in ("", "a", "b", "c"):
        save_file(tensors | ({name: torch.ones(2**18)} if name else {}), tmp_path / WEIGHTS)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4
    (tmp_path / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="is damaged"):
        fingerprint(tmp_path)
