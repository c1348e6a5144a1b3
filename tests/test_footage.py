"""Clips and images read when a model looks at them: sizes of each family, and a cache that is exact, shared and bounded."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engine import footage as module
from engine.backbones.internvl import cut_tiles
from engine.container import VideoError
from engine.footage import BUCKETS, Footage
from engine.layout import Frames
from engine.video import Sampling, resize
from tests.media import write
from tests.tiny import tiny_backbone, tiny_internvl

SAMPLING = Sampling(fps=4.0, min_frames=2, max_frames=8, pixels=56 * 56)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4")  # 2 s of 96 x 64


@pytest.fixture
def kept(clip, tmp_path):
    return Footage(clip, SAMPLING, False, str(tmp_path / "cache"), BUCKETS * 10**6)


def entries(footage: Footage) -> list[Path]:
    return sorted(path for path in Path(footage.cache).rglob("*") if path.is_file())


def test_kept_frames_are_those_that_were_decoded(kept, monkeypatch):
    plain, seconds = replace(kept, cache="").frames(SAMPLING)
    first = kept.frames(SAMPLING)
    monkeypatch.setattr(module, "read", None)  # nothing can be decoded any more
    again = kept.frames(SAMPLING)
    for frames, spacing in (first, again):
        assert frames.dtype == np.uint8
        assert (frames == plain).all()
        assert spacing == seconds
    again[0][:] = 0  # may be written to
    assert (kept.frames(SAMPLING)[0] == plain).all()


def test_other_settings_and_another_file_are_decoded_anew(kept):
    kept.frames(SAMPLING)
    kept.frames(replace(SAMPLING, fps=2.0))
    kept.frames(replace(SAMPLING, size=(28, 28)))
    assert len(entries(kept)) == 3
    before = kept.path.stat()
    os.utime(kept.path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    kept.frames(SAMPLING)
    assert len(entries(kept)) == 4


@pytest.mark.parametrize("harm", ["cut off", "a byte", "empty", "no entry"])
def test_a_damaged_entry_is_decoded_anew(kept, harm):
    frames, _ = kept.frames(SAMPLING)
    (entry,) = entries(kept)
    whole = entry.read_bytes()
    assert (module._kept(entry)[0] == frames).all()
    if harm == "no entry":
        save_file({"other": frames}, entry)
    else:
        entry.write_bytes({"cut off": whole[:-9], "a byte": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[harm])
    assert module._kept(entry) is None
    assert (kept.frames(SAMPLING)[0] == frames).all()
    assert (module._kept(entry)[0] == frames).all()


def test_a_full_cache_takes_no_more_and_still_serves(kept, clip, tmp_path):
    sizes = [(28 * n, 28) for n in range(1, 16)]
    for bound in (20_000, 0):
        small = replace(kept, cache=str(tmp_path / f"c{bound}"), cache_bytes=bound * BUCKETS)
        for size in sizes:
            shape = small.frames(replace(SAMPLING, size=size))[0].shape
            assert shape[1:3] == size
        held = sum(p.stat().st_size for p in entries(small))
        assert held <= bound * BUCKETS
        assert bool(held) == bool(bound)


def test_what_a_kill_left_is_removed_and_never_read(kept, monkeypatch):
    kept.frames(SAMPLING)
    (entry,) = entries(kept)
    old, young = entry.parent / "a.unfinished", entry.parent / "b.unfinished"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * module.LEFT_SECONDS))
    entry.unlink()
    kept.frames(SAMPLING)
    assert sorted(p.name for p in entries(kept)) == sorted([entry.name, "b.unfinished"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork, by which the writers are started")
def test_writers_that_are_killed_leave_whole_entries(kept):
    """Several processes write the same few entries over and over, and are killed while they do."""
    samplings = [replace(SAMPLING, size=(28 * n, 84)) for n in range(1, 5)]
    true = [replace(kept, cache="").frames(s) for s in samplings]
    writers = []
    for _ in range(3):
        if not (pid := os.fork()):
            while True:
                for sampling, (frames, seconds) in zip(samplings, true):
                    module._keep(kept._place(sampling), frames, seconds, 10**9)
        writers.append(pid)
    try:
        for _ in range(100):
            for sampling, (frames, seconds) in zip(samplings, true):
                found = module._kept(kept._place(sampling))
                assert found is None or ((found[0] == frames).all() and found[1] == seconds)
    finally:
        for pid in writers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    for sampling, (frames, _) in zip(samplings, true):
        assert (kept.frames(sampling)[0] == frames).all()


def test_a_folder_that_cannot_be_written_keeps_nothing(kept, tmp_path):
    (tmp_path / "file").write_text("")
    frames, _ = replace(kept, cache=str(tmp_path / "file")).frames(SAMPLING)
    assert len(frames) == 8


def test_a_clip_that_is_damaged_in_part_is_not_taken_for_whole(clip, tmp_path):
    broken = tmp_path / "broken.mp4"
    whole = clip.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 4) + whole[3 * len(whole) // 4 :])
    footage = Footage(broken, SAMPLING, False, str(tmp_path / "cache"), 10**9)
    with pytest.raises(VideoError):
        footage.frames(SAMPLING)
    assert entries(footage) == []
    (tmp_path / "none.mp4").write_bytes(b"no clip")
    with pytest.raises(VideoError):
        Footage(tmp_path / "none.mp4", SAMPLING).opened()
    assert Footage(clip, SAMPLING).opened().path == clip


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 131, 3), np.uint8)).save(path)
    return path


def test_a_file_is_what_it_is_called(clip, picture, tmp_path):
    for path, still in ((picture, False), (clip, True)):
        for look in (Footage.opened, lambda footage: footage.frames(SAMPLING)):
            with pytest.raises(VideoError, match="names a single picture" if path == picture else "names a film"):
                look(Footage(path, SAMPLING, still))
    one, *others = (Image.fromarray(np.full((56, 56, 3), grey, np.uint8)) for grey in (0, 90, 200))
    one.save(tmp_path / "loop.gif", save_all=True, append_images=others)
    for either in (tmp_path / "loop.gif", write(tmp_path / "one.mp4", count=1)):
        assert all(len(Footage(either, SAMPLING, still).frames(SAMPLING)[0]) for still in (False, True))


def test_tiles_are_cut_from_the_picture_as_it_is_stored(picture, tmp_path):
    """Resized once: the same tiles as from the raw pixels, and others than from a picture that was resized before."""
    pixels = np.array(Image.open(picture))[None]
    model = tiny_internvl()
    given = Footage(picture, Sampling(frames=1, pixels=56 * 84), True, str(tmp_path), 10**9)
    tiles = model.see(given)
    assert entries(given) == []  # nothing is kept that is larger than its file
    raw = cut_tiles(Frames(pixels, 0.25, still=True), model.tile_side)
    assert tiles.grid == raw.grid
    assert (tiles.patches == raw.patches).all()
    twice = cut_tiles(Frames(resize(pixels, 56, 84), 0.25, still=True), model.tile_side)
    assert twice.grid != raw.grid or (twice.patches != raw.patches).any()


def test_each_family_gets_frames_of_its_own_size(clip):
    footage = Footage(clip, SAMPLING)
    qwen, internvl = tiny_backbone(), tiny_internvl()
    stored = footage.frames(replace(SAMPLING, size="stored"))[0]
    assert stored.shape[1:3] == (64, 96)
    tiles = internvl.see(footage)
    assert (tiles.patches.permute(0, 2, 3, 1).numpy() == resize(stored, 28, 28)).all()
    patches = qwen.see(footage)
    assert patches.grid == (4, 2, 4)  # 28 x 56 pixels, two frames a slice
    assert patches.seconds == 0.5
