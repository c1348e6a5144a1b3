"""What leaves a run: plain checkpoints that transformers' own `generate` serves as the engine does, adapters, cards, the Hub."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    Qwen2VLImageProcessorPil,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from engine import adapters, ask, generate, models
from engine.__main__ import main
from engine.adapters import Lora
from engine.backbones.load import load
from engine.backbones.mllama import BEFORE_PICTURE
from engine.backbones.qwen2_5_vl import AFTER_VIDEO
from engine.data.video_r1 import VideoR1Source
from engine.exchange.export import PROCESSOR, export, push
from engine.exchange.prompt import LOOKED_AT, NOT_TEXT, prompt
from engine.layout import Frames
from engine.methods import described
from engine.methods.coconut import Coconut
from engine.methods.controls import Explicit
from engine.methods.heima import Heima
from engine.methods.method import META
from engine.methods.pause import PauseDistillation
from tests.native import leak_closed
from tests.tiny import (
    tiny_backbone,
    tiny_internvl,
    tiny_llama,
    tiny_llava,
    tiny_llava_video,
    tiny_mllama,
    tiny_qwen3vl,
)

QUESTION, OPTIONS = "Where is it?", ("left", "right")


def saved(folder, method, made=tiny_backbone, **meta):
    """A model's folder as training leaves one."""
    backbone = made()
    if missing := [t for t in method.tokens if t not in backbone.tokenizer.get_vocab()]:
        backbone.tokenizer.add_tokens(missing, special_tokens=True)
        backbone.model.resize_token_embeddings(len(backbone.tokenizer))
    # As Qwen2.5-VL is published: these would change what `generate` writes.
    backbone.model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        repetition_penalty=1.3,
        eos_token_id=[backbone.end, 5],
        pad_token_id=backbone.pad,
    )
    backbone.save(folder)
    (folder / META).write_text(json.dumps({"method": described(method), "pauses": list(method.slot_range), **meta}))
    return folder


def frames(count: int, still: bool = False) -> Frames:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 56, 84, 3), dtype=np.uint8)
    return Frames(pixels, 2.0, still)  # two seconds between frames: positions in time outgrow height and width


VISUALS = {"no picture": None, "an image": frames(1, still=True), "a video": frames(6)}


def emitted(model, visual, pauses: int, how: str, limit: int = 12) -> list[int]:
    """What the engine itself writes."""
    sample = ask.posed(model, visual, QUESTION, OPTIONS, "multiple choice", how == "explicit")
    if how == "explicit":
        return generate.explicit(model.backbone, generate.think(model.backbone, [sample], ()), limit).ids[0]
    thoughts = generate.think(model.backbone, [sample], model.method.thinking(pauses))
    return generate.answer(model.backbone, thoughts, model.method.marks, limit).ids[0]


def served(kind, folder, given, limit: int = 12) -> list[int]:
    """What transformers writes behind the prompt, told nothing else; of Mllama without the fault that its notice tells."""
    plain = kind.from_pretrained(folder)
    seen = [place for place, token in enumerate(given.ids) if token == plain.config.to_dict().get("image_token_index")]
    around = load(folder)
    with leak_closed(replace(around, model=plain), SimpleNamespace(visual_row=seen)):
        whole = plain.generate(**given.inputs, max_new_tokens=limit)
    return whole[0, len(given.ids) :].tolist()


@pytest.mark.parametrize(
    ("method", "how"),
    [
        (PauseDistillation(pauses=(4, 8)), "silent"),
        (PauseDistillation(pauses=(4, 8)), "explicit"),
        (Heima(), "silent"),
        (Heima(compressed=0), "explicit"),
    ],
)
def test_generate_serves_an_exported_model_as_the_engine_does(tmp_path, method, how):
    out = export(saved(tmp_path / "model", method), tmp_path / "out")
    model = models.load(out, device="cpu")
    for visual in VISUALS.values():
        given = prompt(model, visual, QUESTION, OPTIONS, 6, how)
        expected = emitted(model, visual, 6, how)
        assert len(set(expected)) > 3  # the model says something
        assert served(AutoModelForImageTextToText, out, given) == expected


