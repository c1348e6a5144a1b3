"""The page's HTML: what it says of itself, and a reply told to people. Whatever was written is escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from engine.ask import UNKNOWN, Explicit, Option, Reply
from engine.data.samples import letter
from engine.insight import spoken
from engine.methods.heima import Interpreters
from engine.methods.method import Thinking
from engine.models import Model
from engine.video import Sampling, read

USUAL = "Models usually solve a question of several steps by writing the steps out, one token after another."
THINKS: dict[Thinking, str] = {
    "slots": "Here the model thinks in a few silent slots, called pauses, that run all at once behind the video and the question.",
    "fed back": "Here the model thinks in a few silent slots behind the video and the question, one after another: each is fed "
    "what the one before it left.",
    "tokens": "Here the model thinks in a few tokens of its own, each of which stands for a whole part of the steps.",
}
BY_ITSELF = """What the slots hold is said aloud afterwards, from the slots alone: the model sees neither video nor question
while it speaks."""
BY_DECODER = "What the slots hold is said aloud afterwards, from the slots alone, by the decoder that taught them."
BY_INTERPRETERS = """What they stand for is said aloud afterwards by interpreters, who know the question too, but don't see the
video."""
TEACHER = """<small>How alike each state is to the one from which the written chain reads its answer, in the same layer. The
last column is the silent answer's own state.</small>"""
NO_TEACHER = "<small>Tick “Also answer by the written chain” to compare the slots with it.</small>"
NEVER_TEACHER = "<small>This model hasn't learnt to write a chain that its slots could be compared with.</small>"
NO_STEPS = "<small>The written chain has no steps to compare the slots with.</small>"
NO_SLOTS = "This model has no slots."
ONLY_TOKENS = "This model has no slots: it thinks in tokens that it writes."
UNTRAINED = "This model was never trained for pauses, so its slots hold nothing to test."
OWN, OTHERS = "True answer", "The true answer to this clip's own question"
EMPTY = f"""<div class="s-empty"><b aria-hidden="true">{"<i></i>" * 8}</b>
<p>Pick, film or upload a clip, then press <strong>Think</strong>.</p>
<small>The answer, the thoughts, and what the slots hold and do appear here.</small></div>"""
STALE = """<div class="s-banner" role="status"><span class="s-changed">This is the answer to what was asked before: press
Think to ask anew.</span><span class="s-again">This is the answer before: the next one is on its way.</span></div>"""
UNPLAYABLE = (
    """<div class="s-banner" role="status">Your browser can't play this clip; the model may still read it.</div>"""
)
# Uploaded apart, as Gradio's player takes films alone.
PICTURES = [".gif", ".png", ".jpg", ".jpeg", ".webp", ".bmp"]
STEPS = {"cups": "swap", "relay": "touch", "tally": "number"}  # what a step of each world is
CHAIN = "Writing the chain out"
STAGES = ("Reading the clip", "Thinking silently", "Answering", "Saying the thoughts", CHAIN, "Looking inside")
Truth = Mapping[str, Any]  # a world's record as `worlds.as_json` tells it


