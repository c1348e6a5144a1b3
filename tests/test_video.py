"""engine/video.py: the right frames of every format, by every reader; damage and nonsense answered in a sentence."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import container, decoders, video
from engine.container import VideoError
from engine.video import Clip, Sampling, read, resize, smart_size
from tests import media

PLAIN = Sampling(pixels=96 * 64, factor=4)  # the test pictures keep their size
FIRST = "decord" if find_spec("decord") else "OpenCV"  # decord has no wheel for some machines
AV1 = media.encoder("libsvtav1", "libaom-av1")
FORMATS = [
    ("clip.mp4", "libx264", "yuv420p", FIRST),
    ("clip.mov", "libx264", "yuv420p", FIRST),
    ("clip.mkv", "libx264", "yuv420p", FIRST),
    ("hevc.mp4", media.encoder("libx265"), "yuv420p", FIRST),
    ("vp9.webm", media.encoder("libvpx-vp9"), "yuv420p", FIRST),
    ("vp8.webm", media.encoder("libvpx"), "yuv420p", FIRST),
    ("av1.mp4", AV1, "yuv420p", "PyAV"),
    ("av1.webm", AV1, "yuv420p", "PyAV"),
    ("clip.avi", "mpeg4", "yuv420p", "PyAV"),
    ("motion.avi", "mjpeg", "yuvj420p", "PyAV"),
    ("clip.gif", "gif", "rgb8", "PyAV"),
]
READERS = {"OpenCV": decoders.by_opencv, "PyAV": decoders.by_pyav} | (
    {"decord": decoders.by_decord} if FIRST == "decord" else {}
)


def numbers(clip: Clip) -> list[int]:
    return [media.number(frame) for frame in clip.frames]


def inspect(path: Path) -> container.Source:
    return container.inspect(path, time.monotonic() + 60, 60)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds, 240 frames, a keyframe each second."""
    return media.write(tmp_path_factory.mktemp("video") / "clip.mp4", count=240, g="24", preset="fast")


@pytest.mark.parametrize(("name", "codec", "pixels", "reader"), [row for row in FORMATS if row[1]], ids=lambda v: v)
def test_every_format_gives_the_frames_shown_at_the_moments_asked_for(
    tmp_path: Path, name: str, codec: str, pixels: str, reader: str
) -> None:
    fps = 25 if codec == "gif" else 24  # a GIF counts in hundredths of a second
    clip = read(media.write(tmp_path / name, codec, 2 * fps, fps, pixels=pixels), PLAIN)
    moments = np.arange(8) / 4
    assert numbers(clip) == [int(moment * fps + 1e-6) for moment in moments]
    assert np.abs(clip.times - np.floor(moments * fps + 1e-6) / fps).max() < 1e-3  # Matroska's rounding
    assert (clip.asked, clip.reader, clip.size, clip.notices) == (8, reader, (96, 64), ())
    assert (clip.duration, clip.fps) == (pytest.approx(2, abs=2e-3), pytest.approx(fps, rel=2e-3))
    assert (clip.seconds_per_frame, clip.sampling) == (0.25, PLAIN)


PQ = {"x265-params": "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"}
ODD = [
    ("ten.mp4", "libx264", "yuv420p10le", {}),
    ("hdr.mp4", "libx265", "yuv420p10le", PQ),
    ("twelve.mkv", "ffv1", "yuv444p12le", {}),
    ("grey.mp4", "libx264", "gray", {}),
    ("red_green_blue.mp4", "libx264rgb", "rgb24", {}),
    ("alpha.mov", "png", "rgba", {}),
    ("alpha.webm", "libvpx-vp9", "yuva420p", {}),
    ("alpha_ten.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
]


@pytest.mark.parametrize(("name", "codec", "pixels", "options"), ODD, ids=[row[0] for row in ODD])
def test_deep_bright_grey_and_transparent_pictures(
    tmp_path: Path, name: str, codec: str, pixels: str, options: dict
) -> None:
    clip = read(media.write(tmp_path / name, media.encoder(codec) or "png", pixels=pixels, **options), PLAIN)
    assert numbers(clip) == list(range(0, 48, 6))
    assert (clip.frames.dtype, clip.frames.shape, clip.notices) == (np.uint8, (8, 64, 96, 3), ())


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("b.mkv", "libx264", {"live": "1"}),
        ("c.webm", "libvpx-vp9", {"live": "1"}),
    ],
)
def test_files_without_an_index(tmp_path: Path, name: str, codec: str, options: dict) -> None:
    whole = media.write(tmp_path / f"whole_{name}", media.encoder(codec) or "libx264", 120, g="12")
    clip = read(media.remux(whole, tmp_path / name, **options), PLAIN)
    assert numbers(clip) == list(range(0, 120, 6))
    assert (clip.duration, clip.notices) == (pytest.approx(5, abs=2e-3), ())


