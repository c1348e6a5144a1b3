"""engine/guard.py: what gets in, and how long files stay."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from engine.guard import fetches, sweep


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"data": [{"path": "http://example.com/a.mp4"}]}, True),
        ({"data": [[{"video": {"path": "HTTPS://example.com"}}]]}, True),
        ({"clip": {"path": "ftp://example.com"}}, True),
        ({"data": [{"path": "/tmp/a.mp4"}, "What is http://example.com?", "path"]}, False),
        ({"data": []}, False),
        (None, False),
    ],
)
def test_addresses_in_place_of_files_are_found(body: object, found: bool) -> None:
    assert fetches(json.dumps(body).encode()) == found


def test_escapes_hide_no_address() -> None:
    assert fetches(b'{"data": [{"p\\u0061th": "\\u0068ttp:\\/\\/example.com"}]}')
    assert not fetches(b"")
    assert not fetches(b"[" * 100_000)


def test_old_files_go_and_then_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for name, size in (("a/old.mp4", 10), ("b/mid.mp4", 40), ("c/new.mp4", 40), ("left", 10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
        time.sleep(0.02)  # a file's last change can't be set back
    assert sweep(tmp_path, 3600, 100) == 0
    assert sweep(tmp_path, 3600, 60) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "left", "new.mp4"]
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    assert sweep(tmp_path, 3600, 100) == 2
    assert os.listdir(tmp_path) == []
    assert sweep(tmp_path / "none", 1, 1) == 0
