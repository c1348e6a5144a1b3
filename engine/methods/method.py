"""What a method is, and what its loss reads: the packed forward seen branch by branch. Knows no method and no model family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from engine import latents, masks, objectives
from engine.backbones.base import SPECIAL_TOKENS, Backbone, Sight
from engine.config import ConfigError
from engine.data.samples import Sample, context
from engine.latents import Feedback
from engine.layout import Layout, Packed, Readings, Rows, Segment

if TYPE_CHECKING:
    from engine.methods.steps import StepSupervision

COMPANIONS = "companions.safetensors"  # beside a model: what its method trains with it
META = "sotto.json"  # beside a model or an adapter: its method, its pauses, in what form and how large its data was; a name

MOST_SLOTS = 256  # that a sample may have
# Slots that ride the prefill, slots that are fed back one by one, tokens that it writes itself, or nothing.
Thinking = Literal["slots", "fed back", "tokens", ""]
# Supervised tokens by branch, (name, -1), or by kind and group of readings.
Tokens = Mapping[tuple[str, int], float]


def expect_slots(count: int) -> None:
    """Errors: ConfigError for a number of slots outside the supported range."""
    if not 0 <= count <= MOST_SLOTS:
        raise ConfigError(f"{count} pauses: choose 0 to {MOST_SLOTS}.")


def tokens_of(packed: Packed) -> Counter[tuple[str, int]]:
    """How many tokens each branch supervises, and each group of each kind of readings."""
    found = Counter({(name, -1): len(rows.target) for name, rows in packed.branches.items()})
    for kind, readings in packed.readings.items():
        groups = readings.group[readings.packed.branches["read"].sample]
        found.update((kind, group) for group in groups.tolist())
    return found


def shared(every: Sequence[Tokens]) -> Tokens:
    """The tokens of an average pass, from those of every pass of a step. A loss that divides by these, averaged over
    the passes, is the mean over all tokens of the step, however they fell into passes and processes."""
    total: Counter[tuple[str, int]] = Counter()
    for tokens in every:
        total.update(tokens)  # type: ignore[arg-type]
    return {key: count / len(every) for key, count in total.items()}


def token_loss(backbone: Backbone, states: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood a token [rows], from states after the final norm [rows, dim] and target [rows]."""
    return objectives.token_loss_from_states(states, backbone.logits, target, backbone.text_config.vocab_size)


@dataclass(frozen=True)
class Branch:
    """One branch's supervised rows with the states that predict them."""

    rows: Rows
    hidden: tuple[Tensor, ...]  # a [batch, length, dim] a layer, embeddings first
    backbone: Backbone
    batch: int
    tokens: float  # what a mean over tokens divides by: the rows of this pass, or of an average pass of its step

    def logits(self) -> Tensor:
        """[rows, vocabulary]: only supervised rows go through the head."""
        return self.backbone.logits(self.hidden[-1][self.rows.sample, self.rows.row])

    def cross_entropy(self, mean: Literal["samples", "tokens"] = "samples") -> Tensor:
        """samples: every sample counts the same; tokens: every token does."""
        states = self.hidden[-1][self.rows.sample, self.rows.row]
        each = token_loss(self.backbone, states, self.rows.target)
        if mean == "tokens":
            return each.sum() / self.tokens
        return objectives.sample_mean(each, self.rows.sample, self.batch).mean()

    def predicting(self, name: str) -> tuple[list[Tensor], Tensor]:
        """The states that predict the target called `name`: (a [rows, dim] a layer 1..L, sample [rows])."""
        chosen = self.rows.name == self.rows.names.index(name)
        sample, row = self.rows.sample[chosen], self.rows.row[chosen]
        return [layer[sample, row] for layer in self.hidden[1:]], sample

    def before(self, name: str, token: int = 0) -> Tensor:
        """The state that predicts this token (the last, where there are fewer) of the target called `name`:
        [layers + 1, samples, dim]."""
        chosen = (self.rows.name == self.rows.names.index(name)).nonzero()[:, 0]
        _, count = torch.unique_consecutive(self.rows.sample[chosen], return_counts=True)
        chosen = chosen[count.cumsum(0) - count + (count - 1).clamp(max=token)]
        return torch.stack([layer[self.rows.sample[chosen], self.rows.row[chosen]] for layer in self.hidden])


@dataclass(frozen=True)
class Outcome:
    """One packed forward."""

    packed: Packed
    hidden: tuple[Tensor, ...]
    backbone: Backbone
    companions: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    step: Tokens | None = None  # `shared` tokens of the training step that this forward is one pass of

    def branch(self, name: str) -> Branch:
        rows = self.packed.branches[name]
        tokens = len(rows.target) if self.step is None else self.step[name, -1]
        return Branch(rows, self.hidden, self.backbone, self.packed.ids.shape[0], tokens)


