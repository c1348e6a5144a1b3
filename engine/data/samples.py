"""One training or test sample, and the chat prompt it becomes. Knows no method, model or file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.layout import Piece, Segment, Special, Visual, target

SYSTEM = "You are a helpful assistant"

# Implicit-Video-Reasoning's (Video-R1's) hints, by type of problem; each ends with the place of the answer's tags.
TYPE_HINTS = {
    "multiple choice": "Please provide only the single option letter (e.g., A, B, C, D, etc.)",
    "numerical": "Please provide the numerical value (e.g., 42 or 3.14)",
    "regression": "Please provide the numerical value (e.g., 42 or 3.14)",
    "OCR": "Please transcribe text from the image/video clearly and provide your text answer",
    "free-form": "Please provide your text answer",
}


@dataclass(frozen=True)
class Sample:
    """`thoughts` is the written chain between <think> and </think>; `answer` stands between <answer> and </answer>."""

    visual: Visual | None
    question: str  # without options and hint
    options: tuple[str, ...]  # empty for anything but multiple choice
    thoughts: str
    answer: str
    problem_type: str = "multiple choice"


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
    if options:
        question = f"{question} Options:\n{option_lines(options)}"
    text = f"{question}\n{TYPE_HINTS[problem_type]} within the "
    return text, Special("<answer>"), " ", Special("</answer>"), " tags."


def context(sample: Sample) -> Segment:
    """System prompt, the user's turn and the opening of the assistant's, in Qwen's chat format."""
    seen: tuple[Piece, ...] = ()
    if sample.visual is not None:
        seen = (Special("<|vision_start|>"), sample.visual, Special("<|vision_end|>"))
    start, end = Special("<|im_start|>"), Special("<|im_end|>")
    turn = user_turn(sample.question, sample.options, sample.problem_type)
    pieces: tuple[Piece, ...] = (
        start, f"system\n{SYSTEM}", end, "\n",
        start, "user\n", *seen, *turn, end, "\n",
        start, "assistant\n",
    )  # fmt: skip
    return Segment("context", pieces)


def chain(sample: Sample) -> Segment:
    """The written thoughts between their tags."""
    return target(Special("<think>"), sample.thoughts, Special("</think>"))


def solution(sample: Sample) -> tuple[Segment, ...]:
    """The answer between its tags; the part called "answer" is what distillation aligns."""
    return (
        target(Special("<answer>")),
        target(sample.answer, name="answer"),
        target(Special("</answer>")),
    )


def end_of_turn() -> Segment:
    return target(Special("<|im_end|>"), "\n")