@pytest.mark.parametrize("size", [(2, 2), (16, 2), (2, 16), (14, 10)])
def test_pictures_of_a_few_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    clip = read(media.write(tmp_path / "tiny.mp4", size=size), PLAIN)
    assert (clip.frames.shape[3], clip.size, len(clip.frames)) == (3, size, 8)


def test_a_clip_of_the_worlds_is_read_at_exact_quarters(tmp_path: Path) -> None:
    clip = read(media.write(tmp_path / "world.mp4", count=108, size=(504, 336)))
    assert clip.times.tolist() == [place / 4 for place in range(18)]
    assert clip.frames.shape == (18, 56, 84, 3)
    assert clip.frames.dtype == np.uint8
    assert (clip.duration, clip.fps, clip.asked, clip.notices) == (4.5, 24.0, 18, ())


@pytest.mark.parametrize("name", ["bframes.avi", "h264.avi"])
def test_frames_are_counted_where_stamps_are_missing(tmp_path: Path, name: str) -> None:
    codec = "mpeg4" if name.startswith("b") else "libx264"
    clip = read(media.write(tmp_path / name, codec, 48, bf="2", preset="fast"), PLAIN)
    assert numbers(clip) == list(range(0, 48, 6))


def test_the_readers_agree_at_scattered_places(mp4: Path) -> None:
    source, wanted = inspect(mp4), [0, 1, 23, 24, 25, 71, 100, 168, 238, 239]
    found = {name: dict(reader(source, wanted)) for name, reader in READERS.items()}
    for frames in found.values():
        assert [media.number(frame) for frame in frames.values()] == list(frames) == wanted
    for index in wanted:
        pictures = [frames[index].astype(int) for frames in found.values()]
        assert max(np.abs(picture - pictures[0]).max() for picture in pictures) <= 2


HEVC = {"x265-params": "keyint=8:bframes=4:open-gop=1:log-level=none"}
H264 = {"preset": "medium", "bf": "3", "x264-params": "open-gop=1:keyint=12"}
MPEG4 = {"g": "8", "bf": "2"}
LEADING = [
    ("libx265", "a.mp4", HEVC),
    ("libx265", "b.mkv", HEVC),
    ("libx264", "c.mp4", H264),
    ("mpeg4", "d.mp4", MPEG4),
]


@pytest.mark.parametrize(("codec", "name", "options"), LEADING)
def test_decord_is_not_asked_where_it_jumps_wrongly(tmp_path: Path, codec: str, name: str, options: dict) -> None:
    path = media.write(tmp_path / name, media.encoder(codec) or "mpeg4", 120, **options)
    clip = read(path, replace(PLAIN, frames=7))
    assert clip.reader == "PyAV"
    assert numbers(clip) == [0, 17, 34, 51, 68, 85, 102]
    assert numbers(clip) == np.round(clip.times * 24).astype(int).tolist()


@pytest.mark.parametrize(("codec", "name"), [("libx265", "a.mp4"), ("libvpx-vp9", "b.webm"), (AV1, "c.mkv")])
def test_jumps_between_keyframes_are_exact(tmp_path: Path, codec: str | None, name: str) -> None:
    path = media.write(tmp_path / name, media.encoder(codec or "") or "libx264", 120, g="12")
    source = inspect(path)
    wanted = [3, 40, 41, 90, 119]
    found = {index: media.number(picture) for index, picture in decoders.by_pyav(source, wanted)}
    assert found == {index: index for index in wanted}