@dataclass(frozen=True)
class Method:
    """What differs from method to method: layout (with visibility and curriculum), feedback, objectives. A subclass is a
    frozen dataclass of its settings with `layout` and `loss`; one with slots says `thinking` and `slot_range` too, one that
    can't write its chain `writes`. engine/methods/diversity.py is a short one to begin from."""

    tokens: ClassVar[tuple[str, ...]] = SPECIAL_TOKENS  # what the tokenizer must have
    marks: ClassVar[tuple[str, ...]] = ()  # what is given between the thought and the answer
    frozen: ClassVar[bool] = False  # the model itself isn't trained, only its companions
    longest: ClassVar[int] = 32  # most tokens of what is written behind the thinking
    opened: ClassVar[str] = "<answer>"  # what stands before an answer, in chat

    def layout(self, sample: Sample, rng: np.random.Generator, epoch: int = 0) -> Layout:
        """A sample's branches. Training may have any; what is answered and validated goes by their names: `answer` = silently,
        behind `thinking` and `marks`; `teacher` = the chain written out, then the answer; `speak` = the thoughts from the slots."""
        raise NotImplementedError

    def loss(self, out: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (total, the unweighted terms for the log)."""
        raise NotImplementedError

    def companions(self, backbone: Backbone) -> nn.ModuleDict:
        """Modules trained beside the model: a projector, an auxiliary decoder."""
        return nn.ModuleDict()

    def feedback(self, companions: nn.ModuleDict) -> Feedback:
        """What a latent receives, made from the state before it."""
        return latents.unchanged

    def context(self, sample: Sample) -> Segment:
        """What stands before its thinking: a sample's question, with what it is about."""
        return context(sample)

    def thinking(self, count: int) -> tuple[Segment, ...]:
        """What stands behind the context before a silent answer, with `count` slots; nothing for a method without any."""
        return ()

    @property
    def lead(self) -> tuple[str, ...]:
        """The tokens between its thinking and an option's letter, once no step is left to be written."""
        return (*self.marks, "<answer>")

    @property
    def space(self) -> str:
        """What an answer begins with, behind its tag."""
        return ""

    @property
    def silent(self) -> bool:
        """Whether it answers after its thinking, rather than after a written chain."""
        return True

    @property
    def writes(self) -> bool:
        """Whether it has learnt to write its chain out when asked to."""
        return True

    @property
    def speaks(self) -> bool:
        """Whether it has learnt to say its thoughts from the slots alone, after <COT>."""
        return False

    @property
    def thinks(self) -> Thinking:
        """In what it has learnt to think before a silent answer."""
        roles = {segment.role for segment in self.thinking(1)} if self.silent and self.slot_range[1] else set()
        return "fed back" if "latents" in roles else "slots" if roles else ""

    def expect(self, how: Literal["silent", "explicit"]) -> None:
        """Errors: ConfigError for an answer that it hasn't learnt to give: silently, by the written chain."""
        if how == "explicit" and not self.writes:
            raise ConfigError("This model hasn't learnt to write its chain: ask for its silent answer.")
        if how == "silent" and not self.silent:
            raise ConfigError("This model answers by its written chain alone: ask for that (explicit).")

    @property
    def slot_range(self) -> tuple[int, int]:
        """The fewest and most slots that it is trained with; at the end of its curriculum, if it has one."""
        return 0, 0

    @property
    def trained_slots(self) -> int:
        return sum(self.slot_range) // 2

    @property
    def slots_a_step(self) -> int:
        """How many of its slots stand for one step of a chain."""
        return 1

    @property
    def supervision(self) -> StepSupervision | None:
        """How a step decoder (SIM-CoT) taught its slots; None where none did, or none can be asked what they hold."""
        return None

    def stage(self, epoch: int) -> int:
        """The curriculum's stage. Where it changes, the optimizer starts anew, and the best model is looked for anew, since what
        is learnt is another task."""
        return 0

    def renewed(self, epoch: int) -> int:
        """Changes where the optimizer starts anew."""
        return self.stage(epoch)

    def slots_at(self, epoch: int) -> int:
        """How many slots it thinks in at this point of its curriculum, as it is trained then."""
        return self.trained_slots


def run(
    backbone: Backbone, packed: Packed, feedback: Feedback = latents.unchanged, companions: nn.ModuleDict | None = None,
    step: Tokens | None = None, segments: int = 0,
) -> Outcome:  # fmt: skip
    """One forward over a packed batch: vision once, every branch under one mask, latents filled one after another."""
    hidden = latents.forward(backbone, packed, feedback, segments=segments)
    return Outcome(packed, hidden, backbone, companions or nn.ModuleDict(), step)


def holes_filled(
    out: Outcome, readings: Readings, table: Backbone, fed: Feedback = latents.unchanged, sight: Sight | None = None
) -> Tensor:
    """The readings' tokens embedded by `table`, with the first model's states, through `fed`, in their holes."""
    inner = readings.packed
    embeds = table.embed(inner, sight)
    sample, row, layer = readings.source_sample, readings.source_row, readings.layer
    states = out.hidden[-1][sample, row]
    below = (layer >= 0) & (layer < out.backbone.layers)
    if bool(below.any()):
        every = torch.stack([hidden[sample, row] for hidden in out.hidden[:-1]])  # [layers, holes, dim]
        early = every[layer.where(below, 0), torch.arange(len(layer), device=layer.device)]
        states = torch.where(below[:, None], out.backbone.final_norm(early), states)
    states = fed(states).to(embeds.dtype)
    return embeds.index_put((inner.slot_sample, inner.slot_row), states)


def read(
    out: Outcome, reader: Backbone, kind: str, fed: Feedback = latents.unchanged, first_position: int = 0,
    table: Backbone | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A second language model reads texts off the states of the first: -> (loss a token [rows], reading [rows], group [readings]).

    The states, through `fed`, stand in the places of the readings' holes; all other tokens are embedded by `table`
    (default: the reader itself). Positions run from `first_position`.
    """
    readings = out.packed.readings[kind]
    inner = readings.packed
    sight = (table or reader).look(inner)
    embeds = holes_filled(out, readings, table or reader, fed, sight)
    mask = masks.additive(masks.visible(inner), embeds.dtype)
    last = reader.forward(embeds, inner.positions + first_position, mask, sight=sight).last
    rows = inner.branches["read"]
    return token_loss(reader, last[rows.sample, rows.row], rows.target), rows.sample, readings.group


def weighted(terms: dict[str, tuple[float, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """{name: (weight, loss)} -> (total, the unweighted terms for the log)."""
    total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
    return total, {name: loss.detach() for name, (_, loss) in terms.items()}