def test_the_settings_and_positions_matter(tmp_path):
    """The test above can fail: the source's own settings, or transformers' positions behind a video, give other tokens."""
    method = PauseDistillation()
    source = saved(tmp_path / "model", method)
    out = export(source, tmp_path / "out")
    model = models.load(out, device="cpu")
    given = prompt(model, VISUALS["a video"], QUESTION, OPTIONS, 6)
    assert AFTER_VIDEO in given.notices
    own = {name: value for name, value in given.inputs.items() if name != "position_ids"}
    plain = AutoModelForImageTextToText.from_pretrained(out)
    with torch.no_grad():
        ours, theirs = plain(**given.inputs).logits[0, -1], plain(**own).logits[0, -1]
    assert not torch.allclose(ours, theirs, atol=1e-3)
    assert AutoModelForImageTextToText.from_pretrained(source).generation_config.do_sample
    assert not plain.generation_config.do_sample


FAMILIES = {  # how one is made that says something, and what it looks at
    "internvl": (partial(tiny_internvl, 4), VISUALS),
    "qwen3vl": (tiny_qwen3vl, VISUALS),
    "llava": (tiny_llava, ("no picture", "an image")),
    "llava_video": (tiny_llava_video, VISUALS),
    "mllama": (partial(tiny_mllama, 3), ("no picture", "an image")),
    "llama": (tiny_llama, ("no picture",)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path, family):
    made, looks = FAMILIES[family]
    out = export(saved(tmp_path / "model", PauseDistillation(), made), tmp_path / "out")
    model = models.load(out, device="cpu")
    kind = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    for name in looks:
        visual = VISUALS[name]
        given = prompt(model, visual, QUESTION, OPTIONS, 5)
        assert (LOOKED_AT in given.notices) == (visual is not None)
        assert (BEFORE_PICTURE in given.notices) == (family == "mllama" and visual is not None)
        expected = emitted(model, visual, 5, "silent")
        assert len(set(expected)) > 2
        assert served(kind, out, given) == expected
        if visual is not None:  # what is seen matters
            words = {each: given.inputs[each] for each in ("input_ids", "attention_mask")}
            assert served(kind, out, replace(given, inputs=words)) != expected
    card, blind = (out / "README.md").read_text(), family == "llama"
    assert ("text-generation" in card, "answer - QUESTION" in card, "CLIP" in card) == (blind, blind, not blind)


def test_the_text_is_what_the_ids_say(tmp_path):
    model = models.load(saved(tmp_path / "model", PauseDistillation()), device="cpu")
    given = prompt(model, VISUALS["a video"], QUESTION, OPTIONS, 4)
    assert given.text.endswith("<|im_start|>assistant\n<pause><pause><pause><pause><ANS>")
    assert given.text.count("<|vision_start|><|video_pad|><|vision_end|>") == 1
    assert "Where is it? Options:\nA. left\nB. right" in given.text
    alone = prompt(model, None, QUESTION, OPTIONS, 4)
    assert model.backbone.tokenizer.encode(alone.text, add_special_tokens=False) == alone.ids
    assert NOT_TEXT not in alone.notices
    assert NOT_TEXT in prompt(model, None, "What is <pause>?", (), 4).notices
    assert len(prompt(model, None, QUESTION, OPTIONS).ids) == len(alone.ids) + 4  # the usual eight
    assert prompt(model, None, QUESTION, (), 4, "explicit").text.endswith("<|im_start|>assistant\n")


def unchecked(kind: Any, *parts: Any, **settings: Any) -> Any:
    """A processor of that class; its video part, which needs torchvision, may be another thing."""

    class Unchecked(kind):
        def check_argument_for_proper_class(self, name: str, part: Any) -> None:
            pass

    return Unchecked(*parts, **settings)


def processor(family: str, tokens: Any) -> Any:
    """As the family is published, with the tiny models' sizes."""
    side, crop = {"height": 28, "width": 28}, {"crop_size": {"height": 28, "width": 28}}
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    if family in ("qwen2_5_vl", "qwen3vl"):
        kind = Qwen2_5_VLProcessor if family == "qwen2_5_vl" else Qwen3VLProcessor
        sizes = {"patch_size": 14, "size": {"shortest_edge": 28 * 28, "longest_edge": 10**6}}
        films = SimpleNamespace(merge_size=2, temporal_patch_size=2)
        return unchecked(kind, Qwen2VLImageProcessorPil(**sizes), tokens, films)
    if family == "internvl":
        for name, token in (
            ("start_image", "<img>"),
            ("end_image", "</img>"),
            ("context_image", "<IMG_CONTEXT>"),
            ("video", "<video>"),
        ):
            setattr(tokens, f"{name}_token", token)
            setattr(tokens, f"{name}_token_id", tokens.convert_tokens_to_ids(token))
        tiles = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True)
        return unchecked(InternVLProcessor, tiles, tokens, None, image_seq_length=4)
    if family == "mllama":
        return unchecked(MllamaProcessor, MllamaImageProcessorPil(size=side), tokens)
    tiles = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, image_grid_pinpoints=pinpoints, **crop)
    more = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        return unchecked(LlavaNextProcessor, tiles, tokens, **more)
    return unchecked(LlavaNextVideoProcessor, None, tiles, tokens, **more)


