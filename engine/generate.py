"""Prefill, think, answer, speak the thoughts, write the chain: batched, cached, greedy.

`think` runs the video, the question and the thought once, slot after slot where a slot is fed back. `answer`, `speak` and
`explicit` each go on from what it leaves behind, without changing it: they fork its cache, with room for all that they may
write, and say which of its rows they see. On a GPU a long text is written by replaying one captured CUDA graph a token.
Knows neither files nor pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from engine import latents, masks, room
from engine.backbones.base import Backbone, Sight
from engine.config import ConfigError
from engine.data.samples import Sample, context
from engine.latents import Feedback
from engine.layout import Layout, Packed, Segment, Special, pack

ANSWER_TAG = Special("<answer>")
LONGEST_CHAIN = 320  # tokens of a written chain and its answer
WORTH_A_GRAPH = 32  # tokens: a capture takes as long as writing a few, which a short answer doesn't earn back
WARM_UP = 3  # steps before the capture, in which the cache takes its room and libraries choose their kernels


@dataclass(frozen=True)
class Thoughts:
    """What thinking left behind, for a batch. Never written to: every continuation forks it.

    Where a sample goes on in several lanes side by side, each with slots of its own (engine/insight/replace.py), `thought`,
    `slots` and `after` have one dimension more: [batch, lanes, ..].
    """

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys, values a layer: [batch, heads, length, head dim]
    context: Tensor  # bool [batch, length]: the rows of video and question
    thought: Tensor  # bool [batch, length]: the rows of the slots and what marks them
    slots: Tensor  # [batch, slots]: the slots' rows
    positions: Tensor  # [batch, slots]: the slots' positions
    serial: int  # slots that were fed back, one step each; the others rode the prefill
    after_context: Tensor  # [batch]: the position that follows the context
    after: Tensor  # [batch]: the position that follows the thought
    last_context: Tensor  # [layers + 1, batch, dim]: the last context token's states, which predict an explicit chain
    last: Tensor  # [layers + 1, batch, dim]: the thought's last token's states
    states: Tensor  # [layers + 1, batch, slots, dim]: the slots' hidden states, embeddings first
    sight: Sight | None  # what vision made of the context's visuals, for layers that look again

    @property
    def count(self) -> int:
        """Slots a sample."""
        return self.slots.shape[-1]

    @property
    def batch(self) -> int:
        return len(self.context)


@dataclass
class _Fork:
    """A cache with room for what is to be written, with the rows of it that each lane's new tokens see."""

    cache: Cache
    place: room.Place
    sight: Sight | None
    sees: Tensor  # bool [batch, lanes, past + room]: rows are opened in place as they are written
    position: Tensor  # [batch, lanes]: the next token's; moved in place


@dataclass(frozen=True)
class Written:
    """What a batch wrote. `tokens` counts emitted tokens, the end of the turn included."""

    ids: list[list[int]]
    text: list[str]
    tokens: list[int]
    states: Tensor  # [steps, layers + 1, batch, dim]: the state that predicted each emitted token; no steps where none are kept


