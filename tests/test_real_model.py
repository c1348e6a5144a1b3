"""The page and the command line on a model that others published: never trained for pauses, it is asked in words and says so."""

import importlib.util
import json
import shutil
import sys
import threading
import types
from dataclasses import replace
from functools import partial
from pathlib import Path, PureWindowsPath

import pytest
import torch
from safetensors.torch import save_file

from engine import adapters, ask, generate, models, worlds
from engine.__main__ import main
from engine.adapters import Lora
from engine.backbones.base import add_tokens
from engine.config import ConfigError
from engine.data.samples import thoughts_of
from engine.insight import reconstruction, spoken
from engine.methods import described
from engine.methods.coconut import Coconut
from engine.methods.heima import Heima, Interpreters
from engine.methods.method import META, Method
from engine.methods.pause import PauseDistillation
from engine.video import Sampling, read
from tests.tiny import tiny_backbone, untrained_codi

ROOT = Path(__file__).resolve().parents[1]
QUESTION, OPTIONS = "Where is the ball at the end?", ["left", "middle", "right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As a published model's: weights and tokenizer, and nothing of ours."""
    made = tmp_path_factory.mktemp("published")
    tiny_backbone().save(made)
    return made


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    made = tmp_path_factory.mktemp("clip") / "cups.mp4"
    worlds.write(worlds.make("cups", 1, 3, "fresh"), made)
    return made


@pytest.fixture(autouse=True)
def short_chains(monkeypatch):
    """An untrained model never ends its turn."""
    monkeypatch.setattr(models, "LONGEST_CHAIN", 40)
    monkeypatch.setattr(models, "PUBLISHED_SAMPLING", Sampling(fps=2.0, min_frames=2, max_frames=2, pixels=56 * 84))


@pytest.fixture(scope="module")
def app():
    return opened("app_alone")


def taught(folder: Path, method: Method) -> models.Model:
    """The published model as if it had been trained by this method."""
    model = models.load(folder, device="cpu")
    add_tokens(model.backbone.model, model.backbone.tokenizer, method.tokens)
    companions = method.companions(model.backbone).eval()
    return replace(model, method=method, companions=companions, trained_pauses=method.slot_range)


def opened(name: str):
    """app.py as a module of its own."""
    described_ = importlib.util.spec_from_file_location(name, ROOT / "app.py")
    module = importlib.util.module_from_spec(described_)
    sys.modules[name] = module
    described_.loader.exec_module(module)
    return module


def test_an_open_question_is_answered_at_length(folder, clip):
    """As long as a chain may be; an answer that doesn't end is said to be cut off."""
    model = models.load(folder, device="cpu")
    reply = ask.ask(model, read(clip, model.sampling), QUESTION, write_chain=False)
    assert reply.generated_tokens == max(model.method.longest, model.longest_chain)
    assert f"The answer is cut off after {reply.generated_tokens} tokens." in reply.notices


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        ("Writing the chain out", models.Untaught()),
        ("Saying the thoughts", Interpreters(tags="tokens", compressed=2)),
        ("Looking inside", PauseDistillation(pauses=(2, 2))),
    ],
)
def test_who_leaves_ends_the_writing_at_its_next_token(app, folder, clip, monkeypatch, stage, method):
    """A long chain would keep the worker from the next visitor for minutes, and so would long thoughts."""
    model = taught(folder, method)
    seen = read(clip, model.sampling)
    monkeypatch.setattr(models, "LONGEST_CHAIN", 100_000)
    monkeypatch.setattr(reconstruction, "LONGEST", 100_000)
    monkeypatch.setattr(spoken, "alone", partial(spoken.alone, limit=100_000))
    monkeypatch.setattr(spoken, "aloud", lambda *given: [""])
    others = set(threading.enumerate())
    running = app.thinking({"any": model}, "any", seen, QUESTION, OPTIONS, 2, stage == "Writing the chain out", {})
    while next(running) != stage:
        pass
    running.close()
    (worker,) = set(threading.enumerate()) - others
    worker.join(10)
    assert not worker.is_alive()


