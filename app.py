"""The page: a clip, a question, and what a model thought about it without words. Builds, wires and launches; no model code.

python app.py                                        # the small model that ships, on http://127.0.0.1:7860
python app.py --model Qwen/Qwen2.5-VL-3B-Instruct    # any folder or Hub id of a supported family
python app.py --model FOLDER --adapter FOLDER --host 0.0.0.0 --port 8000

python app.py --model FOLDER --compare FOLDER        # a second model, that visitors may ask the same question

On a Space the variables MODEL_ID, ADAPTER_ID and COMPARE_ID name them.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # all three are read when the libraries below are imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPU can't do is done on the CPU

try:
    if os.environ.get("SPACES_ZERO_GPU", "").lower() not in ("1", "t", "true"):
        raise ImportError("This is no ZeroGPU.")
    import spaces  # before torch, which it changes
except ImportError:
    spaces = None

import gradio as gr
import torch
from gradio.components.api_component import Api
from starlette.middleware import Middleware

from engine import __version__, ask, models, worlds
from engine.benchmark import shipped
from engine.guard import Guard, sweeping
from engine.insight import plots
from engine.page import api, cards, panels, share
from engine.sandbox import Sandbox
from engine.video import Clip, Sampling, read

ASSETS = Path(__file__).resolve().parent / "assets"
EXAMPLES, SCRIPT = ASSETS / "examples", ASSETS / "page.js"
MOST_PAUSES, MOST_STEPS = 32, 10
LONGEST_SEED = 2**53  # a browser counts no further
READING = 20.0  # seconds that one clip may take of everybody's time; frames read until then are used
LINE = 64  # visitors who may wait at once
SESSIONS = 200  # whose states are kept; then the one longest unused goes
MINUTE, HOUR = 60, 3600
GPU_SECONDS = 60  # of ZeroGPU for one answer and what is looked at inside; who has fewer left is refused
UPLOAD, UPLOADS, LIFE = 200 * 2**20, 4 * 2**30, 2 * HOUR  # bytes of one file and of all; seconds that they are kept
ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><rect width='32' height='32' rx='9' fill='%234f46e5'/>"
    "<g fill='white'><circle cx='9' cy='16' r='3'/><circle cx='16' cy='16' r='3' opacity='.7'/>"
    "<circle cx='23' cy='16' r='3' opacity='.4'/></g></svg>"
)
MEANWHILE = "The clip was changed while the model thought: press Think again to ask about the new one."
# Gradio hides it on phones, and keeps the page's own styles away from it.
FOOT = "<style>footer .show-api, footer .show-api-divider { display: flex !important; }</style>"
PICKED = """element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});"""
EXAMPLE = f"{PICKED}\nelement.addEventListener('click', event => sotto.chosen(event.target.closest('button')));"

# Components by name, as the events of the page set them.
LAYERED = ("slots", "steps")  # by a layer
SLOTTED = (*LAYERED, "visit", "chips", "words", "strip", "looked", "changed", "lens", "teacher", "way")  # by a slot
RESULTS = (
    *SLOTTED, "status", "notices", "empty", "shown", "asked", "answers", "compared", "thoughts", "note", "matters", "meanings",
    "many", "by_number", "hollow", "against", "collapsed", "download", "truth_card",
)  # fmt: skip
CLEARED = ("visit", "reveal", "truth_card", "notices", "empty", "shown")
FILLED = ("clip", "question", "options", *CLEARED)
PLOTS = ("looked", "changed", "by_number", "slots", "steps", "teacher", "way")
REVEALED = ("truth_card", "reveal", "answers", "thoughts", "compared", "words")

Record = dict[str, Any]  # a world's clip as `worlds.as_json` tells it
Row = list[Any]  # new values of components, in the order of their names


@dataclass
class Visit:
    """What one visitor has before them; kept on the server, so that a true answer isn't in the page before its time."""

    clip: str | None = None  # the clip's file name
    truth: Record | None = None  # its true record, if it is a world's
    known: bool = False  # whether the truth was shown
    reply: ask.Reply | None = None
    other: ask.Reply | None = None  # another model's, for comparison
    slot: int = 0  # the slot that is looked at

    def take(self, clip: str | None, truth: Record | None = None) -> None:
        """Another clip, or none."""
        self.clip, self.truth, self.known, self.reply, self.other = clip, truth, False, None, None

    @property
    def told(self) -> Record | None:
        """The truth once it is known."""
        return self.truth if self.known else None

    def cards(self) -> dict[str, Any]:
        """The reply's cards, marked right and wrong once the truth is known, if it is of the question that was asked."""
        reply, other, told = self.reply, self.other, self.told  # another clip may come while they are written
        if reply is None:
            return {}
        judge = told if told and cards.answers_own(reply, told) else None
        steps = [step["text"] for step in judge["steps"]] if judge else None
        both = {each.settings["model"]: each for each in (reply, other) if each}
        return {
            "asked": cards.asked(reply, other), "answers": cards.answers(reply, judge),
            "thoughts": cards.thoughts(reply, judge),
            "compared": panels.compared(both, judge) if other else "",
            "words": panels.slot_words(reply, self.slot, steps),
        }  # fmt: skip

    def truth_card(self) -> dict[str, Any]:
        """The true answer's card once it is known, as the reply before the visitor may be to another question."""
        return {"truth_card": gr.HTML(cards.true_answer(self.told, self.reply), visible=True)} if self.told else {}

    def of_slot(self) -> dict[str, Any]:
        """What belongs to the slot that is looked at, but for its words."""
        reply = self.reply
        if reply is None:
            return {}
        inside = reply.inside
        looked, changed, teacher = None, None, None
        if reply.teacher_state is not None:
            teacher = plots.teacher(reply.states, reply.answer_state, reply.teacher_state, self.slot)
        if inside and inside.looked:
            frames = inside.looked.frames.mean((0, 1))
            rows = torch.cat([frames[: reply.slots], frames[-1:]])
            moments = [(step["start"], step["end"]) for step in self.truth["steps"]] if self.truth else []
            looked = plots.looked(rows, inside.looked.seconds, moments, self.slot)
        if inside and inside.changes:
            changed = plots.changed(inside.changes, [option.text for option in reply.options], self.slot)
        return {
            "chips": panels.chips(reply.slots, self.slot), "strip": panels.strip(reply, self.slot), "looked": looked,
            "changed": changed, "lens": panels.lens_table(inside, self.slot), "teacher": teacher,
            "way": plots.way(reply.states, self.slot) if reply.slots else None,
        }  # fmt: skip

    def of_layer(self, layer: float) -> dict[str, Any]:
        """The heatmaps of one layer; None where there are no slots, or no written steps."""
        if self.reply is None or not self.reply.slots:
            return {"slots": None, "steps": None}
        states, inside = self.reply.states, self.reply.inside
        layer = min(max(int(layer), 0), len(states) - 1)
        steps = inside.steps if inside else None
        against = None
        if steps is not None and steps.shape[1]:
            against = plots.steps(states[layer], steps[layer], self.slot)
        return {"slots": plots.slots(states, layer, self.slot), "steps": against}