@pytest.mark.parametrize("family", ["qwen2_5_vl", *(name for name in FAMILIES if name != "llama")])
def test_the_familys_processor_makes_the_ids_of_the_text(tmp_path, family):
    made, looks = FAMILIES.get(family, (tiny_backbone, VISUALS))
    model = models.load(saved(tmp_path / "model", PauseDistillation(), made), device="cpu")
    theirs = processor(family, model.backbone.tokenizer)
    given = prompt(model, VISUALS["an image"], QUESTION, OPTIONS, 5)
    out = theirs(text=[given.text], images=[VISUALS["an image"].pixels[0]], add_special_tokens=False)
    assert list(out["input_ids"][0]) == given.ids
    if looks is not VISUALS:
        return
    film = prompt(model, VISUALS["a video"], QUESTION, OPTIONS, 5)
    seen = film.inputs.get("pixel_values_videos", film.inputs.get("pixel_values"))
    told = {
        "video_grid_thw": torch.tensor([[3, 4, 6]]),
        "pixel_values_videos": seen if family == "llava_video" else seen[None],
        "video_metadata": [SimpleNamespace(fps=0.5, frames_indices=list(range(6)))],
    }
    (whole,), _ = theirs.get_text_with_replacements([film.text], [], [theirs.replace_video_token(told, 0)])
    assert model.backbone.tokenizer.encode(whole, add_special_tokens=False) == film.ids


def test_slots_that_are_fed_back_need_the_engine(tmp_path):
    model = models.load(saved(tmp_path / "model", Coconut()), device="cpu")
    with pytest.raises(ValueError, match="fed back"):
        prompt(model, None, QUESTION, OPTIONS, 6)
    card = (export(tmp_path / "model", tmp_path / "out") / "README.md").read_text()
    assert "it needs the engine" in card


def run_folder(tmp_path, lora: bool):
    """What a run leaves: settings beside `best`."""
    method = PauseDistillation(pauses=(4, 8))
    base, run = tmp_path / "base", tmp_path / "run"
    saved(base, Explicit())
    (base / META).unlink()
    (base / "preprocessor_config.json").write_text('{"patch_size": 14}')
    settings = {
        "training": {"init": str(base), "out": str(run), "lr": 1e-4}, "method": described(method),
        "VideoR1Source": {"file": "/data/secret/place/train.json", "fps": 1.0, "frames": [2, 8], "pixels": 6272},
    }  # fmt: skip
    run.mkdir()
    backbone = models.load(base, device="cpu").backbone
    if lora:
        settings["lora"] = {"r": 4}
        adapted = adapters.attach(backbone, Lora(r=4, alpha=8, targets=("attention",)))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        adapters.save(run / "best", backbone, torch.nn.ModuleDict(), {adapters.MAIN: adapted}, False)
    else:
        adapters.save(run / "best", backbone, torch.nn.ModuleDict(), {}, False)
    (run / "settings.json").write_text(json.dumps(settings))
    looks = VideoR1Source(fps=1.0, frames=(2, 8), pixels=6272).looks
    (run / "best" / META).write_text(json.dumps({"method": described(method), "pauses": [4, 8], **looks}))
    (run / "best" / "scores.json").write_text(json.dumps({"step": 40, "silent": 0.625}))
    return base, run


