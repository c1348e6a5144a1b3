"""Files that installed Python packages carry: weights without a hub. Knows none of the packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from engine.config import ConfigError


def packaged(package: str, file: str, missing: str, reader: str = "") -> Path:
    """The file in that package. reader: a package that reading it takes. Errors: ConfigError, `missing`, where either isn't
    installed."""
    found = find_spec(package)
    files = [Path(place) / file for place in (found.submodule_search_locations or ())] if found else []
    held = [each for each in files if each.is_file()]
    if not held or (reader and find_spec(reader) is None):
        raise ConfigError(missing)
    return held[0]