def on_gpu(work: Callable[..., Any]) -> Callable[..., Any]:
    """Borrows a GPU for the work where the page runs on ZeroGPU; elsewhere the same work."""
    return spaces.GPU(duration=GPU_SECONDS)(work) if spaces else work


def aside(work: Callable[[Callable[[str], None], Event], Any]) -> Generator[Any]:
    """What `work` reports from a thread of its own, "" while it is silent, then its result.

    Closing it waits for nothing: it sets the event that work was given, and work's next report ends it.
    """
    items: SimpleQueue[Any] = SimpleQueue()
    left = Event()

    def report(said: str) -> None:
        if left.is_set():
            raise InterruptedError
        if said:
            items.put(said)

    def run() -> None:
        try:
            items.put(work(report, left))
        except Exception as error:
            items.put(error)

    Thread(target=run, daemon=True).start()
    try:
        item: Any = ""
        while isinstance(item, str):
            try:
                item = items.get(timeout=0.2)
            except Empty:
                item = ""
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        left.set()


def thinking(
    known: Mapping[str, models.Model], name: str, clip: Clip | None, question: str, options: Sequence[str], pauses: int,
    write_chain: bool, donors: Mapping[str, Clip] | None = None,
) -> Iterator[str | ask.Reply | ValueError]:  # fmt: skip
    """The stages of `ask` of the model of that name as they begin, "" while one goes on, then its reply, or its error: of one that
    is raised ZeroGPU brings no sentence back. Closing it ends the work at its next token."""

    def work(report: Callable[[str], None], _: Event) -> ask.Reply:
        try:
            return ask.ask(known[name], clip, question, options, pauses, write_chain, report, donors)
        except (torch.OutOfMemoryError, MemoryError):
            raise ValueError(
                "The clip doesn't fit in this machine's memory: give a shorter one, or fewer pauses."
            ) from None

    try:
        yield from aside(work)  # a generator itself, as ZeroGPU asks for
    except ValueError as error:
        yield error