def test_other_readers_step_in_where_wheels_are_missing(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    for module, reader in (("cv2", "OpenCV"), ("nothing", "PyAV")):
        clip = read(mp4, PLAIN)
        assert (clip.reader, numbers(clip)) == (reader, list(range(0, 240, 6)))
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("name", "codec", "tick"), [("v.mp4", "libx264", 1000), ("v.mkv", "libx264", 1000), ("v.gif", "gif", 100)]
)
def test_a_varying_rate_is_read_by_its_stamps(tmp_path: Path, name: str, codec: str, tick: int) -> None:
    moments = [0.0, 0.1, 0.2, 0.5, 0.6, 1.0, 1.1, 2.0]
    stamps = [round(moment * tick) for moment in moments]
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    path = media.write(tmp_path / name, codec, 8, pixels=pixels, stamps=stamps, tick=Fraction(1, tick))
    clip = read(path, PLAIN)
    assert numbers(clip) == [0, 2, 3, 4, 5, 6, 6, 6, 7]
    assert clip.times.tolist() == [moments[index] for index in numbers(clip)]
    gap = "No picture is stored between 1.14 s and 2.00 s; the one before stands for that time."
    assert clip.notices == ((gap,) if name == "v.mkv" else ())  # the others store how long a picture stays


def test_rounded_stamps_skip_and_repeat_nothing(tmp_path: Path) -> None:
    path = media.write(tmp_path / "clip.mkv", count=60, fps=30)  # 33, 67, 100 ... milliseconds
    assert numbers(read(path, replace(PLAIN, fps=30))) == list(range(60))


def test_time_begins_with_the_first_frame(mp4: Path, tmp_path: Path) -> None:
    clip = read(media.remux(mp4, tmp_path / "later.mp4", shift=12288), PLAIN)
    assert clip.times[:2].tolist() == [0, 0.25]
    assert numbers(clip) == list(range(0, 240, 6))


