"""lmms-eval's plugin, held against a stand-in of its published interface (0.7): lmms-eval itself need not be installed."""

import abc
import importlib
import json
import re
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from engine import models, worlds
from engine.data.samples import Sample, answer_of, context, with_options
from engine.evaluation import respond
from engine.methods.method import META
from tests.tiny import tiny_backbone


class CacheHook:
    def __init__(self, cachinglm=None):
        self.told = []

    def add_partial(self, attr, req, res):
        self.told.append((attr, req, res))


class Lmms(abc.ABC):
    """As lmms_eval.api.model.lmms: what it sets, what is abstract, how it is made of --model_args."""

    is_simple = True

    def __init__(self):
        self._rank = 0
        self._world_size = 1
        self.cache_hook = CacheHook(None)
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        pairs = dict(pair.split("=", 1) for pair in arg_string.split(",") if pair)
        told = {name: int(value) if value.isdigit() else value for name, value in pairs.items()}
        return cls(**told, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


@pytest.fixture
def harness(monkeypatch):
    made = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }  # fmt: skip
    for name, contents in made.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    sys.modules.pop("engine.exams.harness", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    tiny_backbone().save(made)
    meta = {
        "name": "tiny",
        "pauses": [4, 8],
        "method": {"name": "pause", "pauses": [4, 8]},
        "sampling": {"fps": 2.0, "min_frames": 2, "max_frames": 4, "pixels": 3136},
    }
    (made / META).write_text(json.dumps(meta))
    worlds.write(worlds.make("cups", 1, 0, "fresh"), made / "clip.mp4")
    return made


def found_as_lmms_eval_finds_it() -> type:
    """By the entry point of pyproject.toml."""
    declared = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    place, name = re.search(r'"lmms_eval.models"\]\nsotto = "([\w.]+):(\w+)"', declared).groups()
    manifest = getattr(importlib.import_module(place), name)()
    assert manifest.model_id == "sotto"
    module, _, kind = manifest.simple_class_path.rpartition(".")
    return getattr(importlib.import_module(module), kind)


def requests(folder, *docs, settings=None):
    asked = []
    for i, _ in enumerate(docs):
        arguments = (
            f"<image>\nWhat is {i}?",
            settings or {"max_new_tokens": 16, "until": ["\n\n"]},
            list,
            i,
            "task",
            "test",
        )
        asked.append(Instance("generate_until", arguments, i, {"task": "task", "doc_id": i, "repeats": 1}))
    return asked, {"task": {"test": list(docs)}}


def test_it_is_found_as_lmms_eval_takes_it(harness):
    kind = found_as_lmms_eval_finds_it()
    assert issubclass(kind, Lmms)
    assert kind.is_simple


def test_answers_are_the_engines_own_in_the_order_of_the_requests(harness, folder):
    image = Image.effect_noise((90, 60), 60).convert("RGB")
    kind = found_as_lmms_eval_finds_it()
    made = kind.create_from_arg_string(f"pretrained={folder},pauses=5,longest=6", {"batch_size": 2, "device": "cpu"})
    asked, made.task_dict = requests(folder, [image], [str(folder / "clip.mp4")], [], [image, image.rotate(180)])
    answers = made.generate_until(asked)
    model = models.load(folder, device="cpu")
    assert len(answers) == 4
    for i, answer in enumerate(answers):
        sample = made.sample(asked[i].args, folder)
        assert (sample.question, len(sample.visuals)) == (f"What is {i}?", (1, 1, 0, 2)[i])
        (alone,) = respond(model.backbone, [sample], model.method, "silent", 5, longest=6)
        assert alone.slots == 5
        assert answer == answer_of(alone.text)
    assert [told[0] for told in made.cache_hook.told] == ["generate_until"] * 4
    assert (made.batch_size, made.rank, made.world_size) == (2, 0, 1)


def test_what_it_cannot_do_is_said(harness, folder):
    kind = found_as_lmms_eval_finds_it()
    made = kind(pretrained=str(folder), device="cpu")
    image = Image.effect_noise((90, 60), 60)
    asked, made.task_dict = requests(folder, [7])
    with pytest.raises(ValueError, match="shows a int; this engine takes images"):
        made.generate_until(asked)
    asked, made.task_dict = requests(folder, [image], settings={"temperature": 0.7})
    with pytest.raises(ValueError, match="greedily"):
        made.generate_until(asked)
    with pytest.raises(NotImplementedError, match="generate_until"):
        made.loglikelihood([])
    with pytest.raises(ValueError, match="mode=loud"):
        kind(pretrained=str(folder), mode="loud", device="cpu")
    with pytest.raises(ValueError, match="kind=riddle: one of multiple choice"):
        kind(pretrained=str(folder), kind="riddle", device="cpu")


def test_a_question_can_be_asked_as_in_training(harness, folder):
    """With what a type of problem puts behind it, a task's question and options are those of a sample of training."""
    made = found_as_lmms_eval_finds_it()(pretrained=str(folder), kind="multiple choice", device="cpu")
    asked, made.task_dict = requests(folder, [])
    arguments = (with_options("Where?", ("left", "right")), *asked[0].args[1:])
    sample = made.sample(arguments, folder)
    trained = Sample(None, "Where?", ("left", "right"), (), "", "multiple choice")
    assert str(context(sample)) == str(context(trained))


@pytest.mark.parametrize(
    ("answer", "stops", "cut"),
    [("B\n\nmore", ["\n\n"], "B\n\nmore"), ("B. more", ["."], "B"), ("B stop", "stop", "B"), ("B", None, "B")],
)
def test_stop_words(harness, answer, stops, cut):
    found_as_lmms_eval_finds_it()
    assert sys.modules["engine.exams.harness"].until(answer, {"until": stops}) == cut