@torch.no_grad()
def think(
    backbone: Backbone, samples: Sequence[Sample], thought: Sequence[Segment], feedback: Feedback = latents.unchanged,
    asked: Callable[[Sample], Segment] = context,
) -> Thoughts:  # fmt: skip
    """Runs context and thought (a method's `thinking`; it may be empty) of each sample, one forward for all that isn't fed back.

    asked: a sample as it stands before the thought, a method's `context`.

    Errors: ValueError for no sample; ConfigError for one that is longer than the model's positions.
    """
    if not samples:
        raise ValueError("No sample to think about.")
    layouts = [Layout({"think": (asked(sample), *thought)}) for sample in samples]
    packed = pack(layouts, backbone.encode, backbone.pad).to(backbone.device)
    if most := backbone.most_positions:
        needed = int(packed.positions.max()) + 2  # with a token to write
        if needed > most:
            raise ConfigError(f"The question takes {needed:,} positions, but this model supports {most:,}: shorten it.")
    cache = backbone.new_cache()
    sight = backbone.look(packed)
    hidden = latents.forward(backbone, packed, feedback, cache, sight=sight)
    batch = len(samples)
    rows = packed.slot_row.reshape(batch, -1)
    is_context, is_thought = packed.node == 0, packed.node > 0
    places = torch.arange(packed.node.shape[1], device=rows.device)
    every = torch.arange(batch, device=rows.device)
    last_context = places.where(is_context, -1).amax(1)
    last = places.where(packed.node >= 0, -1).amax(1)
    positions = packed.positions.amax(0)
    after = positions.masked_fill(~is_context, -1).amax(1) + 1
    return Thoughts(
        tuple((keys, values) for keys, values, *_ in cache),
        is_context,
        is_thought,
        rows,
        positions.gather(1, rows),
        int(packed.latents[0].sum()),
        after,
        after + is_thought.sum(1),
        torch.stack([h[every, last_context] for h in hidden]),
        torch.stack([h[every, last] for h in hidden]),
        torch.stack([h[every[:, None], rows] for h in hidden]),
        sight,
    )


def _forked(layers: Sequence[room.Keys], sight: Sight | None, sees: Tensor, position: Tensor, ahead: int) -> _Fork:
    """sees: bool [batch, lanes, past], position: [batch, lanes], ahead: tokens that each lane may be fed."""
    cache, place = room.opened(layers, sees.shape[1] * ahead)
    return _Fork(cache, place, sight, pad(sees, (0, place.size - sees.shape[2])), position.clone())


def _fork(thoughts: Thoughts, with_thought: bool, ahead: int) -> _Fork:
    """All rows of the prefill, of which the thought's are seen or not."""
    sees, position = thoughts.context[:, None], thoughts.after_context[:, None]
    if with_thought:
        sees = sees | thoughts.thought.reshape(thoughts.batch, -1, sees.shape[-1])
        position = thoughts.after.reshape(thoughts.batch, -1)
    return _forked(thoughts.layers, thoughts.sight, sees, position, ahead)