def test_frames_hidden_by_an_edit_list_are_not_counted(mp4: Path, tmp_path: Path) -> None:
    path = media.remux(mp4, tmp_path / "cut.mp4", shift=-10 * 512, avoid_negative_ts="disabled", use_editlist="1")
    clip = read(path, PLAIN)  # decord would count the hidden ones, and be wrong by ten after a jump
    assert numbers(clip) == list(range(10, 240, 6))
    assert clip.times[1] == 0.25


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_turned_films_are_put_upright(mp4: Path, tmp_path: Path, degrees: int) -> None:
    turned = media.turn(mp4, tmp_path / "turned.mp4", degrees)
    for path in (turned, media.remux(turned, tmp_path / "turned.mkv")):
        clip = read(path, PLAIN)
        stored = np.rot90(clip.frames[3], -degrees // 90)
        assert clip.size == ((96, 64) if degrees == 180 else (64, 96))
        assert media.number(stored) == 18
        assert stored[:8, :, 0].min() > 200 > 60 > stored[:8, :, 1].max()


def test_turned_photographs_are_put_upright(tmp_path: Path) -> None:
    picture = Image.fromarray(media.numbered(5))
    exif = picture.getexif()
    exif[0x112] = 6  # show it turned clockwise by a quarter
    picture.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    clip = read(tmp_path / "photo.jpg", PLAIN)
    assert clip.size == (64, 96)
    assert clip.frames[0, :, -8:, 0].min() > 150 > clip.frames[0, :, :32, 0].min()


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "RGBA"), ("b.png", "P"), ("c.png", "1"), ("d.jpg", "L"), ("e.jpg", "CMYK"), ("f.webp", "RGBA"), ("g.bmp", "RGB"),
     ("h.gif", "P")],
)  # fmt: skip
def test_pictures_of_every_kind_are_read(tmp_path: Path, name: str, mode: str) -> None:
    Image.fromarray(media.numbered(5)).convert(mode).save(tmp_path / name)
    clip = read(tmp_path / name, PLAIN)
    assert numbers(clip) == [5]
    assert clip.notices == ("A single picture is read, so nothing moves in it.",)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize(
    "name", ["photo.{}", "photo", "50%, no. %03d.{}", "what? [a*b] {{c}}.{}", "other.png", "other.jpg"]
)
def test_photographs_are_read_whatever_they_are_called(tmp_path: Path, form: str, name: str) -> None:
    """FFmpeg takes many a name for that of a numbered series of pictures, and large JPEGs by their name alone."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    path = tmp_path / name.format("jpg" if form == "JPEG" else form.lower())
    Image.fromarray(noise).save(path, form)
    assert path.stat().st_size > 50_000
    clip = read(path, replace(PLAIN, size="stored"))
    assert (clip.size, len(clip.frames), inspect(path).still) == ((400, 300), 1, None if form == "GIF" else True)
    if form in ("PNG", "BMP"):
        assert (clip.frames[0] == noise).all()


def test_of_a_photograph_with_previews_the_first_picture_is_read(tmp_path: Path) -> None:
    first, *others = (Image.fromarray(media.numbered(place)) for place in (5, 6, 7))
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=others)
    clip = read(tmp_path / "phone.jpg", PLAIN)
    assert numbers(clip) == [5]
    assert clip.notices[0] == "Of the 3 pictures in the file the first is read."


@pytest.mark.parametrize("clear", [0, 10], ids=["opaque", "transparent"])
def test_animations_that_draw_only_what_changes_are_read_whole(tmp_path: Path, clear: int) -> None:
    alpha = np.full((64, 96, 1), 255, np.uint8)
    alpha[:clear] = 0
    first, *others = (Image.fromarray(np.concatenate([media.numbered(place), alpha], 2)) for place in range(8))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=100, disposal=2 if clear else 1)
    clip = read(tmp_path / "a.gif", PLAIN)
    assert numbers(clip) == [0, 2, 5, 7]
    assert clip.times.tolist() == [0, 0.2, 0.5, 0.7]


def test_kinds_that_are_not_read_get_a_sentence(tmp_path: Path) -> None:
    first, *others = (Image.fromarray(media.numbered(place)) for place in range(3))
    for name in ("a.webp", "a.png"):
        first.save(tmp_path / name, save_all=True, append_images=others, duration=100)
    first.save(tmp_path / "a.tiff")
    for name in ("a.ts", "a.flv"):
        media.write(tmp_path / name, "libx264", 24)
    for path in tmp_path.iterdir():
        with pytest.raises(
            VideoError, match=r"give a whole MP4, MOV, WebM, MKV, AVI or GIF file, or a JPEG, PNG|of unknown size"
        ):
            read(path)


def test_pictures_may_change_their_size_on_the_way(tmp_path: Path) -> None:
    codec = media.encoder("libvpx-vp9", "libvpx") or "mjpeg"
    parts = [
        media.write(tmp_path / f"{size[0]}.webm", codec, 24, size=size) for size in ((96, 64), (192, 128), (64, 96))
    ]
    clip = read(media.joined(parts, tmp_path / "joined.webm"), PLAIN)
    assert numbers(clip) == [0, 6, 12, 18] * 3
    assert clip.frames.shape == (12, 64, 96, 3)


@pytest.mark.parametrize("count", [480, 10, 0])
def test_a_count_that_is_not_true_is_not_believed(tmp_path: Path, count: int) -> None:
    honest = media.write(tmp_path / "honest.avi", "mpeg4", 48)
    clip = read(media.declared(honest, tmp_path / "liar.avi", count), PLAIN)
    assert numbers(clip) == list(range(0, 48, 6))
    said = ("The file says that it lasts 20.00 s, but it is cut off after 2.00 s.",) if count > 48 else ()
    assert (clip.duration, clip.notices) == (pytest.approx(2), said)
    with pytest.raises(VideoError, match="hours: at most 6"):
        read(media.declared(honest, tmp_path / "liar.avi", 2**31 - 1), PLAIN)


def test_counts_are_held_to_their_bounds_and_said(mp4: Path) -> None:
    few = read(mp4, replace(PLAIN, fps=0.1, min_frames=5))
    assert numbers(few) == [0, 48, 96, 144, 192]
    assert few.seconds_per_frame == 2
    said = "0.1 frames a second of a clip of 10.00 s would be 1; 5 spread evenly over it were taken instead."
    assert few.notices == (said,)
    many = read(mp4, replace(PLAIN, fps=24, max_frames=8))
    assert numbers(many) == list(range(0, 240, 30))
    assert many.asked == 8
    assert "would be 240" in many.notices[0]
    exact = read(mp4, replace(PLAIN, frames=3))
    assert (numbers(exact), exact.notices) == ([0, 80, 160], ())
    even = read(mp4, replace(PLAIN, fps=None, max_frames=4))
    assert (numbers(even), even.notices) == ([0, 60, 120, 180], ())


def test_more_frames_than_there_are_get_repeats(tmp_path: Path) -> None:
    clip = read(media.write(tmp_path / "short.mp4", count=3), replace(PLAIN, frames=6))
    assert numbers(clip) == [0, 0, 1, 1, 2, 2]
    assert "only 3 frames" in clip.notices[0]


def test_a_single_picture_is_one_frame_and_said(tmp_path: Path) -> None:
    Image.fromarray(media.numbered(5)).save(tmp_path / "still.png")
    for path in (tmp_path / "still.png", media.write(tmp_path / "one.mp4", count=1)):
        clip = read(path, PLAIN)
        assert len(clip.frames) == clip.asked == 1
        assert (clip.times.tolist(), clip.seconds_per_frame) == ([0], 0.25)
        assert clip.notices == ("A single picture is read, so nothing moves in it.",)
    assert numbers(read(tmp_path / "still.png", PLAIN)) == [5]


ABSURD = {"fps": (0, -1.0, math.nan, math.inf, "4"), "frames": (0, 10**9), "min_frames": (1.5,), "max_frames": (2,)}


@pytest.mark.parametrize(("name", "values"), [*ABSURD.items(), ("pixels", (10, 0)), ("factor", (-28, None))])
def test_absurd_settings_are_refused(name: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(ValueError, match="memory" if value == 10**9 else name):
            Sampling(**{name: value})


def test_smart_size_is_that_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for height in (1, 14, 27, 41, 64, 240, 336, 1080, 2161):
        for width in (9, 28, 42, 97, 504, 1079, 1920):
            if max(height, width) <= 200 * min(height, width):
                for factor, pixels in ((28, 84 * 56), (28, 28 * 28), (32, 300_000), (4, 5000)):
                    expected = smart_resize(height, width, factor, factor**2, pixels)
                    assert smart_size(height, width, factor, pixels) == expected
    with pytest.raises(ValueError, match="too long"):
        smart_size(1, 1000, 28, 5000)


@pytest.mark.parametrize("pixels", [84 * 56, 200_000])
def test_resize_is_that_of_the_image_processors(pixels: int) -> None:
    """To one level of 255 (two in one value of 100,000 of pure noise), against PIL and against Qwen's processor."""
    from transformers.image_utils import SizeDict
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    noise = np.random.default_rng(0).integers(0, 256, (2, 133, 211, 3), np.uint8)
    height, width = smart_size(133, 211, 28, pixels)
    ours = resize(noise, height, width)
    pil = np.stack([Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC) for picture in noise])
    size, channels = SizeDict(shortest_edge=784, longest_edge=pixels), np.moveaxis(noise[0], -1, 0)
    theirs = Qwen2VLImageProcessorPil().resize(channels, size, Image.Resampling.BICUBIC, factor=28)
    assert ours.dtype == np.uint8
    assert ours.shape == (2, height, width, 3)
    for found, expected in ((ours, pil), (ours[0], np.moveaxis(theirs, 0, -1))):
        distance = np.abs(found.astype(int) - expected)
        assert distance.max() <= 2
        assert (distance > 1).mean() < 1e-4
        assert (distance > 0).mean() < 0.01
    assert resize(noise, 133, 211) is noise