def test_it_is_asked_in_words(folder, clip):
    """No token of ours stands in its prompts, and the chain's prompt asks for the steps."""
    model = models.load(folder, device="cpu")
    assert not model.taught
    assert (model.trained_pauses, model.usual_pauses) == (None, 0)
    ours = {model.backbone.token(name) for name in model.method.tokens}
    for chain in (False, True):
        sample = ask.posed(model, None, QUESTION, OPTIONS, "multiple choice", chain)
        encoded = model.backbone.encode(generate.context(sample))
        text = model.backbone.decode(encoded.ids)
        assert not ours & set(encoded.ids)
        assert "B. middle" in text
        assert "<answer> </answer>" in text
        assert ("step by step" in text) is chain


def test_it_says_so_and_offers_the_chain(folder, clip):
    model = models.load(folder, device="cpu")
    reply = ask.ask(model, read(clip, model.sampling), QUESTION, OPTIONS)
    assert ask.UNTAUGHT in reply.notices
    assert reply.slots == 0
    assert reply.thoughts == ""
    assert reply.explicit is not None
    assert reply.explicit.generated_tokens > 0
    assert sum(option.probability for option in reply.options) == pytest.approx(1, abs=1e-4)


def test_its_chain_is_what_it_writes_behind_its_own_prompt(folder, clip):
    model = models.load(folder, device="cpu")
    seen = read(clip, model.sampling)
    reply = ask.ask(model, seen, QUESTION, OPTIONS)
    sample = ask.posed(model, ask.frames_of(seen), QUESTION, OPTIONS, "multiple choice", chain=True)
    written = generate.explicit(model.backbone, generate.think(model.backbone, [sample], ()), models.LONGEST_CHAIN)
    assert reply.explicit.text == thoughts_of(written.text[0])


def test_a_model_that_only_writes_answers_by_its_chain(folder, clip, tmp_path, monkeypatch):
    """A control whose answer comes behind its chain: written once, its probabilities those of the letter in it."""
    shutil.copytree(folder, tmp_path / "explicit")
    (tmp_path / "explicit" / META).write_text('{"method": {"name": "controls.Explicit"}, "pauses": null}')
    model = models.load(tmp_path / "explicit", device="cpu")
    seen = read(clip, model.sampling)
    sample = ask.posed(model, ask.frames_of(seen), QUESTION, OPTIONS, "multiple choice")
    usual = generate.explicit(model.backbone, generate.think(model.backbone, [sample], ()), 40)
    letter = model.backbone.text_ids("B")[0]
    ids = [[*usual.ids[0][:36], model.backbone.token("<answer>"), letter, model.backbone.end]]
    states = usual.states[:39].clone()
    states[37] = 0
    states[37, -1, 0] = model.backbone.model.lm_head.weight[letter]  # B stands out where it was written
    wrote = replace(usual, ids=ids, text=["so B</think><answer>B</answer>"], tokens=[39], states=states)
    calls = []
    monkeypatch.setattr(generate, "explicit", lambda *given: calls.append(given) or wrote)
    reply = ask.ask(model, seen, QUESTION, OPTIONS, write_chain=False)
    assert len(calls) == 1
    assert reply.answer == reply.explicit.answer == "middle"
    assert reply.generated_tokens == reply.explicit.generated_tokens == 39
    assert max(reply.options, key=lambda option: option.probability).text == "middle"
    assert not reply.settings["silent"]
    assert any("written chain alone" in notice for notice in reply.notices)
    assert (reply.slots, reply.teacher_state) == (0, None)
    assert set(reply.seconds) == {"think", "answer", "speak"}
    assert reply.explicit.seconds == reply.seconds["think"] + reply.seconds["answer"]


def test_a_model_that_has_learnt_to_answer_alone_says_no_more(folder, clip, tmp_path):
    shutil.copytree(folder, tmp_path / "filler")
    (tmp_path / "filler" / META).write_text('{"method": {"name": "controls.Silent", "pauses": 3}, "pauses": [3, 3]}')
    model = models.load(tmp_path / "filler", device="cpu")
    reply = ask.ask(model, read(clip, model.sampling), QUESTION, OPTIONS)
    assert (reply.slots, reply.thoughts, reply.explicit) == (3, "", None)
    assert reply.answer in OPTIONS
    assert any("only learnt to answer silently" in notice for notice in reply.notices)
    assert (reply.settings["writes"], reply.settings["speaks"]) == (False, False)
    assert not any("was trained with" in notice for notice in reply.notices)
    more = ask.ask(model, read(clip, model.sampling), QUESTION, OPTIONS, pauses=5)
    assert "This model was trained with 3 pauses, not 5." in more.notices