def filmed(family: str, steps: float, seed: float | None) -> Iterator[tuple[Record, str]]:
    """Record and path of a new clip; the file is there until the iterator goes on. Errors: ValueError with a sentence."""
    steps = api.whole("The number of steps", steps, 1, MOST_STEPS)
    seed = api.whole("The seed", seed, 0, LONGEST_SEED - 1)
    record = worlds.make(family, steps, seed, "fresh")
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{family}-{steps}-{seed}.mp4"
        worlds.write(record, path)
        yield worlds.as_json(record), str(path)


def examples() -> list[Record]:
    """The records of the shipped clips, each with its clip's path."""
    files = sorted(EXAMPLES.glob("*.json"))
    return [json.loads(f.read_text(encoding="utf-8")) | {"clip": str(f.with_suffix(".mp4"))} for f in files]


def donors(clip: Clip, truth: Record | None, sampling: Sampling) -> dict[str, Clip]:
    """Clips whose slots can take the place of this one's: of a world's clip another of its kind, whose answer is another of its
    options, and the same with one event changed, as if they had been filmed alike; of any other clip, an example's."""
    if truth is None:
        return {panels.OTHER: read(min(EXAMPLES.glob("*.mp4")), sampling)}
    record = worlds.make(*(truth[name] for name in ("family", "difficulty", "seed", "split")))
    others = [worlds.make(record.family, record.difficulty, record.seed + n, record.split) for n in range(1, 60)]
    fitting = [other for other in others if other.answer in record.options and other.answer != record.answer]
    nearest = max(fitting, key=lambda other: len({*other.options} & {*record.options}), default=None)
    found = {panels.CHANGED: worlds.changed(record), panels.OTHER: nearest}
    size = clip.frames.shape[1:3]
    return {name: replace(clip, frames=worlds.draw(o, clip.times, *size)) for name, o in found.items() if o}


def lines(options: str | None) -> list[str]:
    return [line.strip() for line in (options or "").splitlines() if line.strip()]


def named(loaded: Sequence[models.Model]) -> dict[str, models.Model]:
    """The models by name; of equal names, the later ones are numbered, so that visitors can tell them apart."""
    found: dict[str, models.Model] = {}
    for model in loaded:
        names = (f"{model.name} ({n})" if n > 1 else model.name for n in count(1))
        name = next(name for name in names if name not in found)
        found[name] = replace(model, name=name)
    return found


def beside(own: str | Path | None, wanted: Sequence[str | Path]) -> list[str | Path]:
    """The models to compare with, each once, without the page's own. own: None where no folder or id holds it as it is."""

    def where(place: str | Path) -> str | Path:
        return Path(place).resolve() if Path(place).is_dir() else str(place)

    found = {where(place): place for place in wanted}
    if own is not None:
        found.pop(where(own), None)
    return [*found.values()]


def row(names: Sequence[str], **values: Any) -> Row:
    """New values of the components called `names`; those not given stay as they are. A plot that is None isn't there."""
    drawn = {name: gr.Plot(values[name], visible=values[name] is not None) for name in PLOTS if name in values}
    return [(values | drawn).get(name, gr.skip()) for name in names]


def busy() -> list[Any]:
    """Notices and the two buttons once Think was pressed."""
    return ["", gr.Button("Thinking …", interactive=False), gr.Button(interactive=True)]


def idle() -> list[Any]:
    """Status and the two buttons when nothing runs, whether it was finished, stopped, or failed."""
    return ["", gr.Button("Think", interactive=True), gr.Button(interactive=False)]


def component(given: api.Parameter) -> Api:
    """A parameter of the API, which stands nowhere on the page."""
    made = Api(given.default, given.schema, given.label)
    made.example_payload = lambda: given.example  # type: ignore[method-assign]  # of a subclass Gradio writes a stub to the disk
    return made


def film_busy() -> gr.Button:
    return gr.Button("Filming …", interactive=False)


def film_idle() -> gr.Button:
    return gr.Button("Film it", interactive=True)