def text(words: str) -> str:
    """Words from outside as HTML: escaped, and characters that can't be shown replaced."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in words))


def header(model: Model) -> str:
    """What the page says of itself, as it is true of the model that it asks."""
    method, told = model.method, [USUAL]
    thinks, writes = method.thinks, method.writes
    if not thinks:
        lead = "The model answers, and writes out how it came to that." if writes else "The model answers at once."
        told.append("This model has not learnt to think in another way: compare it with one that has.")
    else:
        told.append(THINKS[thinks])
        saying = _saying(model)
        lead = (
            f"The model thinks in silence{', answers, and then says what it thought' if saying else ', then answers'}."
        )
        told += [saying] if saying else []
    compare = ", and compare its silent answer with the written one" if thinks and writes else ""
    told.append(f"Film a new clip to try it on something that nobody has seen{compare}.")
    return (
        f"<header><h1>Sotto</h1><p>Ask about a video. {lead}</p><details><summary>What is this?</summary>"
        f"<p>{' '.join(told)}</p></details></header>"
    )


def in_short(model: Model) -> str:
    """How a model thinks, in a phrase beside its name."""
    method = model.method
    if not model.taught:
        return "never trained to think in silence"
    if not method.silent:
        return "writes its chain out"
    if method.thinks == "fed back":
        return (
            "thoughts fed back, taught by its own chain" if method.writes else "thoughts fed back in place of the chain"
        )
    if method.thinks == "tokens":
        return "thinks in tokens of its own"
    if not model.usual_pauses:
        return "no pauses, taught by the answer alone"
    return "pauses taught by the written chain" if method.writes else "pauses taught by the answer alone"


def _saying(model: Model) -> str:
    """Who says the thoughts, and what they know; nothing where nobody has learnt to."""
    if isinstance(model.method, Interpreters):
        return BY_INTERPRETERS
    if model.method.speaks:
        return BY_ITSELF
    return BY_DECODER if spoken.speaks(model.method, model.companions) else ""


def gallery(records: Sequence[Truth]) -> str:
    """The shipped clips as buttons, each with a picture of a telling moment."""
    import cv2

    buttons = []
    for index, record in enumerate(records):
        frames = read(record["clip"], Sampling(fps=2.0, pixels=252 * 168, factor=2)).frames
        picture = frames[3 if record["family"] == "tally" else 1][..., ::-1]
        data = base64.b64encode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()).decode()
        step, count = STEPS[record["family"]], record["difficulty"]
        name = f"{record['family']}, {count} {step}{'' if count == 1 else 'es' if step == 'touch' else 's'}"
        buttons.append(
            f"<button data-index='{index}' aria-pressed='false'><img src='data:image/jpeg;base64,{data}' alt=''>{name}</button>"
        )
    return f"<div class='s-gallery'>{''.join(buttons)}</div>"


def banner(sentence: str, kind: str = "note", title: str = "") -> str:
    """One sentence in a box; kind: note, warning or error."""
    head = f"<strong>{text(title)}</strong> " if title else ""
    role = "status" if kind == "note" else "alert"
    return f'<div class="s-banner s-{kind}" role="{role}">{head}{text(sentence)}</div>'


def notices(reply: Reply) -> str:
    """The reply's notices; an abstention comes first and loud."""
    if reply.familiar:
        return "".join(map(banner, reply.notices))
    abstains, *others = reply.notices
    return banner(abstains.removeprefix(UNKNOWN).strip(), "warning", UNKNOWN) + "".join(map(banner, others))


def progress(stage: str, write_chain: bool) -> str:
    """The stages as a line of steps, those up to `stage` filled."""
    stages = [name for name in STAGES if write_chain or name != CHAIN]
    at = stages.index(stage) if stage in stages else 0
    dots = "".join(f'<i class="{"done" if i < at else "now" if i == at else ""}"></i>' for i in range(len(stages)))
    return f'<div class="s-progress" role="status"><span>{text(stage)} …</span><b aria-hidden="true">{dots}</b></div>'


def trained_mark(trained: tuple[int, int] | None, most: int) -> str:
    """Style variables that draw the trained range under the slider of 0 to `most` pauses: its width and place, in shares."""
    if trained is None:
        return ""
    low, high = min(trained[0], most), min(trained[1], most)
    width = max((high - low) / most, 0.03)
    place = min(max((low + high) / 2 / most - width / 2, 0) / (1 - min(width, 0.99)), 1)
    return f"#pauses {{ --s-trained: {width:.1%} 3px; --s-trained-at: {place:.1%} 100%; }}"


def asked(reply: Reply, other: Reply | None = None) -> str:
    """Who was asked what; with the question, options and pauses as data, for the page to see when they are others."""
    own = reply.settings
    data = json.dumps([own["question"], own["options"], own["pauses"]])
    names = " and ".join(text(each.settings["model"]) for each in (reply, other) if each)
    verb = "were" if other else "was"
    return f'<h2 class="s-asked" data-asked="{escape(data)}">{names} {verb} asked: <q>{text(own["question"])}</q></h2>'


