"""lmms-eval's plugin, held against a stand-in of its published interface (0.7): lmms-eval itself need not be installed."""

import abc
import importlib
import json
import sys
import types
from dataclasses import dataclass, field

import pytest
from PIL import Image

from engine import models, worlds
from engine.data.samples import answer_of
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
    sys.modules.pop("engine.exams.harness.models.sotto", None)


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
    """LMMS_EVAL_PLUGINS=engine.exams.harness: `<plugin>.models` says a model's name and class, which is in the file of that name."""
    plugin = importlib.import_module("engine.exams.harness.models")
    ((name, kind),) = plugin.AVAILABLE_MODELS.items()
    return getattr(importlib.import_module(f"engine.exams.harness.models.{name}"), kind)


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


def test_the_engine_itself_never_imports_lmms_eval():
    importlib.import_module("engine.exams.harness")
    importlib.import_module("engine.exams.harness.models")
    assert "lmms_eval" not in sys.modules


def test_both_ways_of_naming_it_reach_the_class(harness):
    kind = found_as_lmms_eval_finds_it()
    assert issubclass(kind, Lmms)
    assert kind.is_simple
    manifest = importlib.import_module("engine.exams.harness").manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert (manifest.model_id, getattr(importlib.import_module(module), name)) == ("sotto", kind)


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


@pytest.mark.parametrize(
    ("answer", "stops", "cut"),
    [("B\n\nmore", ["\n\n"], "B\n\nmore"), ("B. more", ["."], "B"), ("B stop", "stop", "B"), ("B", None, "B")],
)
def test_stop_words(harness, answer, stops, cut):
    found_as_lmms_eval_finds_it()
    assert sys.modules["engine.exams.harness.models.sotto"].until(answer, {"until": stops}) == cut
