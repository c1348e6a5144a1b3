"""One training or test sample, the chat prompt it becomes, and its chain and answer found again in a reply.

Knows no model and no file format, and of methods only the marks by which those that are trained here enclose or open an
answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.config import ConfigError
from engine.container import VideoError
from engine.layout import BEGIN, CLOSE, END, REPLY, Opening, Piece, Seen, Segment, Special, target

SYSTEM = "You are a helpful assistant"

# Implicit-Video-Reasoning's (Video-R1's) hints, by type of problem; each ends with the place of the answer's tags.
TYPE_HINTS = {
    "multiple choice": "Please provide only the single option letter (e.g., A, B, C, D, etc.)",
    "numerical": "Please provide the numerical value (e.g., 42 or 3.14)",
    "regression": "Please provide the numerical value (e.g., 42 or 3.14)",
    "OCR": "Please transcribe text from the image/video clearly and provide your text answer",
    "free-form": "Please provide your text answer",
    "as asked": "",  # no hint, as with LLaVA-CoT's questions
}


Dialect = Literal["chat", "plain"]

# Where an answer and a chain stand in what was written.
ANSWER = re.compile(r"<(?:answer|CONCLUSION)>\s*(.*?)\s*</(?:answer|CONCLUSION)>", re.DOTALL)
THOUGHTS = re.compile(r"<think>\s*(.*?)\s*</think>", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
MARK = re.compile(r"#{3,}|The answer is:")  # of a plain answer: Coconut's, CODI's
LOOSE = re.compile(r"(?<!\S)##?(?!\S)")  # Coconut scores what follows any "#"; within a word it's no mark ("C#")


@dataclass(frozen=True)
class Sample:
    """`dialect`: how a sample becomes text. chat: a turn of a conversation, the steps between <think> and </think>, the
    answer between <answer> and </answer>. plain: Coconut's, the question, a step a line, `### answer`, unless the method says
    how else they are joined.
    """

    visual: Seen | tuple[Seen, ...] | None  # several: images, in the order in which they are asked about
    question: str  # without options and hint
    options: tuple[str, ...]  # empty for anything but multiple choice
    steps: tuple[str, ...]  # the written chain; a chain that isn't divided is one step
    answer: str
    problem_type: str = "multiple choice"
    dialect: Dialect = "chat"
    sections: tuple[str, ...] = ()  # the names of `steps`, one each, where the chain has named sections
    where: str = field(default="", compare=False)  # the file and row that it was read from

    @property
    def thoughts(self) -> str:
        return "\n".join(self.steps)

    @property
    def visuals(self) -> tuple[Seen, ...]:
        if self.visual is None:
            return ()
        return self.visual if isinstance(self.visual, tuple) else (self.visual,)


def looked_at(sample: Sample, see: Callable[[Seen], Seen]) -> Sample:
    """The sample with what it shows as `see` gives it back: a backbone's reads and cuts it for the vision encoder.

    Errors: VideoError naming the row whose file can't be read, ConfigError naming one that the model has no eyes for.
    """
    try:
        visuals = tuple(see(visual) for visual in sample.visuals)
    except (VideoError, ConfigError) as error:
        raise type(error)(f"{sample.where}: {error}" if sample.where else str(error)) from None
    return replace(sample, visual=visuals[0] if len(visuals) == 1 else visuals or None)


def letter(index: int) -> str:
    return chr(ord("A") + index)


def option_lines(options: Sequence[str]) -> str:
    return "\n".join(f"{letter(i)}. {option}" for i, option in enumerate(options))


def user_turn(question: str, options: Sequence[str], problem_type: str = "multiple choice") -> tuple[Piece, ...]:
    """Question, options a line each, and the type's hint.

    Only the hint's answer tags are structure; whatever stands in the question or the options is text.
    Errors: ValueError for an unknown type of problem, or more than 26 options.
    """
    if problem_type not in TYPE_HINTS:
        raise ValueError(f"Unknown problem type {problem_type!r}: use one of {', '.join(TYPE_HINTS)}.")
    if len(options) > 26:
        raise ValueError(f"{len(options)} options: at most 26 have a letter.")
    text = with_options(question, options)
    if not TYPE_HINTS[problem_type]:
        return (text,)
    text += f"\n{TYPE_HINTS[problem_type]} within the "
    return text, Special("<answer>"), " ", Special("</answer>"), " tags."


def with_options(question: str, options: Sequence[str]) -> str:
    """Question, options a line each."""
    return f"{question} Options:\n{option_lines(options)}" if options else question


def question_text(sample: Sample) -> str:
    """All that a sample asks in words, without what it hints at."""
    return with_options(sample.question, sample.options)


def context(sample: Sample, behind: str = "\n") -> Segment:
    """Chat: system prompt, the user's turn and the opening of the assistant's. Plain: the question, and `behind` it.

    The chat format, what a text begins with, and the tokens around a visual, are the family's, and the backbone's to write.
    """
    if sample.dialect == "plain":
        return Segment("context", (BEGIN, *sample.visuals, f"{sample.question}{behind}"))
    turn = user_turn(sample.question, sample.options, sample.problem_type)
    return Segment("context", (Opening(SYSTEM, bool(sample.visuals)), *sample.visuals, *turn, REPLY))


def chain(sample: Sample, first: int = 0, between: str = "\n", behind: str = "\n") -> Segment:
    """The written steps from `first` on; in chat between their tags, in plain with what stands between two of them and behind
    the last."""
    steps = sample.steps[first:]
    if sample.dialect == "plain":
        return target(between.join(steps) + behind if steps else "")
    return target(Special("<think>"), "\n".join(steps), Special("</think>"))


def hint(words: str) -> Segment:
    """The beginning of a chain in chat, given rather than predicted; what follows is left to the slots."""
    return Segment("context", (Special("<think>"), words) if words else ())


def solution(sample: Sample, prompt: str = "###") -> tuple[Segment, ...]:
    """The answer behind its mark; the part called "answer" is what distillation aligns. `prompt`: plain text's mark."""
    if sample.dialect == "plain":
        return target(prompt), target(f" {sample.answer}", name="answer")
    return (
        target(Special("<answer>")),
        target(sample.answer, name="answer"),
        target(Special("</answer>")),
    )


def ending(sample: Sample) -> Segment:
    """What ends the turn; in chat with what the model's format has behind it, such as a line break."""
    return target(END if sample.dialect == "plain" else CLOSE)


def answer_of(text: str, dialect: Dialect = "chat") -> str:
    """What stands between the last answer or conclusion tags, or without tags the whole text; plain: of that, what follows
    the last mark, thousands without commas."""
    for found in ANSWER.finditer(text):
        text = found[1]
    if dialect == "plain":
        text = re.sub(r"(?<=\d),(?=\d)", "", LOOSE.split(MARK.split(text)[-1])[-1])
    return text.strip()


def thoughts_of(text: str, dialect: Dialect = "chat") -> str:
    """chat: what stands between the first thinking tags; plain: what stands before the mark. An unfinished chain counts up
    to where it stops."""
    if dialect == "plain":
        return MARK.split(text)[0].strip()
    found = THOUGHTS.search(text)
    if found:
        return found[1]
    return TAG.split(text.partition("<think>")[2] or text)[0].strip()