def answers(reply: Reply, truth: Truth | None = None) -> str:
    """The silent answer with its probabilities beside the written chain's, and what the silence saves; of a model that only
    knows the chain, that alone.

    With `truth`, answers are marked right or wrong.
    """
    muted = "" if reply.familiar else " s-muted"
    doubt = "" if reply.familiar else '<p class="s-doubt">It would say this, but don\'t trust it:</p>'
    seconds = reply.seconds["think"] + reply.seconds["answer"]
    bars = _bars(reply.options, reply.answer)
    if not reply.settings["silent"]:
        cost = _tokens(reply.generated_tokens)
        only = _verdict("By its written chain", doubt, reply.answer, cost, seconds, truth, bars)
        return f'<div class="s-answers{muted}">{only}</div>'
    silent = _verdict(_silently(reply), doubt, reply.answer, _silent_cost(reply), seconds, truth, bars)
    words = reply.explicit
    if words is None:
        why = "Not asked for." if reply.settings["writes"] else "It hasn't learnt to write one."
        written = f"<section><h3>Written chain</h3><p>{why}</p></section>"
        return f'<div class="s-answers{muted}">{silent}{written}</div>'
    each = "steps" if _fed_back(reply) else "tokens"
    tokens = _times(words.generated_tokens / reply.generated_tokens, f"fewer {each}", f"more {each}")
    time = _times(words.seconds / seconds, "less time", "more time")
    saving = f'<p class="s-saving">The silent answer took <b>{tokens}</b> and <b>{time}</b>.</p>'
    cost = _tokens(words.generated_tokens)
    written = _verdict("Written chain", doubt, words.answer, cost, words.seconds, truth, saving)
    return f'<div class="s-answers{muted}">{silent}{written}</div>'


def _silently(reply: Reply) -> str:
    """A silent answer's title: how it was thought about."""
    if reply.slots:
        what = "thought" if reply.settings["thinks"] == "fed back" else "pause"
        return f"Silent, with {reply.slots} {what}{'s' * (reply.slots != 1)}"
    return "Silent, in thinking tokens" if reply.settings["thinks"] == "tokens" else "At once, without pauses"


def _fed_back(reply: Reply) -> int:
    """The slots that were fed back, each of which is a step of the model, as a token is."""
    return reply.slots if reply.settings["thinks"] == "fed back" else 0


def _silent_cost(reply: Reply) -> str:
    """The model's steps of a silent answer: thoughts apart from tokens."""
    fed = _fed_back(reply)
    thoughts = f"<span><b>{fed}</b> thought{'s' * (fed != 1)} fed back</span>" if fed else ""
    return thoughts + _tokens(reply.generated_tokens - fed)


def _tokens(count: int) -> str:
    return f"<span><b>{count}</b> token{'s' * (count != 1)} written</span>"


def _verdict(
    title: str, doubt: str, answer: str, cost: str, seconds: float, truth: Truth | None, more: str
) -> str:  # fmt: skip
    verdict = mark(answer == truth["answer"], True) if truth else ""
    long = " s-long" if len(answer) > 24 else ""
    return (
        f'<section><h3>{title}</h3>{doubt}<p class="s-big{long}">{text(answer) or "(nothing)"}{verdict}</p>'
        f'<p class="s-cost">{cost}'
        f"<span><b>{duration(seconds)}</b></span></p>{more}</section>"
    )


def _bars(options: Sequence[Option], answer: str) -> str:
    rows = []
    for i, option in enumerate(options):
        share = f"{100 * option.probability:.0f} %"
        rows.append(
            f'<li class="{"s-top" if option.text == answer else ""}"><span>{letter(i)}</span>'
            f'<span class="s-name">{text(option.text)}</span><span class="s-share">{share}</span>'
            f'<i aria-hidden="true"><u style="width:{100 * option.probability:.1f}%"></u></i></li>'
        )
    return f'<ol class="s-bars" aria-label="Probability of each option">{"".join(rows)}</ol>' if rows else ""


def _times(ratio: float, fewer: str, more: str) -> str:
    more_or_less, ratio = (fewer, ratio) if ratio >= 1 else (more, 1 / ratio)
    return f"{ratio:.0f}× {more_or_less}" if ratio >= 10 else f"{ratio:.1f}× {more_or_less}"