def _fork_slots(thoughts: Thoughts, ahead: int) -> _Fork:
    """The slots alone: a cache of as many entries as there are slots."""
    batch, count = thoughts.batch, thoughts.count
    every, rows = torch.arange(batch, device=thoughts.slots.device)[:, None], thoughts.slots.flatten(1)
    layers = [(k[every, :, rows].transpose(1, 2), v[every, :, rows].transpose(1, 2)) for k, v in thoughts.layers]
    seen = thoughts.thought.gather(-1, thoughts.slots).flatten(1)[:, None]
    sees = _own(rows.shape[1] // count, count, rows.device) & seen
    position = (thoughts.after_context + count)[:, None].expand(sees.shape[:2])
    return _forked(layers, None, sees, position, ahead)


def _own(lanes: int, rows: int, device: torch.device) -> Tensor:
    """Which of the rows, as many a lane, belong to each lane: bool [lanes, lanes x rows]."""
    return torch.eye(lanes, dtype=torch.bool, device=device).repeat_interleave(rows, 1)


def _feed(backbone: Backbone, fork: _Fork, ids: Tensor) -> Tensor:
    """Feeds ids [batch x lanes, new] to the fork -> the last token's states [layers + 1, batch x lanes, dim]."""
    (batch, lanes, _), new = fork.sees.shape, ids.shape[1]
    positions = (fork.position[..., None] + torch.arange(new, device=ids.device)).flatten(1)
    own = _own(lanes, new, ids.device)
    causal = torch.ones(lanes * new, lanes * new, dtype=torch.bool, device=ids.device).tril()
    among = (own.repeat_interleave(new, 0) & causal).expand(batch, -1, -1)
    fork.place.take(lanes * new)
    rows, shown = fork.place.rows, fork.place.shown
    allowed = fork.sees.repeat_interleave(new, 1).index_copy(2, rows, among)[..., :shown]
    embeds = backbone.embed_ids(ids.reshape(batch, -1))
    mask = masks.additive(allowed, embeds.dtype)
    states = backbone.forward(embeds, positions.expand(backbone.axes, -1, -1), mask, fork.cache, fork.sight)
    fork.sees.index_copy_(2, rows, own.expand(batch, -1, -1))
    fork.position += new
    return torch.stack([h.unflatten(1, (lanes, new))[:, :, -1].flatten(0, 1) for h in states.hidden])


def unheeded() -> None:
    """Nobody waits to end the writing."""


def _write(
    backbone: Backbone, fork: _Fork, state: Tensor, limit: int, heed: Callable[[], None] = unheeded, keep: bool = True
) -> Written:  # fmt: skip
    """Greedy decoding from the state [layers + 1, batch, dim] that predicts the first token, until every turn has ended.

    heed: is called before each token is fed, and ends the writing by raising. keep: the states too, which of a long chain of
    a large model are gigabytes.
    """
    end = backbone.end
    longest = torch.full_like(fork.position.flatten(), limit)  # tokens of each turn, fewer where positions are learnt
    if backbone.most_positions:
        longest = longest.minimum((backbone.most_positions - fork.position.flatten()).clamp(min=1))
    done = torch.zeros(state.shape[1], dtype=torch.bool, device=state.device)
    token = torch.zeros_like(done, dtype=torch.long)
    _choose(backbone, state, token, done)
    done |= longest == 1
    emitted, states = [token.clone()], [state] if keep else []
    step = partial(_step, backbone, fork, token, done)
    if state.is_cuda and limit > WORTH_A_GRAPH and not backbone.waits:
        fork.place.show_all()  # so that shapes are the same at each step
        steps = _replayed(step, state.device)
    else:
        steps = (step() for _ in itertools.count())
    while not bool(done.all()):
        heed()
        state = next(steps)
        states += [state] if keep else []
        emitted.append(token.clone())
        done |= longest == len(emitted)
    table = [row[:own] for row, own in zip(torch.stack(emitted, dim=1).tolist(), longest.tolist(), strict=True)]
    ids = [row[: row.index(end) + 1] if end in row else row for row in table]
    text = [backbone.decode([token for token in row if token != end]) for row in ids]
    kept = torch.stack(states) if keep else state.new_zeros(0, *state.shape)
    return Written(ids, text, [len(row) for row in ids], kept)


def _choose(backbone: Backbone, state: Tensor, token: Tensor, done: Tensor) -> None:
    """Writes into `token` [batch] what the state [layers + 1, batch, dim] predicts, and into `done` whose turn has ended."""
    token.copy_(backbone.logits(state[-1]).argmax(-1).masked_fill(done, backbone.pad))
    done |= token == backbone.end


def _step(backbone: Backbone, fork: _Fork, token: Tensor, done: Tensor) -> Tensor:
    """Feeds the tokens and puts the next ones in their place -> the states that predict those [layers + 1, batch, dim].

    All that it changes, it changes in place, and unless the backbone `waits` for the device it never does: so it can be captured.
    """
    if backbone.most_positions:  # a turn that has ended takes no further position
        fork.position.clamp_(max=backbone.most_positions - 1)
    state = _feed(backbone, fork, token[:, None])
    _choose(backbone, state, token, done)
    return state


def _replayed(step: Callable[[], Tensor], device: torch.device) -> Iterator[Tensor]:
    """The step again and again: first as it is, which warms up, then captured as one CUDA graph, which launches hundreds of
    kernels at once."""
    side = torch.cuda.Stream(device)  # what is captured may not run on the default stream
    for _ in range(WARM_UP):
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            state = step()
        torch.cuda.current_stream(device).wait_stream(side)
        yield state
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads of a program may use the GPU meanwhile
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        state = step()
    while True:
        graph.replay()
        yield state.clone()  # the next replay writes over it


def _ids(backbone: Backbone, *pieces: str | Special) -> list[int]:
    return [token for piece in pieces for token in backbone.piece_ids(piece)]


def _given(backbone: Backbone, fork: _Fork, ids: Sequence[int]) -> Tensor:
    """Feeds the same ids to every lane -> as `_feed`."""
    return _feed(backbone, fork, torch.tensor(ids, device=fork.position.device).expand(fork.position.numel(), -1))


@torch.no_grad()
def answer(
    backbone: Backbone, thoughts: Thoughts, marks: Sequence[str] = ("<ANS>",), limit: int = 32,
    heed: Callable[[], None] = unheeded, keep: bool = True,
) -> Written:  # fmt: skip
    """The answer after the thought and what marks it; a model that writes its remaining steps first goes on with those."""
    marked = _ids(backbone, *map(Special, marks))
    fork = _fork(thoughts, with_thought=True, ahead=len(marked) + limit)
    state = _given(backbone, fork, marked) if marked else thoughts.last
    return _write(backbone, fork, state, limit, heed, keep)


@torch.no_grad()
def speak(backbone: Backbone, thoughts: Thoughts, limit: int = 256, heed: Callable[[], None] = unheeded) -> Written:
    """The thoughts said from the slots alone: after <COT>, seeing neither video nor question."""
    if not thoughts.count:
        layers, batch, _, dim = thoughts.states.shape
        return Written([[]] * batch, [""] * batch, [0] * batch, thoughts.states.new_zeros(0, layers, batch, dim))
    marked = _ids(backbone, Special("<COT>"))
    fork = _fork_slots(thoughts, len(marked) + limit)
    return _write(backbone, fork, _given(backbone, fork, marked), limit, heed)


@torch.no_grad()
def explicit(
    backbone: Backbone, thoughts: Thoughts, limit: int = LONGEST_CHAIN, heed: Callable[[], None] = unheeded,
    keep: bool = True,
) -> Written:  # fmt: skip
    """The chain written out, then the answer: from video and question alone, the slots unseen."""
    fork = _fork(thoughts, with_thought=False, ahead=limit)
    return _write(backbone, fork, thoughts.last_context, limit, heed, keep)


@torch.no_grad()
def go_on(
    backbone: Backbone, packed: Packed, embeds: Tensor, limit: int = 256, heed: Callable[[], None] = unheeded
) -> Written:
    """Writes on behind a pack with one branch a sample, whose embeddings [batch, length, dim] are given."""
    cache, real = backbone.new_cache(), packed.node >= 0
    hidden = backbone.forward(
        embeds, packed.positions, masks.additive(masks.visible(packed), embeds.dtype), cache
    ).hidden
    every = torch.arange(len(real), device=real.device)
    last = torch.arange(real.shape[1], device=real.device).where(real, -1).amax(1)
    after = packed.positions.amax(0).masked_fill(~real, -1).amax(1) + 1
    fork = _forked([(keys, values) for keys, values, *_ in cache], None, real[:, None], after[:, None], limit)
    return _write(backbone, fork, torch.stack([h[every, last] for h in hidden]), limit, heed)


@torch.no_grad()
def option_probabilities(
    backbone: Backbone, thoughts: Thoughts, letters: Sequence[str],
    lead: Sequence[str | Special] = (Special("<ANS>"), ANSWER_TAG),
) -> Tensor:  # fmt: skip
    """Probabilities of the letters where the silent answer's letter stands, without decoding: [batch, letters].

    lead: what stands between the thought and the letter; as text, for a model to which the tag is no token of its own.
    """
    marked = _ids(backbone, *lead)
    fork = _fork(thoughts, with_thought=True, ahead=len(marked))
    return shares_of(backbone, _given(backbone, fork, marked), letters)


def shares_of(backbone: Backbone, state: Tensor, letters: Sequence[str]) -> Tensor:
    """Probabilities of the letters among themselves, from the state that predicts one [layers + 1, batch, dim]: [batch, letters]."""
    ids = [backbone.text_ids(text)[0] for text in letters]
    return backbone.logits(state[-1])[:, ids].float().softmax(-1)