class Page:
    """What the page of one model does. Holds nothing of its visitors: that is in their own sessions' states."""

    def __init__(self, model: models.Model, others: Sequence[models.Model] = ()) -> None:
        self.model = model
        known = named([model, *others])
        self.others = {name: each for name, each in known.items() if name != model.name}
        self.thinking = on_gpu(partial(thinking, known))  # one for all, as ZeroGPU keeps a process for each
        self.sandbox = Sandbox()
        self.examples = examples()

    def stages(
        self, clip: str | None, question: str | None, options: str | None, pauses: float, write_chain: bool,
        visit: Visit | None = None, other: str | None = None,
    ) -> Generator[str | tuple[ask.Reply, float]]:  # fmt: skip
        """As `thinking`, the reply with the seconds that reading took; then, with `other`, that model's, on the clip as it
        takes clips. A visit's replies are looked into. Errors: ValueError with a sentence."""
        if not clip and self.model.backbone.sighted:
            raise ValueError("There is no clip yet: pick an example, film one, or upload your own.")
        if clip and not Path(clip).is_file():
            raise ValueError(f"The clip is gone, as clips are after {LIFE / HOUR:g} hours: pick or upload it again.")
        pauses = api.whole("The number of pauses", pauses, 0, MOST_PAUSES)
        question, options = api.words("The question", question), api.words("The options", options)
        ask.check(question, lines(options), pauses)
        truth = visit.truth if visit else None
        runs = [(self.model, pauses)]
        if other in self.others:
            against = self.others[other]
            runs.append((against, against.pauses_near(pauses)))
        frames: Clip | None = None
        seconds, given = 0.0, None if visit is None else dict[str, Clip]()
        for model, slots in runs:
            if clip and (frames is None or frames.sampling != model.sampling_of(still=len(frames.frames) == 1)):
                yield cards.STAGES[0]
                began = time.perf_counter()
                frames = yield from self.reading(clip, model.sampling)
                if len(frames.frames) == 1 and frames.sampling != model.sampling_of(still=True):
                    frames = yield from self.reading(clip, model.sampling_of(still=True))
                seconds = time.perf_counter() - began
                given = None if visit is None else donors(frames, truth, frames.sampling)
            run = self.thinking(model.name, frames, question, lines(options), slots, bool(write_chain), given)
            with closing(run) as items:
                for item in items:
                    if isinstance(item, ValueError):
                        raise item
                    yield item if isinstance(item, str) else (item, seconds)

    def reading(self, clip: str, sampling: Sampling) -> Generator[str, None, Clip]:
        """Returns the clip; "" until it is read."""
        with closing(aside(lambda _, left: self.sandbox.read(clip, sampling, READING, left))) as items:
            while not isinstance(item := next(items), Clip):
                yield item
        return item

    # The API: these docstrings are its documentation, and that of its MCP tools.

    def think(self, clip: Record | None, question: str, options: str, pauses: int, write_chain: bool) -> dict[str, Any]:
        """Answers a question about a video clip after thinking in a few silent slots, and says what it thought. The reply's
        `explicit` is the written chain; where `familiar` is false, the model knows no such clips and abstains.

        Args:
            clip: The video file; over MCP its contents as an address (data:video/mp4;base64,...), as no other is fetched.
            question: What to answer.
            options: The options, one a line, 2 to 26 of them; empty for an open question.
            pauses: Number of silent thinking slots, 0 to 32.
            write_chain: Whether to answer by a written chain of thought too, for comparison.
        Returns:
            answer, options, thoughts, explicit, slots, generated_tokens, seconds, familiar, notices, settings.
        """
        try:
            stages = self.stages(api.path_of(clip), question, options, pauses, write_chain)
            return ask.as_json(*next(item for item in stages if isinstance(item, tuple)))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def film(self, family: str, steps: int, seed: int) -> Iterator[tuple[str, str, str]]:
        """Films a new clip of one of three small worlds, with a question that needs several steps of thought.

        Args:
            family: cups, relay or tally.
            steps: Number of steps, 1 to 10.
            seed: Any whole number from 0. The same three always make the same clip.
        Returns:
            The clip (mp4), the question, and its options, one a line.
        """
        try:
            for record, path in filmed(family, steps, seed):
                yield path, record["question"], "\n".join(record["options"])
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    # What happens on the page.

    def on_think(
        self, clip: str | None, question: str, options: str, pauses: float, write_chain: bool, other: str | None,
        layer: float, visit: Visit,
    ) -> Iterator[Row]:  # fmt: skip
        replies: list[ask.Reply] = []
        readings: list[float] = []
        before = (visit.clip, visit.truth)
        try:
            if clip and visit.clip not in (None, Path(clip).name):  # another came while this one stood in the line
                raise ValueError(MEANWHILE)
            with closing(self.stages(clip, question, options, pauses, write_chain, visit, other)) as stages:
                for item in stages:
                    if (visit.clip, visit.truth) != before:
                        raise ValueError(MEANWHILE)
                    if isinstance(item, tuple):
                        replies.append(item[0])
                        readings.append(item[1])
                    else:
                        # In a silence too: a visitor who has left is noticed when something is said.
                        yield row(RESULTS, **{"status": cards.progress(item, write_chain)} if item else {})
            visit.reply, visit.other, visit.slot = replies[0], replies[1] if len(replies) > 1 else None, 0
            yield from self.results(visit, visit.reply, readings, layer)
            # A further row, however empty, could reach the page before this one is drawn.
        except ValueError as error:
            visit.reply = visit.other = None
            sentence = str(error) if (visit.clip, visit.truth) == before else MEANWHILE
            gone = {"empty": gr.HTML(visible=True), "shown": gr.Column(visible=False)}
            yield row(RESULTS, notices=cards.banner(sentence, "error"), **gone)

    def results(self, visit: Visit, reply: ask.Reply, readings: Sequence[float], layer: float) -> Iterator[Row]:
        """readings: the seconds that it took to read the clip for each of the visit's replies."""
        inside = reply.inside
        everything = ask.as_json(reply, readings[0], states=True)
        if visit.other:
            everything["compared"] = ask.as_json(visit.other, readings[1], states=True)
        options = [option.text for option in reply.options]
        with TemporaryDirectory() as folder:  # gradio has copied the file by the time that it asks for more
            path = Path(folder) / "sotto-reply.json"
            path.write_text(json.dumps(everything, allow_nan=False), encoding="utf-8")
            shown = row(
                RESULTS, visit=visit, notices=cards.notices(reply), empty=gr.HTML(visible=False),
                shown=gr.Column(visible=True), note=cards.teacher_note(reply),
                hollow=panels.hollow(reply), against=cards.steps_note(reply),
                matters=panels.matters(reply), meanings=panels.meanings(inside), many=panels.many(reply),
                collapsed=panels.collapsed(inside),
                by_number=plots.by_number(inside.fewer, options) if inside and inside.fewer else None,
                download=str(path), **visit.truth_card(), **visit.cards(), **visit.of_slot(), **visit.of_layer(layer),
            )  # fmt: skip
            if visit.reply is not reply:  # another clip came while all this was drawn
                raise ValueError(MEANWHILE)
            yield shown

    def on_slot(self, layer: float, visit: Visit, event: gr.EventData) -> Row:
        if visit.reply is None or not 0 <= event.index < visit.reply.slots:
            return row(SLOTTED)
        visit.slot = event.index
        return row(SLOTTED, visit=visit, **visit.of_slot(), **visit.of_layer(layer), words=visit.cards()["words"])

    def on_layer(self, layer: float, visit: Visit) -> Row:
        return row(LAYERED, **visit.of_layer(layer))

    def on_share(self, visit: Visit, layer: float) -> Iterator[Any]:
        """One run as a page of its own; nothing where there is no reply."""
        if visit.reply is None:
            return
        with TemporaryDirectory() as folder:
            path = Path(folder) / "sotto-reply.html"
            path.write_text(
                share.page(
                    visit.reply, visit.told, visit.cards() | visit.of_slot() | visit.of_layer(layer), int(layer)
                ),
                encoding="utf-8",
            )
            yield str(path)

    def on_pick(self, visit: Visit, event: gr.EventData) -> Row:
        record = self.examples[event.index]
        return self.filled(visit, record, record["clip"])

    def on_film(self, family: str, steps: float, seed: float | None, visit: Visit) -> Iterator[Row]:
        try:
            for record, path in filmed(family, steps, seed):
                yield self.filled(visit, record, path)
        except ValueError as error:
            yield row(FILLED, notices=cards.banner(str(error), "error"))

    def on_clip(self, clip: str | None, visit: Visit) -> Row:
        visit.take(Path(clip).name if clip else None)
        return self.cleared(CLEARED, visit)

    def filled(self, visit: Visit, record: Record, path: str) -> Row:
        visit.take(Path(path).name, record)
        asked = {"clip": path, "question": record["question"], "options": "\n".join(record["options"])}
        return self.cleared(FILLED, visit, reveal=gr.Button(visible=True), **asked)

    def cleared(self, names: Sequence[str], visit: Visit, **values: Any) -> Row:
        """Takes what belongs to the clip before off the page."""
        blank = {
            "visit": visit, "reveal": gr.Button(visible=False), "truth_card": gr.HTML("", visible=False),
            "notices": "", "empty": gr.HTML(visible=True), "shown": gr.Column(visible=False),
        }  # fmt: skip
        return row(names, **blank | values)

    def on_reveal(self, visit: Visit) -> Row:
        if visit.truth is None:
            return row(REVEALED)
        visit.known = True
        return row(REVEALED, reveal=gr.Button(visible=False), **visit.truth_card(), **visit.cards())

    def build(self) -> gr.Blocks:
        """Lays the page out and wires it."""
        model = self.model
        low, high = model.trained_pauses or (0, 0)
        trained = f"Trained with {low}{f' to {high}' * (low < high)}."
        if not model.trained_pauses:
            trained = "This model was never trained for them: compare its written chain."
        if model.method.thinks == "tokens":
            trained = cards.ONLY_TOKENS
        steps_info = "Trained on 1 to 6." if model.small else None
        with gr.Blocks(
            title="Sotto", analytics_enabled=False, delete_cache=(10 * MINUTE, LIFE), fill_width=True
        ) as demo:
            gr.HTML(cards.header(model), elem_id="head")
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=5, min_width=300, elem_id="ask"):
                    clip = gr.Video(label="Clip", sources=["upload"], height=252, autoplay=True, elem_id="clip")
                    gr.HTML(cards.UNPLAYABLE, elem_id="unplayable")
                    with gr.Row(elem_id="under"):
                        picture = gr.UploadButton(
                            "Upload a GIF or a picture", file_types=cards.PICTURES, size="sm", elem_id="picture"
                        )
                        reveal = gr.Button("Show the true answer", size="sm", visible=False, elem_id="reveal", scale=0)
                    truth_card = gr.HTML(visible=False, elem_id="truth")
                    with gr.Tabs(elem_id="sources"):
                        with gr.Tab("Examples"):
                            picks = gr.HTML(cards.gallery(self.examples), js_on_load=EXAMPLE, elem_id="examples")
                        with gr.Tab("Film a new clip"):
                            family = gr.Radio(list(worlds.FAMILIES), value=worlds.FAMILIES[0], label="World")
                            steps = gr.Slider(
                                1, MOST_STEPS, value=4, step=1, label="Steps", info=steps_info, elem_id="steps"
                            )
                            with gr.Row(elem_id="seeding"):
                                seed = gr.Number(7, label="Seed", precision=0, min_width=80, scale=2, elem_id="seed")
                                dice = gr.Button("🎲 Roll", min_width=80, scale=1, elem_id="dice")
                                film = gr.Button("Film it", min_width=90, scale=2, elem_id="film")
                    question = gr.Textbox(label="Question", lines=1, max_lines=6, elem_id="question")
                    options = gr.Textbox(label="Options", lines=3, max_lines=8, elem_id="options",
                                         placeholder="One a line; none for an open question.")  # fmt: skip
                    pauses = gr.Slider(0, MOST_PAUSES, value=min(model.usual_pauses, MOST_PAUSES), step=1, elem_id="pauses",
                                       label="Pauses", info=f"Silent thinking slots. {trained}")  # fmt: skip
                    chain = gr.Checkbox(
                        True, label="Also answer by the written chain", container=False, elem_id="chain"
                    )
                    choices = [(f"{name}: {cards.in_short(each)}", name) for name, each in self.others.items()]
                    other = gr.Dropdown([("no other", ""), *choices], value="",
                                        label="Compare with", info="Another model, asked the same.",
                                        visible=bool(self.others), elem_id="other")  # fmt: skip
                    with gr.Row(elem_id="go"):
                        think = gr.Button("Think", variant="primary", scale=3, min_width=120, elem_id="think")
                        stop = gr.Button("Stop", scale=1, min_width=80, interactive=False, elem_id="stop")
                with gr.Column(scale=8, min_width=300, elem_id="results"):
                    status = gr.HTML(elem_id="status")
                    notices = gr.HTML("" if model.taught else cards.banner(ask.UNTAUGHT), elem_id="notices")
                    empty = gr.HTML(cards.EMPTY, elem_id="empty")
                    with gr.Column(visible=False, elem_id="shown") as shown:
                        gr.HTML(cards.STALE, elem_id="stale")
                        asked = gr.HTML(elem_id="asked")
                        answers = gr.HTML(elem_id="answers")
                        compared = gr.HTML(elem_id="compared")
                        chips = gr.HTML(js_on_load=PICKED, elem_id="chips")
                        with gr.Tabs(elem_id="inside", overflow_behavior="wrap") as tabs:
                            with gr.Tab("What it thought"):
                                gr.HTML(panels.lead(panels.THOUGHT))
                                thoughts = gr.HTML(elem_id="thoughts")
                                words = gr.HTML(elem_id="words")
                            with gr.Tab("Where it looked"):
                                gr.HTML(panels.lead(panels.LOOKED))
                                looked = gr.Plot(show_label=False, container=False, elem_id="looked")
                                gr.HTML(panels.STRIP, elem_id="strip_head")
                                strip = gr.HTML(elem_id="strip")
                            with gr.Tab("Does it matter?"):
                                gr.HTML(panels.lead(panels.MATTERS))
                                matters = gr.HTML(elem_id="matters")
                                changed = gr.Plot(show_label=False, container=False, elem_id="changed")
                                meanings = gr.HTML(elem_id="meanings")
                            with gr.Tab("How many thoughts?"):
                                gr.HTML(panels.lead(panels.MANY))
                                many = gr.HTML(elem_id="many")
                                by_number = gr.Plot(show_label=False, container=False, elem_id="number")
                            with gr.Tab("Under the hood"):
                                gr.HTML(panels.lead(panels.HOOD))
                                hollow = gr.HTML()
                                with gr.Row():
                                    with gr.Column(min_width=260, elem_id="slots"):
                                        gr.HTML("<h4>Slot by slot, in one layer</h4>")
                                        slots = gr.Plot(show_label=False, container=False, elem_classes="s-plot")
                                    with gr.Column(min_width=260, elem_id="steps_like"):
                                        gr.HTML("<h4>Slots against the written steps, in the same layer</h4>")
                                        steps_like = gr.Plot(show_label=False, container=False, elem_classes="s-plot")
                                        against = gr.HTML()
                                layer = gr.Slider(0, model.layers, value=model.layers, step=1, elem_id="layer",
                                                  label="Layer", info="0 is the embeddings.")  # fmt: skip
                                with gr.Row():
                                    with gr.Column(min_width=260, elem_id="teacher"):
                                        gr.HTML("<h4>Layer by layer, against the written chain's answer</h4>")
                                        teacher = gr.Plot(show_label=False, container=False, elem_classes="s-plot")
                                        note = gr.HTML()
                                    with gr.Column(min_width=260, elem_id="way"):
                                        gr.HTML("<h4>The slots' way through the layers</h4>")
                                        way = gr.Plot(show_label=False, container=False, elem_classes="s-plot")
                                lens = gr.HTML(elem_id="lens")
                                collapsed = gr.HTML(elem_id="collapsed")
                        with gr.Row(elem_id="keep"):
                            download = gr.DownloadButton("Download everything as JSON", size="sm", elem_id="download")
                            shared = gr.Button("Download as a page to share", size="sm", elem_id="share")
                            page = gr.DownloadButton("Page", elem_id="page", elem_classes="s-hidden")
            gr.HTML(f"Sotto {__version__} · {cards.text(model.name)} on {model.backbone.device}", elem_id="foot")

            visit = gr.State(Visit(), time_to_live=12 * HOUR)
            parts = {
                "visit": visit, "clip": clip, "question": question, "options": options, "reveal": reveal,
                "truth_card": truth_card, "status": status, "notices": notices, "empty": empty, "shown": shown,
                "asked": asked, "answers": answers, "compared": compared, "chips": chips, "thoughts": thoughts, "words": words,
                "looked": looked, "strip": strip, "matters": matters, "changed": changed, "meanings": meanings, "many": many,
                "by_number": by_number, "slots": slots, "steps": steps_like, "teacher": teacher, "note": note, "way": way,
                "lens": lens, "hollow": hollow, "against": against, "collapsed": collapsed, "download": download,
            }  # fmt: skip
            results, cleared, filled, revealed, slotted, layered = (
                [parts[name] for name in names] for names in (RESULTS, CLEARED, FILLED, REVEALED, SLOTTED, LAYERED)
            )
            told: Callable[..., dict[str, Any]] = partial(dict, api_visibility="private", show_progress="hidden")
            model_turn: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
            film_turn: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "film"}
            pressed = think.click(busy, None, [notices, think, stop], js="() => sotto.thinking()", **told(queue=False))
            answered = pressed.then(self.on_think, [clip, question, options, pauses, chain, other, layer, visit], results,
                                    **told(show_progress="minimal", show_progress_on=status, **model_turn))  # fmt: skip
            for ended in (answered.then, answered.failure):  # `then` follows no failure, such as a full line
                ended(idle, None, [status, think, stop], **told(queue=False)).then(None, js="() => sotto.settled()")
            ends: dict[str, Any] = {"cancels": [answered]}  # in the line or at work, it makes room for others
            stop.click(None, **ends)
            picks.click(self.on_pick, visit, filled, **told(queue=False, **ends))
            begun = film.click(film_busy, None, film, js="() => sotto.filming()", **told(queue=False, **ends))
            filming = begun.then(self.on_film, [family, steps, seed, visit], filled,
                                 **told(show_progress="full", show_progress_on=clip, **film_turn))  # fmt: skip
            for ended in (filming.then, filming.failure):
                ended(film_idle, None, film, **told(queue=False)).then(None, js="() => sotto.filmed()")
            gr.on([clip.upload, clip.clear], self.on_clip, [clip, visit], cleared, **told(queue=False, **ends))
            # Set in the browser alone, as Gradio would convert on this machine what its player can't play.
            given = picture.upload(None, picture, clip, js="file => file", **told(**ends))
            given.then(self.on_clip, [clip, visit], cleared, **told(queue=False))
            gr.on([clip.upload, clip.clear, picture.upload], None, js="() => sotto.chosen()")
            dice.click(lambda: random.randrange(10**6), None, seed, **told(queue=False))
            shows = reveal.click(self.on_reveal, visit, revealed, **told(queue=False))
            shows.then(None, js="() => sotto.revealed()")
            chips.click(self.on_slot, [layer, visit], slotted, **told(queue=False, trigger_mode="always_last"))
            tabs.select(None, js="() => sotto.redraw()", **told(queue=False))
            layer.input(self.on_layer, [layer, visit], layered, **told(trigger_mode="always_last"))
            made = shared.click(self.on_share, [visit, layer], page, **told())
            made.then(None, js="() => document.querySelector('#page').click()")

            # The API, through a button that nobody sees.
            called, reply = gr.Button(visible=False), gr.JSON(visible=False, label="reply")
            asks = map(component, api.to_think(clip.api_info(), MOST_PAUSES, pauses.value))
            films = map(component, api.to_film(worlds.FAMILIES, MOST_STEPS, LONGEST_SEED - 1))
            called.click(self.think, [*asks], reply, api_name="think", **model_turn)
            called.click(self.film, [*films], [clip, question, options], api_name="film", **film_turn)
        return demo.queue(max_size=LINE, api_open=False)  # nobody passes the line


