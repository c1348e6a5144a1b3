"""A short run of tests/fuzz.py: a bounded time, files from a fixed seed."""

from pathlib import Path

from tests.fuzz import damaged, fuzz


def test_damaged_files_are_read_in_part_or_refused(tmp_path: Path) -> None:
    outcome = fuzz(tmp_path, seed=0, count=120, seconds=60)
    assert outcome.faults == []
    assert outcome.files > 10
    assert outcome.counts["refused"]
    assert outcome.counts["whole"] + outcome.counts["in part"]
    settled = outcome.memory[len(outcome.memory) // 2 :]  # libraries are loaded by then
    assert settled[-1] - settled[0] < 30


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files = damaged(tmp_path / name, 3)
        runs.append([next(files).read_bytes() for _ in range(5)])
    assert runs[0] == runs[1]