def duration(seconds: float) -> str:
    """In milliseconds, or seconds from one on."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def mark(right: bool, aloud: bool = False) -> str:
    """A sign for right or wrong; aloud: with its word beside it."""
    word, sign = ("correct", "✓") if right else ("incorrect", "✗")
    shown = f"{sign} {word}" if aloud else sign
    return f'<em class="s-{"right" if right else "wrong"}" role="img" aria-label="{word}">{shown}</em>'


def thoughts(reply: Reply, truth: Truth | None = None) -> str:
    """The thoughts said from the slots, line by line, beside the written chain; with `truth`, each step is marked."""
    whose = "from the slots alone" if reply.slots else "said by interpreters, who know the question too"
    said = _steps(f"Thoughts, {whose}", reply.thoughts, truth)
    if why := unsaid(reply):
        said = f"<section><h3>Thoughts</h3><p>{why}</p></section>"
    return f'<div class="s-thoughts">{said}{_written(reply.explicit, truth)}</div>'


def unsaid(reply: Reply) -> str:
    """Why there were no thoughts to say; nothing where there were, be it that nothing was said."""
    if not reply.settings["silent"]:
        return NO_SLOTS
    if not reply.settings["speaks"]:
        return "This model hasn't learnt to say its thoughts."
    return "" if reply.slots or reply.thoughts else slotless(reply) or "No pauses, so no thoughts to say."


def slotless(reply: Reply) -> str:
    """Why this model's slots can't be looked into, whatever it is asked; nothing where they can."""
    asked = reply.settings
    if not asked["taught"]:
        return UNTRAINED
    if asked["thinks"] == "tokens":
        return ONLY_TOKENS
    return "" if asked["thinks"] else NO_SLOTS


def teacher_note(reply: Reply) -> str:
    """What stands under the comparison with the written chain: what it shows, or why there is none."""
    if reply.teacher_state is not None:
        return TEACHER
    if not reply.settings["silent"]:
        return f"<small>{NO_SLOTS}</small>"
    return _chainless(reply)


def _chainless(reply: Reply) -> str:
    """Why there is no written chain to compare the slots with."""
    return NO_TEACHER if reply.settings["writes"] else NEVER_TEACHER


def steps_note(reply: Reply) -> str:
    """Why the slots aren't held against the written steps; nothing where they are, or where there are no slots."""
    inside = reply.inside
    if not reply.slots or (inside and inside.steps is not None and inside.steps.shape[1]):
        return ""
    if why := slotless(reply):
        return f"<small>{why}</small>"
    if reply.explicit:
        return NO_STEPS
    return _chainless(reply)


def _written(explicit: Explicit | None, truth: Truth | None) -> str:
    return _steps("The chain, written out", explicit.text, truth) if explicit else ""


def _steps(title: str, lines: str, truth: Truth | None) -> str:
    steps = [line for line in lines.split("\n") if line.strip()]
    wanted = [step["text"] for step in truth["steps"]] if truth else []
    rows = []
    for i, step in enumerate(steps):
        right = i < len(wanted) and step.strip() == wanted[i]
        side = f' class="s-{"right" if right else "wrong"}"' if truth else ""
        rows.append(f"<li{side}>{text(step)}{mark(right) if truth else ''}</li>")
    count = sum(step.strip() == want for step, want in zip(steps, wanted))
    score = f'<small class="s-score">{count} of {len(wanted)} right</small>' if truth else ""
    body = f"<ol>{''.join(rows)}</ol>" if rows else "<p>Nothing was said.</p>"
    return f"<section><h3>{title}{score}</h3>{body}</section>"


def answers_own(reply: Reply, truth: Truth) -> bool:
    """Whether the reply is to the clip's own question with its own options, in whatever order: then its truth judges it."""
    asked = reply.settings
    return asked["question"].strip() == truth["question"] and {*asked["options"]} == {*truth["options"]}


def true_answer(truth: Truth, reply: Reply | None = None) -> str:
    """A filmed clip's true answer with its steps, beside a reply that may be to another question than the clip's own."""
    whose = OWN if reply is None or answers_own(reply, truth) else OTHERS
    steps = "".join(f"<li>{text(step['text'])}</li>" for step in truth["steps"])
    return (
        f'<div class="s-truth" role="status" tabindex="-1"><p>{whose}: <b>{text(truth["answer"])}</b></p>'
        f"<details><summary>The true steps</summary><ol>{steps}</ol></details></div>"
    )
