"""From a file and a question to a reply: the whole path in one call, for the page, the command line and ten lines of Python.

backbone = load()                                   # the small model that ships; or a folder or Hub id
reply = ask(backbone, read("clip.mp4"), "Where is the ball at the end?", ["left", "middle", "right"])
reply.answer, reply.thoughts, reply.states.shape
"""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine import adapters, generate
from engine.backbones.base import Backbone
from engine.backbones.load import devices
from engine.backbones.load import load as load_backbone
from engine.config import ConfigError, build
from engine.data.samples import TYPE_HINTS, Dialect, Sample, letter, with_options
from engine.exams.scores import option_letter
from engine.familiarity import Familiarity
from engine.insight import inside, reconstruction, spoken
from engine.insight.inside import Inside
from engine.insight.lens import TunedLens
from engine.insight.subject import Subject
from engine.layout import Frames, Layout, Segment, slots
from engine.methods import from_description
from engine.methods.heima import Interpreters
from engine.methods.method import META, Method
from engine.methods.pause import PauseDistillation
from engine.video import Clip, Sampling

SMALL = Path(__file__).parent.parent / "assets" / "small"
PUBLISHED_SAMPLING = Sampling(fps=2.0, min_frames=4, max_frames=16, pixels=128 * 28 * 28)
LONGEST_CHAIN = 1024  # tokens of a real model's written chain
STEPWISE = "First think it through step by step between <think> and </think>. Then:"
UNTAUGHT = (
    "Nothing in this model's folder says that it was ever trained for pauses: trust the written chain, which every model "
    "can write, rather than the silent answer."
)
UNKNOWN = "The small model abstains:"
REAL = "For clips of your own, choose a real model with --model."
MOST_PAUSES = 256
LONGEST_QUESTION = 4000  # characters, options included


@dataclass(frozen=True)
class Untaught(Method):
    """A model as others published it: it knows none of the methods' tokens, so it is asked in plain words, and what is
    given to it before its answer are slots that mean nothing to it, if any are asked for.
    """

    marks: ClassVar[tuple[str, ...]] = ()

    def thinking(self, count: int) -> tuple[Segment, ...]:
        return (slots("<pause>", count),) if count else ()

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        raise ConfigError(f"Nothing in the model's folder ({META}) says how it was trained.")


@dataclass(frozen=True)
class Model:
    """A backbone with what its folder says about it."""

    backbone: Backbone
    name: str
    trained_pauses: tuple[int, int] | None  # fewest and most pauses in training; None = never trained for pauses
    sampling: Sampling
    familiarity: Familiarity | None  # None: knows no bounds to its world
    method: Method = field(default_factory=PauseDistillation)
    companions: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    tuned: TunedLens | None = None
    dialect: Dialect = "chat"  # in which it was taught
    image_pixels: int | None = None  # most of one image in training; None: as of a clip's frame
    folders: tuple[Path, ...] = ()  # that its files, and its adapter's, lie in

    @property
    def small(self) -> bool:
        return self.familiarity is not None

    @property
    def layers(self) -> int:
        return self.backbone.layers

    @property
    def taught(self) -> bool:
        """Whether it was trained by one of this project's methods, and knows their tokens."""
        return not isinstance(self.method, Untaught)

    @property
    def usual_pauses(self) -> int:
        """8, or the nearest number that it was trained with."""
        return self.pauses_near(8)

    def sampling_of(self, still: bool) -> Sampling:
        """How clips, or images, were looked at in training."""
        return replace(self.sampling, pixels=self.image_pixels) if still and self.image_pixels else self.sampling

    def pauses_near(self, wanted: int) -> int:
        """The nearest number to `wanted` that it was trained with; none where it was never trained for them."""
        if self.trained_pauses is None:
            return 0
        return min(max(wanted, self.trained_pauses[0]), self.trained_pauses[1])

    @property
    def longest_chain(self) -> int:
        return generate.LONGEST_CHAIN if self.small else LONGEST_CHAIN