def test_odd_sides_and_large_pictures(tmp_path: Path) -> None:
    odd = read(media.write(tmp_path / "odd.mp4", size=(109, 67), pixels="yuv444p"), PLAIN)
    assert odd.size == (109, 67)
    assert odd.frames.shape[1:] == (*smart_size(67, 109, 4, 96 * 64), 3)
    assert read(media.write(tmp_path / "large.mp4", count=3, size=(3840, 2160)), PLAIN).size == (3840, 2160)
    with pytest.raises(VideoError, match="800 x 2: the aspect ratio is too extreme"):
        read(media.write(tmp_path / "long.mkv", "ffv1", 2, size=(800, 2)), PLAIN)


def test_an_hour_is_read_in_seconds_by_decord_and_by_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media.write(tmp_path / "hour.mp4", count=3600, fps=1, g="60")
    for module in ("decord", "cv2"):
        begin = time.monotonic()
        clip = read(path, replace(PLAIN, fps=1, max_frames=20))
        assert numbers(clip) == clip.times.tolist() == list(range(0, 3600, 180))
        assert (clip.duration, clip.seconds_per_frame) == (3600, 180)
        assert time.monotonic() - begin < 5
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(decoders, "SEQUENTIAL", 1000)
    monkeypatch.delitem(sys.modules, "cv2")
    assert read(path, PLAIN).reader == "PyAV"  # OpenCV would have to decode the whole hour
    decoded, frames = [], container.frames_of
    monkeypatch.setattr(decoders, "frames_of", lambda *given: (decoded.append(0) or frame for frame in frames(*given)))
    assert len(list(decoders.by_pyav(inspect(path), [0, 1000, 3599]))) == 3
    assert len(decoded) < 150  # of 3600: it jumps