def theme() -> gr.Theme:
    """System fonts only: the page asks nothing of other hosts."""
    base = gr.themes.Base(
        primary_hue="indigo", neutral_hue="zinc", radius_size="lg",
        font=["Inter", "ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"],
    )  # fmt: skip
    return base.set(
        block_radius="14px", button_large_radius="12px", button_small_radius="9px", block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400", block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300", block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200", block_title_text_weight="500", input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_900", input_border_width="1px", input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700", button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800", button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600", button_border_width="1px",
        body_text_color_subdued="*neutral_500", button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="python app.py", description="Opens the page.")
    known.add_argument("--model", default=os.environ.get("MODEL_ID"),
                       help="folder or Hub id (default: $MODEL_ID, else the small model that ships)")  # fmt: skip
    known.add_argument("--adapter", default=os.environ.get("ADAPTER_ID"),
                       help="PEFT adapter to merge in, folder or Hub id (default: $ADAPTER_ID)")  # fmt: skip
    known.add_argument("--compare", metavar="MODEL", action="append", default=[*filter(None, [os.environ.get("COMPARE_ID")])],
                       help="another model to compare with, folder or Hub id; repeat it (default: $COMPARE_ID); the small "
                            "models that ship are there beside one of them without being named")  # fmt: skip
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT", "7860")
    known.add_argument("--host", default=host, help="0.0.0.0 to be reached from other machines")
    known.add_argument("--port", type=int, default=port)
    known.add_argument("--share", action="store_true", help="open a public link through Gradio's servers")
    return known


