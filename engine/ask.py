"""From a file and a question to a reply: the whole path in one call, for the page, the command line and ten lines of Python.

reply = ask(load(), read("clip.mp4"), "Where is the ball at the end?", ["left", "middle", "right"])    # load: engine/models.py
reply.answer, reply.thoughts, reply.states.shape
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from engine import generate
from engine.data.samples import MARK, TYPE_HINTS, Sample, answer_of, letter, thoughts_of, with_options
from engine.exams.scores import option_letter
from engine.insight import inside, reconstruction, spoken
from engine.insight.inside import Inside
from engine.insight.subject import Subject
from engine.layout import Frames
from engine.methods.heima import Interpreters
from engine.methods.method import expect_slots
from engine.models import Model
from engine.video import Clip

STEPWISE = "First think it through step by step between <think> and </think>. Then:"
UNTAUGHT = (
    "Nothing in this model's folder says that it was ever trained for pauses: trust the written chain, which every model "
    "can write, rather than the silent answer."
)
UNKNOWN = "The small model abstains:"
REAL = "Ask about an example or a filmed clip; clips of your own need a real model (--model)."
LONGEST_QUESTION = 4000  # characters, options included


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
    familiar: bool  # False: the clip or the question is unlike what this model knows: it abstains, in its first notice
    states: Tensor  # [layers + 1, slots, dim]: the slots' hidden states, embeddings first
    answer_state: Tensor  # [layers + 1, dim]: the state that predicts the answer, after the slots
    teacher_state: Tensor | None  # [layers + 1, dim]: the same in the explicit chain, beside a silent answer
    inside: Inside | None = None  # where it was asked for, and there are slots


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
    expect_slots(pauses)


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
    clip: Clip | None,
    question: str,
    options: Sequence[str] = (),
    pauses: int | None = None,
    write_chain: bool = True,
    report: Callable[[str], None] = lambda stage: None,
    donors: Mapping[str, Clip] | None = None,
) -> Reply:
    """Thinks silently, answers, says the thoughts, and (with `write_chain`) answers again by the written chain; a model that
    knows nothing but the chain answers by that.

    clip: None for a question in words alone.

    donors: clips whose slots are put in the place of this one's, by name; where they are given, be it none, the reply is
    looked into too. pauses: default is the model's usual number. report: is told every stage as it begins, and "" before
    each token, and each part of the looking; by raising, it ends the work. Errors: ValueError with one sentence for what can't be asked.
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
    visual = frames_of(clip)
    sample = posed(model, visual, question, options, kind)
    strange = model.familiarity.strange(backbone, visual, question, options) if model.familiarity else ""
    notices = [f"{UNKNOWN} {strange} {REAL}"] if strange else []
    if visual and model.familiarity and not strange and (longer := model.familiarity.longer(visual)):
        notices.append(longer)
    notices += [*(clip.notices if clip else ()), *_bounds(model, pauses)]
    silent = model.method.silent
    thought = model.method.thinking(pauses) if silent else ()
    feedback, marks = model.method.feedback(model.companions), model.method.marks
    longest = model.method.longest if options or model.small else max(model.method.longest, model.longest_chain)
    thoughts = timed(
        "think",
        "Thinking silently",
        lambda: generate.think(backbone, [sample], thought, feedback, model.method.context),
    )
    written = timed("answer", "Answering", lambda: generate.answer(backbone, thoughts, marks, longest, heed)
                    if silent else _chain(model, thoughts, None, heed))  # fmt: skip
    answer = answer_of(written.text[0], model.dialect)
    chances: tuple[Option, ...] = ()
    letters = [letter(i) for i in range(len(options))]
    picked = meant(answer, options)
    if options and model.dialect == "chat":  # in plain text an answer has no place where a letter must stand
        if model.taught:
            shares = generate.shares_of(
                backbone, _first(model, written), [model.method.space + each for each in letters]
            )
        else:
            shares = generate.option_probabilities(backbone, thoughts, letters, [generate.ANSWER_TAG.name])
        chances = tuple(Option(text, share) for text, share in zip(options, shares[0].tolist(), strict=True))
    if picked:
        answer = options[letters.index(picked)]
    elif chances:
        notices.append(
            f"The model wrote {answer[:60]!r}, which isn't an option's letter; its likeliest option is shown."
        )
        answer = max(chances, key=lambda option: option.probability).text
    elif options:
        notices.append(f"The model wrote {answer[:60]!r}, which is none of the options.")
    elif written.ids[0][-1] != backbone.end:
        notices.append(f"The answer is cut off after {written.tokens[0]} tokens.")
    said_aloud = timed("speak", "Saying the thoughts", lambda: _aloud(model, sample, thoughts, heed))
    explicit, chain, teacher_state = None, None, None
    # What the chain's prefill is, where it isn't the silent answer's: that of another prompt, or one without fed-back slots.
    other = sample if thoughts.serial else None
    other = other if model.taught else posed(model, visual, question, options, kind, chain=True)
    if not silent:
        chain = written
    elif write_chain and model.method.writes:
        chain = timed("explicit", "Writing the chain out", lambda: _chain(model, thoughts, other, heed))
        opened = _behind_tag(model, chain)
        teacher_state = None if opened is None else _alone(opened)
    if chain:
        said = answer_of(chain.text[0], model.dialect)
        if options and (picked := meant(said, options)):
            said = options[letters.index(picked)]
        text = thoughts_of(chain.text[0], model.dialect)
        prefill = 0.0 if silent and other else seconds["think"]
        explicit = Explicit(text, said, chain.tokens[0], prefill + seconds["explicit" if silent else "answer"])
    seen = None
    if donors is not None and model.taught:  # slots that mean nothing to a model have nothing to look at
        subject = Subject(backbone, model.method, pauses, model.companions, model.tuned)
        others = {name: replace(sample, visual=frames_of(other)) for name, other in donors.items()}
        seen = timed(
            "inside", "Looking inside", lambda: inside.look(subject, sample, thoughts, said_aloud, chain, others, heed)
        )
    settings = {
        "model": model.name, "pauses": pauses, "question": question, "options": list(options), **_read(clip),
        "device": str(backbone.device), "silent": silent,
        "writes": model.method.writes, "speaks": _speaks(model), "taught": model.taught, "thinks": model.method.thinks,
    }  # fmt: skip
    generated = written.tokens[0] + thoughts.serial  # a slot that is fed back costs a step, as a token does
    return Reply(
        answer, chances, said_aloud, explicit, thoughts.count, generated, seconds,
        tuple(notices), settings, not strange, thoughts.states[:, 0].float().cpu(),
        _alone(_first(model, written)), teacher_state, seen,
    )  # fmt: skip