@dataclass(frozen=True)
class Option:
    text: str
    probability: float


@dataclass(frozen=True)
class Explicit:
    """The same question answered by the written chain."""

    text: str
    answer: str
    generated_tokens: int
    seconds: float


@dataclass(frozen=True)
class Reply:
    answer: str  # the option's text where there are options, else what the model wrote
    options: tuple[Option, ...]  # empty for an open question
    thoughts: str
    explicit: Explicit | None
    slots: int
    generated_tokens: int
    seconds: dict[str, float]
    notices: tuple[str, ...]
    settings: dict[str, Any]
    familiar: bool  # False: the clip or the question is unlike what this model knows, and it abstains
    states: Tensor  # [layers + 1, slots, dim]: the slots' hidden states, embeddings first
    answer_state: Tensor  # [layers + 1, dim]: the state that predicts the answer, after the slots
    teacher_state: Tensor | None  # [layers + 1, dim]: the same in the explicit chain, beside a silent answer
    inside: Inside | None = None  # where it was asked for, and there are slots


def load(path: str | Path | None = None, adapter: str | Path | None = None, device: str = "auto") -> Model:
    """The embedded model (None), a folder, or a Hub id; with a PEFT adapter merged in if one is named.

    Errors: ValueError with one sentence for a folder that is no model, another family, or a broken file.
    """
    place = Path(path) if path else SMALL / "pause"
    if not place.is_dir() and (
        path is None or place.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1
    ):
        raise ValueError(f"There is no folder {place}: name one that holds a model, or a Hub id.")
    if device == "auto":
        device = devices()[0]
    if device.partition(":")[0] not in devices():
        raise ValueError(f"There is no device {device} here that torch can use: choose among {', '.join(devices())}.")
    try:
        place = local(place)
        adapter = local(adapter) if adapter else None
        meta = {key: value for folder in (place, adapter) if folder for key, value in _meta(folder).items()}
        method: Method = PauseDistillation() if meta.get("pauses") else Untaught()
        if "method" in meta:
            method = from_description(meta["method"])
        backbone = load_backbone(str(place), device, precision(device, place), method.tokens)
        if adapter:
            adapters.merge(backbone.model, adapter)
            backbone.model.eval()
        pauses = tuple(meta["pauses"]) if meta.get("pauses") else None
        sampling = build(Sampling, meta["sampling"], "sampling.") if "sampling" in meta else PUBLISHED_SAMPLING
        companions = method.companions(backbone)
        adapters.load_companions(Path(adapter or place), companions)
        familiarity = Familiarity.load(place)
        tuned = TunedLens.load(place, backbone)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"Can't load {place}: ")[:300]
        raise ValueError(f"Can't load {adapter or place}: {reason}") from None
    companions.to(device, backbone.model.dtype)
    return Model(
        backbone, meta.get("name", str(path)), pauses, sampling, familiarity, method, companions, tuned,
        meta.get("dialect", "chat"), meta.get("image_pixels"), (place, adapter) if adapter else (place,),
    )  # fmt: skip


def local(place: str | Path) -> Path:
    """A folder as it is; of a Hub id, the folder that its files are downloaded to, without pickles."""
    if Path(place).is_dir() or str(place).startswith((".", "/", "~")):
        return Path(place)
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(str(place), allow_patterns=kinds, ignore_patterns=["original/*", "consolidated*"]))


def precision(device: str, folder: Path) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU in whose free memory the weights wouldn't fit twice over in float32; else float32.

    Apple's GPUs compute in bfloat16 from macOS 14 on. float16 is never chosen: activations of such models overflow it.
    """
    if device == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    if device != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if 2 * 4 * parameters(folder) > psutil.virtual_memory().available else torch.float32


def parameters(folder: Path) -> int:
    """How many numbers the folder's weights hold, by the files' headers alone; those of unreadable files don't count."""
    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as stored:
                (length,) = struct.unpack("<Q", stored.read(8))
                header = json.loads(stored.read(min(length, file.stat().st_size)))
            count += sum(math.prod(each["shape"]) for name, each in header.items() if name != "__metadata__")
        except (ValueError, struct.error, KeyError, TypeError, AttributeError):
            continue
    return count