def test_adapter_and_merged_forms_answer_alike(tmp_path):
    base, run = run_folder(tmp_path, lora=True)
    alone, merged = export(run, tmp_path / "alone"), export(run, tmp_path / "merged", "merged")
    assert (alone / adapters.WEIGHTS).is_file()
    assert not list(alone.glob("model*.safetensors"))
    assert not (merged / adapters.WEIGHTS).exists()
    assert json.loads((merged / "preprocessor_config.json").read_text())["patch_size"] == 14  # the base model's own
    assert not (alone / "preprocessor_config.json").exists()
    two, one, plain = (
        models.load(base, alone, "cpu"),
        models.load(merged, device="cpu"),
        models.load(base, device="cpu"),
    )
    assert two.trained_pauses == one.trained_pauses == (4, 8)
    assert (one.sampling.fps, one.sampling.max_frames, one.sampling.pixels) == (1.0, 8, 6272)
    assert emitted(two, VISUALS["an image"], 4, "silent") == emitted(one, VISUALS["an image"], 4, "silent")
    changed = replace(plain, method=one.method)
    assert emitted(changed, VISUALS["an image"], 4, "silent") != emitted(one, VISUALS["an image"], 4, "silent")


def test_processors_are_set_to_look_as_training_did(tmp_path):
    """Whether the base model's files have them in one or in several; what is said nowhere else stays."""
    base, run = run_folder(tmp_path, lora=False)
    old = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "size": {"shortest_edge": 1, "longest_edge": 2},
    }
    parts = {
        "image_processor": {"patch_size": 14},
        "video_processor": {"fps": 2, "merge_size": 2},
        "processor_class": "Q",
    }
    for name, held in {
        "preprocessor": old,
        "video_preprocessor": {"temporal_patch_size": 2},
        "processor": parts,
    }.items():
        (base / f"{name}_config.json").write_text(json.dumps(held))
    out = export(run, tmp_path / "out", "merged")
    size = {"size": {"shortest_edge": 28 * 28, "longest_edge": 6272}}
    films = {**size, "fps": 1.0, "min_frames": 2, "max_frames": 8}

    def told(name: str) -> dict:
        return json.loads((out / name).read_text())

    assert told("preprocessor_config.json") == {"patch_size": 14, **size}
    assert told("video_preprocessor_config.json") == {"temporal_patch_size": 2, **films}
    assert told("processor_config.json") == {
        "image_processor": {"patch_size": 14, **size},
        "video_processor": {"merge_size": 2, **films},
        "processor_class": "Q",
    }
    card = (out / "README.md").read_text()
    assert (
        "1 frames a second, 2 to 8 of them, with at most 6,272 pixels a frame, and images with at most 6,272;" in card
    )
    image = np.zeros((300, 400, 3), np.uint8)  # the family's own processor takes it from there
    grid = Qwen2VLImageProcessorPil.from_pretrained(out)(images=[image], return_tensors="pt")["image_grid_thw"]
    assert int(grid.prod()) * 14 * 14 <= 6272


def test_families_whose_shape_decides_their_sizes_leave_processors_alone(tmp_path):
    seen = (models.PUBLISHED_SAMPLING, 6272)
    assert tiny_internvl().processor_sizes(*seen) == tiny_llava().processor_sizes(*seen) == {}
    assert "size" not in tiny_qwen3vl().processor_sizes(*seen)["video_processor"]


def test_a_setting_of_many_words_is_no_path(tmp_path):
    _, run = run_folder(tmp_path, lora=False)
    settings = json.loads((run / "settings.json").read_text())
    settings["training"]["note"] = "words " * 100
    (run / "settings.json").write_text(json.dumps(settings))
    assert "words " * 100 in (export(run, tmp_path / "out") / "README.md").read_text()


