"""Heima: each section of a chain becomes one thinking token, which the model predicts and reads like any other token.

<SUMMARY> <THINKING_OF_SUMMARY> </SUMMARY> .. <CONCLUSION> answer </CONCLUSION>

Progressive distillation is a sequence of runs (train/heima.py): `compressed` = 1, 2, .. sections, each from the adapter of
the one before, then a recovering run on the data of the last at a lower learning rate. A sample with fewer sections has
all of them compressed sooner. Then a language model a section, its interpreter, learns to put the state that predicted
the thinking token into words. Knows nothing of backbones, batches or devices.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from engine.backbones.base import SPECIAL_TOKENS, Backbone
from engine.backbones.load import around, load
from engine.config import ConfigError, at_least
from engine.data.samples import Sample, context, ending, question_text
from engine.layout import END, REPLY, Layout, Opening, Piece, Reading, Segment, Special, target
from engine.methods.method import Method, Outcome, Thinking, read, weighted

CONCLUSION = "CONCLUSION"
THOUGHT = "{thought}"  # where a template has the thinking tokens
TEXT = "text"  # the target that is a section's text
TEMPLATES = (
    "{question}\nAnother model saw the picture and kept its {section} in one thought: {thought}. Put it into words.",
    "{question}\nWrite out the {section} that {thought} stands for.",
    "This thought holds the {section} of what was seen: {thought}. The question was: {question}\nWhat does it say?",
    "A {section} was thought silently as {thought} before this was answered: {question}\nSay it aloud.",
    "Question: {question}\nHidden {section}: {thought}\nDecode the {section}.",
    "Unfold {thought} into the full {section} that helps to answer this: {question}",
    "{question}\nThe {section} behind the answer was shortened to {thought}. What was it at full length?",
    "Read the state {thought}, a {section} about this question, and write down what it knows: {question}",
    "{question}\nExplain in sentences what the {section} {thought} contains.",
    "Given the question below and the compressed {section} {thought}, restore the text of the {section}.\n{question}",
)


@dataclass(frozen=True)
class Heima(Method):
    """
    compressed: how many sections, from the first, are thinking tokens; 0 = the plain chain, section by section.
    tags: text, as published; or tokens of their own, without spaces around them, for a vocabulary that would spell them.
    """

    longest: ClassVar[int] = 512  # before the last stage, sections are still written out
    opened: ClassVar[str] = f"<{CONCLUSION}>"

    compressed: int = 3
    per_section: int = 1  # thinking tokens a section
    sections: tuple[str, ...] = ("SUMMARY", "CAPTION", "REASONING")  # every name that the data has
    tags: Literal["text", "tokens"] = "text"

    def __post_init__(self) -> None:
        if not 0 <= self.compressed <= len(self.sections):
            raise ConfigError(
                f"compressed is {self.compressed}: it must be 0 to {len(self.sections)}, as many as there are sections."
            )
        at_least(1, self, "per_section")

    @property
    def thinking_tokens(self) -> tuple[str, ...]:
        return tuple(token for name in self.sections for token in thinking_tokens(name, self.per_section))

    @property
    def tokens(self) -> tuple[str, ...]:  # type: ignore[override]
        names = (*self.sections, CONCLUSION) if self.tags == "tokens" else ()
        return (*SPECIAL_TOKENS, *self.thinking_tokens, *(tag for name in names for tag in (f"<{name}>", f"</{name}>")))

    @property
    def space(self) -> str:
        return "" if self.tags == "tokens" else " "

    @property
    def silent(self) -> bool:
        """As soon as its first section is a thought; until then it is a written chain alone."""
        return self.compressed > 0

    @property
    def writes(self) -> bool:
        return not self.silent

    @property
    def thinks(self) -> Thinking:
        return "tokens" if self.silent else ""

    def tag(self, name: str) -> Piece:
        return Special(f"<{name}>") if self.tags == "tokens" else f"<{name}>"

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        parts = self.sectioned(sample)
        branches = {"answer": (context(sample), *parts, ending(sample))}
        return Layout(branches, readings=self.readings(sample, self.thoughts(parts), rng))

    def sectioned(self, sample: Sample) -> list[Segment]:
        """The sections with their tags, then the conclusion. Thinking tokens are a segment named by their section.

        Errors: ConfigError for a sample whose steps aren't named, or a section that isn't among `sections`.
        """
        if len(sample.sections) != len(sample.steps) or not set(sample.sections) <= set(self.sections):
            raise ConfigError(
                f"Heima needs chains in the sections {', '.join(self.sections)}; this sample has "
                f"{', '.join(sample.sections) or 'unnamed steps'}."
            )
        space, line = self.space, "" if self.tags == "tokens" else "\n\n"
        parts: list[Segment] = []
        run: list[Piece] = []
        for index, (name, step) in enumerate(zip(sample.sections, sample.steps, strict=True)):
            run += [self.tag(name), space]
            if index < self.compressed:
                thought = map(Special, thinking_tokens(name, self.per_section))
                parts += [target(*run), target(*thought, name=name)]
                run = []
            else:
                run += [step]
            run += [space, self.tag(f"/{name}"), line]
        parts += [target(*run, self.tag(CONCLUSION)), target(f"{space}{sample.answer}", name="answer")]
        return [*parts, target(space, self.tag(f"/{CONCLUSION}"))]

    def thoughts(self, parts: Sequence[Segment]) -> list[Segment]:
        """The thinking tokens of each compressed section, in the sample's order."""
        return [part for part in parts if part.name in self.sections]

    def readings(self, sample: Sample, thoughts: Sequence[Segment], rng: np.random.Generator) -> tuple[Reading, ...]:
        """What is read off the thoughts by companions."""
        return ()

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted({"answer": (1.0, out.branch("answer").cross_entropy("tokens"))})