def _meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / META).read_text(encoding="utf-8")) if (folder / META).is_file() else {}


def check(question: str, options: Sequence[str], pauses: int) -> None:
    """Errors: ValueError with one sentence for what can't be asked."""
    if not question.strip():
        raise ValueError("The question is empty: type one.")
    if len(question) + sum(map(len, options)) > LONGEST_QUESTION:
        raise ValueError(f"Question and options are longer than {LONGEST_QUESTION} characters.")
    if options and any(not option.strip() for option in options):
        raise ValueError("An option is empty.")
    if len(set(options)) != len(options):
        raise ValueError("Two options are the same.")
    if len(options) == 1 or len(options) > 26:
        raise ValueError(f"{len(options)} option{'s' * (len(options) > 1)}: give none, or 2 to 26.")
    if not 0 <= pauses <= MOST_PAUSES:
        raise ValueError(f"{pauses} pauses: choose 0 to {MOST_PAUSES}.")


def posed(
    model: Model, visual: Frames | None, question: str, options: Sequence[str], kind: str, chain: bool = False
) -> Sample:
    """The question as this model is used to being asked. kind: a type of problem, see `TYPE_HINTS`.

    To one that was taught in plain text, options stand behind the question, and nothing is said of the answer's form. To
    another of ours the tags around an answer are tokens, and it writes a chain because it was taught to. Any other is asked
    in words: for the answer alone, or with `chain` to think step by step first.
    """
    if model.dialect == "plain":
        return Sample(visual, with_options(question, options), (), (), "", kind, "plain")
    if model.taught or not TYPE_HINTS[kind]:
        return Sample(visual, question, tuple(options), (), "", kind)
    hint = f"{TYPE_HINTS[kind]} within the <answer> </answer> tags."
    words = [with_options(question, options), *[STEPWISE] * chain, hint]
    return Sample(visual, "\n".join(words), (), (), "", "as asked")