def test_slots_can_still_be_tried(folder, clip):
    model = models.load(folder, device="cpu")
    reply = ask.ask(model, read(clip, model.sampling), QUESTION, OPTIONS, pauses=3, write_chain=False)
    assert reply.slots == 3
    assert ask.UNTAUGHT in reply.notices


def test_the_command_line_says_so(folder, clip, capsys):
    capsys.readouterr()
    words = [
        "answer",
        str(clip),
        QUESTION,
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--frames",
        "2",
        "--pixels",
        "3136",
    ]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert ask.UNTAUGHT in told["notices"]
    assert (told["slots"], told["explicit"] is None) == (0, False)


@pytest.mark.parametrize(
    ("said", "letter"),
    [("B", "B"), ("B. middle", "B"), ("middle", "B"), ("(C)", "C"), ("left or right", ""), ("Z", "")],
)
def test_options_are_recognised_in_words(said, letter):
    assert ask.meant(said, OPTIONS) == letter


def test_the_page(app, folder, clip):
    model = models.load(folder, device="cpu")
    page = app.Page(model)
    given = {"path": str(clip), "meta": {"_type": "gradio.FileData"}}
    told = page.think(given, QUESTION, "\n".join(OPTIONS), 0, True)
    assert told["answer"] in OPTIONS
    assert ask.UNTAUGHT in told["notices"]
    assert told["explicit"]["generated_tokens"] > 0
    demo = page.build()
    parts = {block.elem_id: block for block in demo.blocks.values() if block.elem_id}
    assert "never trained" in parts["pauses"].info
    assert parts["pauses"].value == 0
    assert parts["chain"].value is True
    assert "written chain" in parts["notices"].value
    *_, last = page.on_think(str(clip), QUESTION, "\n".join(OPTIONS), 2, True, "", 1, app.Visit())
    results = dict(zip(app.RESULTS, last, strict=True))
    assert "trained for pauses" in results["notices"]
    assert results["visit"].reply.slots == 2


def test_the_page_asks_a_model_of_words_without_a_clip(app, tmp_path):
    """And looks into its thoughts; a clip is none of its business."""
    page = app.Page(models.load(untrained_codi(tmp_path / "codi", thoughts=3), device="cpu"))
    *_, last = page.on_think(None, "What is 2 + 3?", "", 3, False, "", 1, app.Visit())
    told = dict(zip(app.RESULTS, last, strict=True))
    reply = told["visit"].reply
    assert reply.slots == 3
    assert reply.thoughts
    assert reply.inside is not None
    assert "there is no clip" in told["strip"]


RECORD = {**worlds.as_json(worlds.make("cups", 1, 3, "fresh")), "question": QUESTION, "options": OPTIONS}


def results(app, rows):
    """What the last row sets, by name."""
    return dict(zip(app.RESULTS, [*rows][-1], strict=True))


@pytest.mark.parametrize("when", ["in the line", "at work", "while it is drawn"])
def test_a_reply_is_never_shown_beside_another_clip(app, folder, clip, monkeypatch, when):
    """Film, then Think while it films: the page gets the new clip first, and then no answer to the old one."""
    page, visit = app.Page(models.load(folder, device="cpu")), app.Visit()
    visit.take(clip.name)
    asked = (str(clip), QUESTION, "\n".join(OPTIONS), 0, False, "", 1, visit)
    film = partial(visit.take, "new.mp4", RECORD)
    running = page.on_think(*asked)
    if when == "in the line":
        film()
        monkeypatch.setattr(page, "stages", lambda *given: pytest.fail("the model is asked about a clip that is gone"))
    elif when == "at work":
        next(running)
        film()
    else:
        monkeypatch.setattr(app.panels, "matters", lambda reply: film() or "")
    told = results(app, running)
    assert app.MEANWHILE in told["notices"]
    assert (visit.clip, visit.truth, visit.reply) == ("new.mp4", RECORD, None)
    assert told["answers"] == app.gr.skip()


