"""Golden numbers of published implementations, met by the engine: `python -m tests.conformance FOLDER ...`."""
