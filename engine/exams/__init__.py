"""Real benchmarks: their files, their scores, a model that sits them. Knows nothing of the embedded worlds."""
