"""lmms-eval's plugin: any model of this project under the name `sotto`. Only lmms-eval imports this file.

It finds it by its entry point, once this project is installed beside it:

    pip install --no-deps -e .
    python -m lmms_eval --model sotto --tasks mmstar --model_args pretrained=FOLDER,mode=silent,pauses=8 --batch_size 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from engine import ask, models
from engine.data.samples import TYPE_HINTS, Sample, answer_of, looked_at
from engine.evaluation import respond
from engine.footage import Footage


def manifest() -> ModelManifest:
    """What lmms-eval's registry (0.7 on) takes from the entry point `lmms_eval.models`."""
    return ModelManifest(model_id="sotto", simple_class_path=f"{__name__}.Sotto")


class Sotto(lmms):
    """
    pretrained, adapter: folders or Hub ids. mode: silent, or explicit for the written chain. pauses: slots of a silent
    answer. fps, frames, pixels: how clips are looked at (default: as the model was trained). longest: most tokens of what
    is written, chain included, so a task's own `max_new_tokens` doesn't count. kind: "as asked" asks questions as the tasks
    word them; a type of problem, see `TYPE_HINTS`, puts behind them what the model was used to in training.
    """

    is_simple = True

    def __init__(
        self, pretrained: str = "", adapter: str = "", mode: Literal["silent", "explicit"] = "silent",
        pauses: int | None = None, fps: float | None = None, frames: int | None = None, pixels: int | None = None,
        kind: str = "as asked", longest: int = 1024, device: str = "auto", batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if mode not in ("silent", "explicit"):
            raise ValueError(f"mode={mode}: silent or explicit.")
        if kind not in TYPE_HINTS:
            raise ValueError(f"kind={kind}: one of {', '.join(TYPE_HINTS)}.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.accelerator.num_processes > 1:
            device = str(self.accelerator.device)
        self.sotto = models.load(pretrained or None, adapter or None, device)
        self.sotto.method.expect(mode)
        self.mode, self.kind, self.longest, self.size = mode, kind, int(longest), int(batch_size)
        self.pauses = self.sotto.usual_pauses if pauses is None else int(pauses)
        given: dict[str, Any] = {"fps": fps, "frames": frames, "pixels": pixels}
        self.chosen = {name: value for name, value in given.items() if value is not None}

    @property
    def batch_size(self) -> int:
        return self.size

    @property
    def device(self) -> Any:
        return self.sotto.backbone.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Requests' args: (context, generation settings, doc_to_visual, doc_id, task, split) -> their answers, in order.

        Errors: ValueError for sampling, for other media than images and clips, and for a clip that can't be read.
        """
        answers = list[str]()
        waiting = iter(requests)
        with TemporaryDirectory() as folder:
            while part := list(islice(waiting, self.size)):
                samples = [self.sample(request.args, Path(folder)) for request in part]
                replies = respond(
                    self.sotto.backbone, samples, self.sotto.method, self.mode, self.pauses, self.sotto.companions,
                    longest=self.longest,
                )  # fmt: skip
                for request, reply in zip(part, replies, strict=True):
                    context, settings = request.args[:2]
                    answers.append(until(answer_of(reply.text, self.sotto.dialect), settings))
                    self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
        return answers

    def sample(self, args: tuple[Any, ...], folder: Path) -> Sample:
        context, settings, doc_to_visual, doc, task, split = args
        if settings.get("do_sample") or (settings.get("temperature") or 0) > 0 or (settings.get("num_beams") or 1) > 1:
            raise ValueError(f"{task} asks for sampling or beams; this engine decodes greedily.")
        given = doc_to_visual(self.task_dict[task][split][doc]) or []
        sample = ask.posed(self.sotto, None, context.replace("<image>", "").strip(), (), self.kind)
        shown = tuple(self.footage(each, task, folder / f"picture-{place}.png") for place, each in enumerate(given))
        return looked_at(replace(sample, visual=shown), self.sotto.backbone.see)

    def footage(self, given: Any, task: str, place: Path) -> Footage:
        """What a task shows, an image as a file at `place`. Errors: ValueError."""
        if isinstance(given, Image.Image):
            given.convert("RGB").save(place)
        elif isinstance(given, str):
            place = Path(given)
        else:
            raise ValueError(f"{task} shows a {type(given).__name__}; this engine takes images and clips' paths.")
        still = isinstance(given, Image.Image)
        return Footage(place, replace(self.sotto.sampling_of(still), **self.chosen), still)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "Sotto's models are scored by what they write: choose a task of the kind generate_until."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError(
            "Sotto's models answer one question at a time: choose a task of the kind generate_until."
        )


def until(answer: str, settings: dict[str, Any]) -> str:
    """The answer up to the first of the task's stop words, but for blank lines, which answers may hold."""
    words = settings.get("until") or []
    for word in [words] if isinstance(words, str) else words:
        if word and word.strip():
            answer = answer.split(word)[0]
    return answer.strip()