@dataclass(frozen=True)
class Interpreters(Heima):
    """A language model a section, without eyes, that says what the section's thinking tokens stand for. Heima is frozen.

    Its prompt is one of ten templates with the question and the thinking tokens, in whose places the states stand that
    predicted them (one row before each); everything else is embedded by its own table.

    interpreter: the language model that each starts from, a folder or Hub id with Heima's vocabulary; without one, a
    copy of Heima's own language model.
    train_on_input: the prompt is learnt too, as published, from the words of the turn on.
    """

    frozen: ClassVar[bool] = True

    interpreter: str = ""
    interpreted: tuple[str, ...] = ()  # the sections that get one; none named: all
    train_on_input: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return self.interpreted or self.sections

    def readings(self, sample: Sample, thoughts: Sequence[Segment], rng: np.random.Generator) -> tuple[Reading, ...]:
        return tuple(
            Reading(thought.name, self.path(sample, thought, step, rng), before_each(thought))
            for thought, step in zip(thoughts, sample.steps, strict=False)
            if thought.name in self.names
        )

    def path(self, sample: Sample, thought: Segment, step: str, rng: np.random.Generator) -> tuple[Segment, ...]:
        """The prompt around the thought, then the section's text."""
        before, after = self.asked(sample, thought.name, rng)
        learnt: Literal["target", "context"] = "target" if self.train_on_input else "context"
        return (
            Segment("context", before[:1]),  # nothing predicts its first token
            Segment(learnt, before[1:]),
            Segment(learnt, thought.pieces, hole=True),
            Segment(learnt, after),
            target(step, END, name=TEXT),
        )

    def asked(
        self, sample: Sample, section: str, rng: np.random.Generator
    ) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """The prompt before the thinking tokens and after them. Its first piece is given, never learnt: nothing predicts it."""
        drawn = TEMPLATES[int(rng.integers(len(TEMPLATES)))].replace("{section}", section.lower())
        # The question last, so that nothing in it is taken for a place of the template's.
        before, after = (part.replace("{question}", question_text(sample)) for part in drawn.split(THOUGHT))
        if sample.dialect == "plain":
            return (END, before), (f"{after}\n",)
        return (Opening(), before), (after, REPLY)

    def companions(self, backbone: Backbone) -> nn.ModuleDict:
        if not self.interpreter:
            return nn.ModuleDict({name: copy.deepcopy(backbone.language_model()) for name in self.names})
        return nn.ModuleDict({name: interpreter(self.interpreter, backbone, self.tokens) for name in self.names})

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        """Each interpreter's mean over its tokens, added up: they share no weights."""
        return weighted({name: (1.0, self.section_loss(out, name)) for name in self.names})

    def section_loss(self, out: Outcome, name: str, of: str | None = None) -> Tensor:
        """Mean over tokens, of the target called `of` alone if it is given; 0 for a section that no sample has."""
        if name not in out.packed.readings:
            return out.hidden[-1].new_zeros(()).requires_grad_()  # a pass without any section can be learnt from too
        each, _, _ = read(out, self.reader(out.backbone, out.companions, name), name)
        rows = out.packed.readings[name].packed.branches["read"]
        if of is not None:
            return each[rows.name == rows.names.index(of)].mean()
        return each.sum() / (len(each) if out.step is None else out.step[name, 0])

    def reader(self, backbone: Backbone, companions: nn.ModuleDict, name: str) -> Backbone:
        """A section's interpreter."""
        return around(companions[name], backbone.tokenizer)


def thinking_tokens(section: str, count: int = 1) -> tuple[str, ...]:
    """Their names; where a section has several, they are numbered."""
    name = f"THINKING_OF_{section}"
    return (f"<{name}>",) if count == 1 else tuple(f"<{name}_{i}>" for i in range(1, count + 1))


def before_each(thought: Segment) -> tuple[tuple[Segment, int], ...]:
    """The states that predict a thought's tokens, one row before each."""
    return tuple((thought, place - 1) for place in range(len(thought.pieces)))


def interpreter(path: str, backbone: Backbone, tokens: Sequence[str]) -> nn.Module:
    """A language model from a folder or Hub id, made ready to read Heima's ids and states.

    Errors: ConfigError for states of another width, or another vocabulary.
    """
    found = load(path, tokens=tokens)
    width, own = found.text_config.hidden_size, backbone.text_config.hidden_size
    if width != own:
        raise ConfigError(
            f"{path} reads states of width {width}, Heima's are {own} wide: choose an interpreter that fits."
        )
    if ordinary(found) != ordinary(backbone):
        raise ConfigError(f"{path} has another vocabulary than Heima: choose an interpreter with the same tokenizer.")
    language = found.language_model()
    count = len(backbone.tokenizer)
    if count > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(count)
    return language


def ordinary(backbone: Backbone) -> dict[str, int]:
    """The vocabulary without the tokens that were added to it."""
    added = backbone.tokenizer.get_added_vocab()
    return {token: place for token, place in backbone.tokenizer.get_vocab().items() if token not in added}