def test_damage_in_the_middle_costs_some_frames_and_is_said(
    mp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = read(media.damage(mp4, tmp_path / "hurt.mp4", 0.5, 300), PLAIN)
    assert clip.asked == 40
    assert 20 < len(clip.frames) < 40
    assert numbers(clip) == np.round(clip.times * 24).astype(int).tolist()  # those that came are the right ones
    assert f"{len(clip.frames)} of the 40 frames asked for could be read: the file is damaged" in clip.notices[0]
    assert clip.seconds_per_frame == 0.25
    monkeypatch.setitem(sys.modules, "decord", None)  # OpenCV only stops, so PyAV has the last word here too
    again = read(tmp_path / "hurt.mp4", PLAIN)
    assert again.reader == "PyAV"
    assert numbers(again) == np.round(again.times * 24).astype(int).tolist()


def test_opencv_stops_where_it_loses_the_count(mp4: Path) -> None:
    source = inspect(mp4)
    fewer = replace(source, times=np.delete(source.times, 50))  # as if the decoder had swallowed a frame
    assert [index for index, _ in decoders.by_opencv(fewer, [0, 49, 50, 51, 100])] == [0, 49]


@pytest.mark.parametrize(("codec", "name"), [("libvpx-vp9", "a.webm"), ("mpeg4", "a.avi"), (AV1, "a.mp4")])
def test_damaged_files_of_other_formats(tmp_path: Path, codec: str | None, name: str) -> None:
    whole = media.write(tmp_path / name, media.encoder(codec or "") or "libx264", 120, size=(192, 128), g="24")
    clip = read(media.damage(whole, tmp_path / f"hurt{name}", 0.5, 400), PLAIN)
    assert 0 < len(clip.frames) <= clip.asked
    assert clip.notices


def test_a_file_that_ends_too_soon(mp4: Path, tmp_path: Path) -> None:
    media.remux(mp4, tmp_path / "index_first.mp4", movflags="faststart")
    media.remux(mp4, tmp_path / "clip.mkv")
    media.write(tmp_path / "clip.avi", "mpeg4", 240)
    for path in (*tmp_path.iterdir(), mp4):
        data, part = path.read_bytes(), tmp_path / f"part_{path.name}"
        part.write_bytes(data[: len(data) * 6 // 10])
        if path == mp4:  # its index comes last
            with pytest.raises(VideoError, match="cut off"):
                read(part)
        else:
            clip = read(part, PLAIN)
            assert "lasts 10.00 s, but it is cut off after" in clip.notices[0]
            assert 10 < len(clip.frames) <= clip.asked < 30
            assert numbers(clip) == list(range(0, 6 * len(clip.frames), 6))


def _hang(source: container.Source, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    yield wanted[0], np.zeros((64, 96, 3), np.uint8)
    time.sleep(30)


def test_a_reader_that_hangs_is_left_behind(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    monkeypatch.setattr(decoders, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(video, "readers", lambda _: [("decord", _hang), ("PyAV", decoders.by_pyav)])
    clip = read(mp4, PLAIN)
    assert (clip.reader, numbers(clip), clip.notices) == ("PyAV", list(range(0, 240, 6)), ())
    assert time.monotonic() - begin < 10


def test_time_that_runs_out_leaves_what_was_read(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "readers", lambda _: [("decord", _hang), ("PyAV", decoders.by_pyav)])
    clip = read(mp4, PLAIN, 0.5)
    assert len(clip.frames) == 1
    assert clip.notices == ("1 of the 40 frames asked for could be read: reading was stopped after 0.5 s.",)
    with pytest.raises(VideoError, match="takes longer than 0 s"):
        read(mp4, PLAIN, 0.0)


def test_what_is_no_video_is_refused_in_one_sentence(
    tmp_path: Path, mp4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mp4.read_bytes()
    assert container.opened(media.huge_picture(tmp_path / "huge.png")).streams.video[0].width == 0  # never unpacked
    (tmp_path / "other.mp4").write_bytes(data)
    cases: dict[str, tuple[bytes, str]] = {
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"This is only text.\n" * 500, "can't be read"),
        "noise.mp4": (np.random.default_rng(0).bytes(50_000), "can't be read"),
        "cut.mp4": (data[: len(data) // 2], "cut off"),
        "head.mp4": (data[:100], "cut off"),
        "list.mp4": (b"ffconcat version 1.0\nfile 'other.mp4'\n", "can't be read"),
        "m3u.mp4": (f"#EXTM3U\n#EXTINF:1,\n{mp4}\n#EXT-X-ENDLIST\n".encode(), "can't be read"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=said):
            read(tmp_path / name)
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "missing.mp4", "There is no file 'missing.mp4'"),
        (str(tmp_path / "zero\0byte.mp4"), "There is no file"),
        ("x" * 5000, "There is no file"),
        ("/dev/zero", "is not a regular file"),
        ("", "There is no video yet"),
        (None, "There is no video yet"),
        (media.sound(tmp_path / "sound.mp4"), "holds only sound or text"),
        (media.sound(tmp_path / "song.mp4", cover=True), "holds only sound or text"),
        (media.huge_picture(tmp_path / "huge.png"), "larger than 8192 x 8192"),
        (media.damage(mp4, tmp_path / "wiped.mp4", 0.001, int(len(data) * 0.9)), "can't be read"),
    ):
        with pytest.raises(VideoError, match=said) as refused:
            read(path)
        assert str(refused.value).count("\n") == 0
        assert len(str(refused.value)) < 200
    monkeypatch.setattr(container, "MAX_FRAMES", 240)
    assert len(read(mp4).frames) == 40
    monkeypatch.setattr(container, "MAX_FRAMES", 239)
    with pytest.raises(VideoError, match="more than 239 pictures"):
        read(mp4)
    monkeypatch.setattr(container, "MAX_HOURS", 0.001)
    with pytest.raises(VideoError, match="hours: at most"):
        read(mp4)
    monkeypatch.setattr(container, "MAX_BYTES", 100)
    with pytest.raises(VideoError, match="GB"):
        read(mp4)


def test_a_file_that_may_not_be_read(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)  # an administrator may read everything, so the mode can't be tested
    with pytest.raises(VideoError, match="permission denied"):
        read(mp4)


def test_nothing_is_printed_even_for_damaged_files(mp4: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    hurt = media.damage(mp4, tmp_path / "hurt.mp4", 0.5, 300)
    source = inspect(hurt)
    read(hurt)
    for reader in (decoders.by_opencv, decoders.by_pyav):
        list(reader(source, [0, 239]))
    with pytest.raises(VideoError):
        read(media.damage(mp4, tmp_path / "gone.mp4", 0.0, 2000))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_importing_loads_no_reader() -> None:
    heavy = "{'av', 'cv2', 'decord', 'torch'}"
    code = f"import sys, engine.video; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_names_may_be_odd(mp4: Path, tmp_path: Path) -> None:
    path = tmp_path / "für 50% %03d:'[x]?.mp4"
    path.write_bytes(mp4.read_bytes())
    assert len(read(str(path)).frames) == 40


def test_a_real_clip_is_read_alike_by_all(mp4: Path) -> None:
    real = files("gradio") / "media_assets" / "videos" / "world.mp4"
    source = inspect(Path(str(real)) if real.is_file() else mp4)
    wanted = [0, 7, 100, 200]
    pictures = [np.stack([p for _, p in reader(source, wanted)]).astype(int) for reader in READERS.values()]
    assert max(np.abs(other - pictures[0]).max() for other in pictures[1:]) <= 2
    assert np.abs(pictures[0][0] - pictures[0][2]).mean() > 1  # and the frames do differ


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the way it schedules")
def test_writing_a_clip_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    """A real-time process would starve the browser and all else that tests start after it."""
    before = os.sched_getscheduler(0)
    for codec in filter(None, (AV1, "libx264")):
        media.write(tmp_path / f"{codec}.mp4", codec, 2)
        assert os.sched_getscheduler(0) == before