def ask(
    model: Model,
    clip: Clip,
    question: str,
    options: Sequence[str] = (),
    pauses: int | None = None,
    write_chain: bool = True,
    report: Callable[[str], None] = lambda stage: None,
    donors: Mapping[str, Clip] | None = None,
) -> Reply:
    """Thinks silently, answers, says the thoughts, and (with `write_chain`) answers again by the written chain; a model that
    knows nothing but the chain answers by that.

    donors: clips whose slots are put in the place of this one's, by name; where they are given, be it none, the reply is
    looked into too. pauses: default is the model's usual number. report: is told every stage as it begins, and "" before
    each token; by raising, it ends the work. Errors: ValueError with one sentence for what can't be asked.
    """
    pauses = model.usual_pauses if pauses is None else pauses
    check(question, options, pauses)
    backbone, seconds, heed = model.backbone, {}, partial(report, "")

    def timed(name: str, stage: str, work: Callable[[], Any]) -> Any:
        report(stage)
        began = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - began
        return result

    kind = "multiple choice" if options else "free-form"
    visual = _frames(clip)
    sample = posed(model, visual, question, options, kind)
    notices = [*clip.notices, *_bounds(model, visual, question, pauses)]
    silent = model.method.silent
    thought = model.method.thinking(pauses) if silent else ()
    feedback, marks = model.method.feedback(model.companions), model.method.marks
    familiar = not any(notice.startswith(UNKNOWN) for notice in notices)
    thoughts = timed("think", "Thinking silently", lambda: generate.think(backbone, [sample], thought, feedback))
    written = timed("answer", "Answering", lambda: generate.answer(backbone, thoughts, marks, model.method.longest, heed)
                    if silent else _chain(model, thoughts, None, heed))  # fmt: skip
    answer = generate.answer_of(written.text[0], model.dialect)
    chances: tuple[Option, ...] = ()
    letters = [letter(i) for i in range(len(options))]
    picked = meant(answer, options)
    if options and model.dialect == "chat":  # in plain text an answer has no place where a letter must stand
        if model.taught:
            before = _before_answer(model, written)
            shares = generate.shares_of(backbone, before, [model.method.space + each for each in letters])
        else:
            shares = generate.option_probabilities(backbone, thoughts, letters, [generate.ANSWER_TAG.name])
        chances = tuple(Option(text, share) for text, share in zip(options, shares[0].tolist(), strict=True))
    if picked:
        answer = options[letters.index(picked)]
    elif chances:
        notices.append(f"The model wrote {answer[:60]!r}, which is no option's letter; its likeliest option is given.")
        answer = max(chances, key=lambda option: option.probability).text
    elif options:
        notices.append(f"The model wrote {answer[:60]!r}, which is none of the options.")
    said_aloud = timed("speak", "Saying the thoughts", lambda: _aloud(model, sample, thoughts, heed))
    explicit, chain, teacher_state = None, None, None
    asked_for_chain = None if model.taught else posed(model, visual, question, options, kind, chain=True)
    if not silent:
        chain = written
    elif write_chain and model.method.writes:
        chain = timed("explicit", "Writing the chain out", lambda: _chain(model, thoughts, asked_for_chain, heed))  # fmt: skip
        teacher_state = _answer_state(model, chain)
    if chain:
        said = generate.answer_of(chain.text[0], model.dialect)
        if options and (picked := meant(said, options)):
            said = options[letters.index(picked)]
        text = generate.thoughts_of(chain.text[0], model.dialect)
        prefill = seconds["think"] if model.taught else 0.0  # another prompt has its own, within "explicit"
        explicit = Explicit(text, said, chain.tokens[0], prefill + seconds["explicit" if silent else "answer"])
    seen = None
    if donors is not None and model.taught:  # slots that mean nothing to a model have nothing to look at
        subject = Subject(backbone, model.method, pauses, model.companions, model.tuned)
        others = {name: replace(sample, visual=_frames(other)) for name, other in donors.items()}
        seen = timed(
            "inside", "Looking inside", lambda: inside.look(subject, sample, thoughts, said_aloud, chain, others)
        )
    settings = {
        "model": model.name, "pauses": pauses, "question": question, "options": list(options), "frames": len(clip.frames),
        "frame_times": [round(float(t), 4) for t in clip.times], "frame_size": list(clip.frames.shape[2:0:-1]),
        "reader": clip.reader, "device": str(backbone.device), "silent": silent,
        "writes": model.method.writes, "speaks": _speaks(model),
    }  # fmt: skip
    generated = written.tokens[0] + thoughts.serial  # a slot that is fed back costs a step, as a token does
    return Reply(
        answer, chances, said_aloud, explicit, thoughts.count, generated, seconds,
        tuple(notices), settings, familiar, thoughts.states[:, 0].float().cpu(),
        _answer_state(model, written), teacher_state, seen,
    )  # fmt: skip


