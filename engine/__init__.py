"""Sotto's engine: latent thinking for vision-language models. Imports neither gradio nor anything under `train`."""

__version__ = "0.1.0"