def test_a_truth_judges_no_answer_to_another_question(app, folder, clip):
    page, visit = app.Page(models.load(folder, device="cpu")), app.Visit()
    visit.take(clip.name, RECORD)
    visit.known = True

    def thought(question: str, *options: str):
        asked = (str(clip), question, "\n".join(options), 0, False, "", 1, visit)
        told = results(app, page.on_think(*asked))
        return told["answers"], told["truth_card"].value

    for question, options in ((QUESTION, OPTIONS), (QUESTION, OPTIONS[::-1])):
        answers, truth = thought(question, *options)
        assert "correct" in answers
        assert "<p>True answer: " in truth
    for question, options in (("Where isn't it?", OPTIONS), (QUESTION, ["left", "right"]), (QUESTION, [])):
        answers, truth = thought(question, *options)
        assert "correct" not in answers
        assert "own question" in truth


@pytest.mark.parametrize(
    ("method", "thinks"),
    [
        (models.Untaught(), ""),
        (Coconut(c_thought=1, max_latent_stage=2), "fed back"),
        (Heima(tags="tokens", compressed=2), "tokens"),
    ],
)
def test_other_models_get_no_advice_that_can_not_work(app, folder, clip, method, thinks):
    """Neither more pauses for one that was never trained for them, nor any for one that writes its thoughts."""
    model = taught(folder, method)
    asked = (str(clip), QUESTION, "\n".join(OPTIONS), 2, False, "", 1, app.Visit())
    told = results(app, app.Page(model).on_think(*asked))
    settings = told["visit"].reply.settings
    assert (settings["taught"], settings["thinks"]) == (model.taught, thinks)
    assert "ask with" not in told["matters"] + told["many"] + told["strip"]
    title = {"": "with 2 pauses", "fed back": "with 2 thoughts", "tokens": "in thinking tokens"}
    assert f"Silent, {title[thinks]}" in told["answers"]


def test_a_compared_model_takes_the_clip_as_it_takes_clips(app, folder, clip):
    model = models.load(folder, device="cpu")
    longer = replace(model, name="longer", sampling=replace(model.sampling, min_frames=3, max_frames=3))
    page = app.Page(model, [longer, replace(model, name="alike")])
    taken = []
    read_clip = page.sandbox.read
    page.sandbox.read = lambda path, sampling, *more: taken.append(sampling) or read_clip(path, sampling, *more)

    def frames(other):
        given = (str(clip), QUESTION, "\n".join(OPTIONS), 0, False, app.Visit(), other)
        replies = [item[0] for item in page.stages(*given) if isinstance(item, tuple)]
        return [reply.settings["frames"] for reply in replies]

    assert frames("longer") == [2, 3]
    assert taken == [model.sampling, longer.sampling]
    assert frames("alike") == [2, 2]
    assert len(taken) == 3
    *_, last = page.on_think(str(clip), QUESTION, "\n".join(OPTIONS), 0, False, "longer", 1, app.Visit())
    results = dict(zip(app.RESULTS, last, strict=True))
    assert results["compared"].count("trust the written chain") == 2


def test_models_of_the_same_name_are_told_apart(app, folder, tmp_path, monkeypatch):
    """Only the very same folder, however it is written, isn't compared with itself."""
    twin, pages = tmp_path / "twin", []
    for made in (tmp_path / "first", twin):
        shutil.copytree(folder, made)
        (made / META).write_text('{"name": "small pause"}')
    monkeypatch.setattr(app, "serve", lambda page, *rest: pages.append(page))
    first, other = str(tmp_path / "first"), str(twin)
    assert app.main(["--model", first, "--compare", f"{twin}/../first", "--compare", other, "--compare", other]) == 0
    assert list(pages[0].others) == ["small pause (2)"]
    assert pages[0].others["small pause (2)"].name == "small pause (2)"
    parts = {block.elem_id: block for block in pages[0].build().blocks.values() if block.elem_id}
    phrase = "small pause (2): never trained to think in silence"
    assert parts["other"].choices == [("no other", ""), (phrase, "small pause (2)")]
    assert app.beside(None, [first]) == [first]  # with an adapter, the page's model isn't what the folder holds
    assert app.beside("some/model", ["some/model", "some/other"]) == ["some/other"]