def test_an_adapter_names_its_model_as_others_may_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, run = run_folder(tmp_path, lora=True)
    for base, named in (("", "base"), ("some/model", "some/model")):
        out = export(run, tmp_path / "out" / named, base=base)
        assert json.loads((out / adapters.CONFIG).read_text())["base_model_name_or_path"] == named
        assert f"--merge --base {named}`" in (out / "README.md").read_text()


def test_of_a_hub_model_only_the_processors_files_are_fetched(tmp_path, monkeypatch):
    hub, asked = tmp_path / "hub", []
    hub.mkdir()
    (hub / "preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *given, **named: asked.append((given, named)) or hub
    )
    out = export(saved(tmp_path / "model", PauseDistillation()), tmp_path / "out", base="some/model")
    assert (out / "preprocessor_config.json").is_file()
    assert asked == [(("some/model",), {"allow_patterns": list(PROCESSOR)})]


def test_the_card_says_what_the_model_is(tmp_path):
    _, run = run_folder(tmp_path, lora=False)
    scores = {
        "settings": {"name": "mmstar", "mode": "silent"}, "score": 0.5, "interval": [0.4, 0.6], "n": 100, "complete": True,
        "generated_tokens": 4.0, "shard": None,
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(scores))
    card = (export(run, tmp_path / "out", scores=[str(tmp_path / "summary.json")]) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    for said in ("`pause.PauseDistillation`", "- distil: `10.0`", "4 to 8", "- lr: `0.0001`", "validation, silent: 0.625",
                 "| mmstar | silent | 50.0% (40.0% to 60.0%) | 100 | 4.0 |", "<pause><ANS>", "train.json"):  # fmt: skip
        assert said in card
    assert "secret" not in card  # nor anything else of where things lie on this machine
    assert str(tmp_path) not in card


def test_mistakes_are_said_before_anything_is_written(tmp_path, capsys):
    _, run = run_folder(tmp_path, lora=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    capsys.readouterr()  # the progress of writing the run
    for words, sentence in [
        ([tmp_path / "none", tmp_path / "out"], "no folder"),
        ([tmp_path / "empty", tmp_path / "out"], "neither a model"),
        ([run, tmp_path / "out", "--adapter"], "trained with LoRA"),
        ([run, tmp_path / "full"], "there already"),
        ([run, tmp_path / "out", "--scores", tmp_path / "none.json"], "no benchmark's summary"),
    ]:
        assert main(["export", *map(str, words)]) == 2
        told = capsys.readouterr()
        assert sentence in told.err
        assert len(told.err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_nothing_is_pushed_unless_asked(tmp_path, capsys, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))
            return type("Repo", (), {"repo_id": name})

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    _, run = run_folder(tmp_path, lora=False)
    assert main(["export", str(run), str(tmp_path / "quiet")]) == 0
    assert json.loads(capsys.readouterr().out)["hub"] is None
    assert calls == []
    assert main(["export", str(run), str(tmp_path / "loud"), "--push", "me/it", "--private"]) == 0
    assert json.loads(capsys.readouterr().out)["hub"] == "https://huggingface.co/me/it"
    assert calls == [("me/it", True), ("me/it", str(tmp_path / "loud"))]


def test_a_hub_that_is_not_there_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="me/it on the Hub couldn't be reached") as told:
        push(tmp_path, "me/it")
    assert "push the folder later" in str(told.value)


def test_the_prompt_command(tmp_path, capsys):
    folder = saved(tmp_path / "model", PauseDistillation(pauses=(4, 8)))
    assert main(["prompt", "-", QUESTION, "--option", "left", "--option", "right", "--model", str(folder)]) == 0
    told = json.loads(capsys.readouterr().out)
    given = prompt(models.load(folder, device="cpu"), None, QUESTION, OPTIONS)
    assert (told["text"], told["ids"], told["stop"]) == (given.text, given.ids, given.stop)
    assert main(["prompt", "-", " ", "--model", str(folder)]) == 2