def meant(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that was written, alone, with its text, or by its text; "" where that is none."""
    return answer if answer in map(letter, range(len(options))) else option_letter(answer, options)


def _aloud(model: Model, sample: Sample, thoughts: generate.Thoughts, heed: Callable[[], None]) -> str:
    """The thoughts in words: said from the slots alone, by their interpreters where the model writes thinking tokens, or by the
    step decoder that taught them. Nothing where nobody has learnt to say them."""
    backbone, method, companions = model.backbone, model.method, model.companions
    if isinstance(method, Interpreters):
        return reconstruction.unfolded(backbone, companions, method, sample)
    if method.speaks:
        return generate.thoughts_of(generate.speak(backbone, thoughts, heed=heed).text[0], model.dialect)
    if not thoughts.count or not spoken.tells(method, companions):
        return ""
    return "\n".join(spoken.taught(backbone, method, companions, thoughts, thoughts.count)[0])


def _speaks(model: Model) -> bool:
    """Whether anyone has learnt to say its thoughts, see `_aloud`."""
    method = model.method
    return method.speaks or isinstance(method, Interpreters) or spoken.tells(method, model.companions)


def _chain(
    model: Model, thoughts: generate.Thoughts, other: Sample | None, heed: Callable[[], None]
) -> generate.Written:
    """The written chain behind the same prefill, or behind that of another prompt."""
    if other is not None:
        thoughts = generate.think(model.backbone, [other], ())
    return generate.explicit(model.backbone, thoughts, model.longest_chain, heed)


def _frames(clip: Clip) -> Frames:
    return Frames(clip.frames, clip.seconds_per_frame, still=len(clip.frames) == 1)


def _before_answer(model: Model, written: generate.Written) -> Tensor:
    """The state that predicted the first token behind the tag that opens the answer, or the first of all without one:
    [layers + 1, 1, dim]."""
    ids, opened = written.ids[0], model.method.opened
    # From the end, where the answer is. The tag is one token, or is spelled.
    places = range(min(len(ids), len(written.states) - 1), 0, -1) if opened in written.text[0] else ()
    place = next((end for end in places if model.backbone.decode(ids[:end]).endswith(opened)), 0)
    return written.states[place, :, :1]


def _answer_state(model: Model, written: generate.Written) -> Tensor:
    """[layers + 1, dim]"""
    return _before_answer(model, written)[:, 0].float().cpu()


def _bounds(model: Model, visual: Frames, question: str, pauses: int) -> list[str]:
    """What the model doesn't know, in sentences."""
    said = []
    if model.familiarity is not None:
        if model.familiarity.distance(model.backbone, visual) > model.familiarity.limit:
            said.append(f"{UNKNOWN} this clip is unlike the three small worlds that it was trained on. {REAL}")
        elif question.strip() not in model.familiarity.questions:
            said.append(f"{UNKNOWN} this question is none of those that it was trained on. {REAL}")
    if not model.taught:
        said.append(UNTAUGHT)
    elif not model.method.silent:
        said.append("This model has learnt to answer by its written chain alone.")
    elif not model.method.writes:
        thoughts = "" if _speaks(model) else "say its thoughts or "
        said.append(f"This model has learnt to answer silently alone: it can't {thoughts}write its chain.")
    elif model.trained_pauses is None:
        said.append("This model was never trained for pauses: trust the written chain rather than the silent answer.")
    if model.taught and model.method.silent and model.trained_pauses is not None:
        low, high = model.trained_pauses
        if not low <= pauses <= high:
            known = low if low == high else f"{low} to {high}"
            said.append(f"This model was trained with {known} pauses, not {pauses}.")
    return said


def as_json(reply: Reply, reading: float, states: bool = False) -> dict[str, Any]:
    """A reply in JSON's own types; with `states`, hidden states and what was seen inside too. reading: seconds for the clip."""
    told = {
        "answer": reply.answer,
        "options": [asdict(option) for option in reply.options] or None,
        "thoughts": reply.thoughts,
        "explicit": asdict(reply.explicit) if reply.explicit else None,
        "slots": reply.slots,
        "generated_tokens": reply.generated_tokens,
        "seconds": {"video": reading, **reply.seconds},
        "familiar": reply.familiar,
        "notices": list(reply.notices),
        "settings": reply.settings,
    }
    if not states:
        return told
    teacher = None if reply.teacher_state is None else _rounded(reply.teacher_state)
    held = {"slots": _rounded(reply.states), "answer": _rounded(reply.answer_state), "teacher": teacher}
    return told | {"states": held, "inside": inside.as_json(reply.inside) if reply.inside else None}


def _rounded(states: Tensor) -> list[Any]:
    return states.nan_to_num().double().numpy().round(4).tolist()