def serve(page: Page, folder: Path, host: str, port: int, share: bool) -> None:
    """Opens the page and stays until it is closed. folder: where it keeps visitors' files."""
    trained = page.model.trained_pauses
    page.build().launch(
        server_name=host, server_port=port, share=share, max_file_size=UPLOAD, allowed_paths=[str(EXAMPLES)],
        state_session_capacity=SESSIONS, enable_monitoring=False, run_history=False, ssr_mode=False, theme=theme(),
        css_paths=ASSETS / "style.css", css=cards.trained_mark(trained, MOST_PAUSES),
        head=f'<link rel="icon" href="data:image/svg+xml,{ICON}"><script>{SCRIPT.read_text(encoding="utf-8")}</script>{FOOT}',
        footer_links=["api", "settings"],
        app_kwargs={
            "middleware": [Middleware(Guard, folder, UPLOAD, UPLOADS)],
            # Gradio deletes what it knows of; what broken-off uploads leave it doesn't know.
            "lifespan": sweeping(folder, LIFE + 20 * MINUTE, UPLOADS, 10 * MINUTE),
        },
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that visitors' files are deleted then too
    try:
        model = models.load(options.model, options.adapter)
        wanted = [*(models.SMALL / name for name in shipped() if model.small), *options.compare]
        own = None if options.adapter else options.model or models.EMBEDDED
        others = [models.load(place) for place in beside(own, wanted)]
        with TemporaryDirectory(prefix="sotto-") as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # a folder of our own, which others may not read
            serve(Page(model, others), Path(folder), options.host, options.port, options.share)
    except (ValueError, OSError, OverflowError) as error:
        taken = isinstance(error, OverflowError) or "empty port" in str(error)
        sentence = f"Port {options.port} isn't available: choose another with --port." if taken else str(error)
        print(" ".join(sentence.split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