def test_the_page_on_an_adapter(app, folder, clip, tmp_path):
    """A pause model's adapter on the published one: it is taught, and the slider starts at what it was trained with."""
    backbone = models.load(folder, device="cpu").backbone
    adapted = adapters.attach(backbone, Lora(r=4, targets=("attention",)))
    adapters.save(tmp_path / "made", backbone, torch.nn.ModuleDict(), {adapters.MAIN: adapted}, False)
    meta = {"method": described(PauseDistillation(pauses=(3, 5))), "pauses": [3, 5]}
    (tmp_path / "made" / META).write_text(json.dumps(meta))
    model = models.load(folder, tmp_path / "made", "cpu")
    assert model.taught
    parts = {block.elem_id: block for block in app.Page(model).build().blocks.values() if block.elem_id}
    assert (parts["pauses"].value, parts["notices"].value) == (5, "")
    assert "Trained with 3 to 5" in parts["pauses"].info


def test_a_space_names_model_and_adapter(app, monkeypatch):
    monkeypatch.setenv("MODEL_ID", "some/model")
    monkeypatch.setenv("ADAPTER_ID", "some/adapter")
    given = app.parser().parse_args([])
    assert (given.model, given.adapter) == ("some/model", "some/adapter")
    assert app.parser().parse_args(["--model", "other"]).model == "other"


def test_zerogpu_decorates_where_the_environment_says_so(monkeypatch):
    """A stand-in of `spaces`: it is used on ZeroGPU, and left alone elsewhere, be it installed or not."""
    lent = []

    def gpu(duration):
        def decorated(work):
            lent.append((work, duration))
            return work

        return decorated

    stand_in = types.ModuleType("spaces")
    stand_in.GPU = gpu
    monkeypatch.setitem(sys.modules, "spaces", stand_in)
    for value in ("", "false"):
        monkeypatch.setenv("SPACES_ZERO_GPU", value)
        app = opened("app_elsewhere")
        assert app.on_gpu(len) is len
    assert lent == []
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    app = opened("app_zero")
    assert app.on_gpu(len) is len
    assert lent == [(len, app.GPU_SECONDS)]
    monkeypatch.setitem(sys.modules, "spaces", None)  # as if it weren't installed
    assert opened("app_without").spaces is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that isn't there is asked for")
def test_a_device_that_is_not_there_is_refused(folder):
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"no device {device} here"):
            models.load(folder, device=device)


def test_precision(tmp_path, monkeypatch):
    """Weights that fit twice over in float32 stay exact on a CPU; larger ones take half. 1,000 numbers are 4,000 bytes."""
    save_file({"a": torch.zeros(25, 20, dtype=torch.bfloat16), "b": torch.zeros(500)}, tmp_path / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    assert models.parameters(tmp_path) == 1000
    free = types.SimpleNamespace(available=8000)
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: free)
    assert models.precision("cpu", tmp_path) == torch.float32
    free.available = 7999
    assert models.precision("cpu", tmp_path) == torch.bfloat16
    free.available = 8000
    monkeypatch.setattr(models, "free_memory", lambda: 7999)  # as in a container
    assert models.precision("cpu", tmp_path) == torch.bfloat16
    assert models.precision("cuda", tmp_path) == torch.bfloat16
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: version == (13, 0))
    assert models.precision("mps", tmp_path) == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    assert models.precision("mps", tmp_path) == torch.bfloat16


@pytest.mark.parametrize(
    ("most", "used", "prefix"),
    [
        ("memory.max", "memory.current", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
    ],
)
def test_a_containers_limit_counts_where_it_is_less_than_the_machines(tmp_path, monkeypatch, most, used, prefix):
    """It leaves 10,000 - 6,000 bytes, and the 1,500 that cached files take."""
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=8000))
    assert models.free_memory(tmp_path) == 8000
    (tmp_path / "memory").mkdir()
    stat = f"anon 4500\n{prefix}inactive_file 1000\n{prefix}active_file 500\n"
    (tmp_path / most).with_name("memory.stat").write_text(stat)
    (tmp_path / used).write_text("6000\n")
    for limit, free in (("10000", 5500), ("20000", 8000), ("9223372036854771712", 8000), ("max", 8000)):
        (tmp_path / most).write_text(f"{limit}\n")
        assert models.free_memory(tmp_path) == free


def test_a_hub_id_keeps_its_slash_on_windows(tmp_path, monkeypatch):
    """There a path turns it round."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    for name in ("Qwen/Qwen2.5", Path("Qwen/Qwen2.5"), PureWindowsPath("Qwen/Qwen2.5")):
        assert models.local(name) == tmp_path
        with pytest.raises(ConfigError, match="holds no adapter"):
            adapters.attach_saved(None, name)
    assert asked == ["Qwen/Qwen2.5"] * 6
