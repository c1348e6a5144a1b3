"""Models in and out: published checkpoints, plain folders and adapters with a card, the exact prompt."""
