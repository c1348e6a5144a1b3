"""A short run of tests/kill.py: a training run that is killed loses nothing beyond its last save."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.folders import Journal, as_a_whole, jot, replace_folder, restore, write_whole
from tests.serve import ROOT


def test_nothing_is_lost_beyond_the_last_save() -> None:
    """In a process of its own, because forks don't inherit the threads that other tests have started."""
    run = subprocess.run([sys.executable, "-m", "tests.kill", "--kills", "4"], cwd=ROOT, capture_output=True, text=True)
    told = json.loads(run.stdout)
    assert told["faults"] == []
    assert told["kills"] == 4
    assert told["steps_lost_beyond_the_last_save"] == 0
    assert run.returncode == 0


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo'])
def test_a_torn_line_of_the_log_takes_no_other_with_it(tmp_path: Path, torn: str) -> None:
    """Whether the run goes on from a checkpoint, which is noted, or was torn before its first."""
    log = tmp_path / "log.jsonl"
    for noted in (False, True):
        log.write_text('{"step": 2}\n' + torn)
        if noted:
            jot(tmp_path, {"resumed": 2})
        journal = Journal(tmp_path, 0)
        journal.record(3, {"loss": 1.0})
        journal.close()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines == [{"step": 2}, *[{"resumed": 2}] * noted, {"step": 3, "loss": 1.0}]


def test_a_folder_is_whole_whenever_its_replacing_is_killed(tmp_path: Path) -> None:
    made, place, old = tmp_path / "best.unfinished", tmp_path / "best", tmp_path / "best.old"

    def hold(folder: Path, content: str) -> None:
        folder.mkdir()
        (folder / "weights").write_text(content)

    hold(place, "one")
    hold(made, "two")
    replace_folder(made, place)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (place / "weights").read_text() == "two"
    place.rename(old)  # killed between its two moves
    hold(made, "three")
    (tmp_path / "checkpoints" / "step-0000002").mkdir(parents=True)
    hold(tmp_path / "checkpoints" / "unfinished", "half")
    restore(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    assert (place / "weights").read_text() == "two"


def test_what_stands_is_not_moved_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    with pytest.raises(FileNotFoundError, match="Nothing was written"), as_a_whole(tmp_path / "best"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    write_whole(tmp_path / "told.json", "{}")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "told.json", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["told.json"]
    assert (tmp_path / "told.json").read_text() == "{}"
