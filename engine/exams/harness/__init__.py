"""lmms-eval's plugin: any model of this project under the name `sotto`. Imports lmms-eval only when that asks for it.

Installed (pip install -e . in a checkout), lmms-eval finds it by its entry point; from a checkout, LMMS_EVAL_PLUGINS=engine.exams.harness names it:

    LMMS_EVAL_PLUGINS=engine.exams.harness python -m lmms_eval --model sotto --tasks mmstar \\
        --model_args pretrained=FOLDER,adapter=FOLDER,mode=silent,pauses=8 --batch_size 4
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry (0.7 on) takes from the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="sotto", simple_class_path="engine.exams.harness.models.sotto.Sotto")