def meant(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that was written, alone, with its text, or by its text; "" where that is none."""
    return answer if answer in map(letter, range(len(options))) else option_letter(answer, options)


def _aloud(model: Model, sample: Sample, thoughts: generate.Thoughts, heed: Callable[[], None]) -> str:
    """The thoughts in words, by their interpreters where the model writes thinking tokens. Nothing where nobody has learnt to
    say them."""
    backbone, method, companions = model.backbone, model.method, model.companions
    if isinstance(method, Interpreters):
        return reconstruction.unfolded(backbone, companions, method, sample, heed)
    if not spoken.speaks(method, companions):
        return ""
    return spoken.aloud(backbone, method, companions, thoughts, model.dialect, heed)[0]


def _speaks(model: Model) -> bool:
    """Whether anyone has learnt to say its thoughts, see `_aloud`."""
    return isinstance(model.method, Interpreters) or spoken.speaks(model.method, model.companions)


def _chain(
    model: Model, thoughts: generate.Thoughts, other: Sample | None, heed: Callable[[], None]
) -> generate.Written:
    """The written chain behind the same prefill, or behind that of another prompt."""
    if other is not None:
        thoughts = generate.think(model.backbone, [other], (), asked=model.method.context)
    return generate.explicit(model.backbone, thoughts, model.longest_chain, heed)


def _read(clip: Clip | None) -> dict[str, Any]:
    """What was read of a clip, as settings tell it."""
    if clip is None:
        return {"frames": 0, "frame_times": [], "frame_size": None, "reader": None, "sampling": None}
    times, size = [round(float(t), 4) for t in clip.times], list(clip.frames.shape[2:0:-1])
    read = {"frames": len(clip.frames), "frame_times": times, "frame_size": size, "reader": clip.reader}
    return read | {"sampling": asdict(clip.sampling)}


def frames_of(clip: Clip | None) -> Frames | None:
    """What a model is shown of a clip; of a single picture, an image."""
    return Frames(clip.frames, clip.seconds_per_frame, still=len(clip.frames) == 1) if clip else None


def _behind_tag(model: Model, written: generate.Written) -> Tensor | None:
    """The state that predicted the first token behind what opens the answer, a tag or plain text's mark: [layers + 1, 1, dim];
    None where no answer was opened."""
    ids, opens = written.ids[0], MARK.pattern if model.dialect == "plain" else re.escape(model.method.opened)
    if not re.search(opens, written.text[0]):
        return None
    # From the end, where the answer is. What opens it is one token, or is spelled.
    for place in range(min(len(ids), len(written.states) - 1), 0, -1):
        if re.search(f"(?:{opens})$", model.backbone.decode(ids[:place])):
            return written.states[place, :, :1]
    return None


def _first(model: Model, written: generate.Written) -> Tensor:
    """The state that predicted the answer's first token, which without a tag is the first of all: [layers + 1, 1, dim]."""
    behind = _behind_tag(model, written)
    return written.states[0, :, :1] if behind is None else behind


def _alone(states: Tensor) -> Tensor:
    """[layers + 1, 1, dim] -> [layers + 1, dim]"""
    return states[:, 0].float().cpu()


def _bounds(model: Model, pauses: int) -> list[str]:
    """What the model doesn't know, in sentences."""
    said = []
    if not model.taught:
        said.append(UNTAUGHT)
    elif not model.method.silent:
        said.append("This model has learnt to answer by its written chain alone.")
    elif not model.method.writes:
        thoughts = "" if _speaks(model) else "say its thoughts or "
        said.append(f"This model has only learnt to answer silently: it can't {thoughts}write its chain.")
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
