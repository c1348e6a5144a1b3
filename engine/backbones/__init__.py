"""One file a model family: only what differs (embedding, positions, vision, cache, module names)."""
