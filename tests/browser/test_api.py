"""The page's API: two endpoints, documented, that read no file of the server's."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from engine import worlds
from tests.serve import ROOT, Server

CLIP = ROOT / "assets" / "examples" / "cups-3-2.mp4"


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def test_two_endpoints_are_public_and_documented(client: Client, server: Server) -> None:
    told = httpx.get(f"{server.url}/gradio_api/info").json()["named_endpoints"]
    assert set(told) == {"/think", "/film"}
    names = [parameter["parameter_name"] for parameter in told["/think"]["parameters"]]
    assert names == ["clip", "question", "options", "pauses", "write_chain"]
    assert [parameter["parameter_name"] for parameter in told["/film"]["parameters"]] == ["family", "steps", "seed"]
    assert all(len(endpoint["description"]) > 40 for endpoint in told.values())


def test_think(client: Client) -> None:
    reply = client.predict(
        handle_file(str(CLIP)), "Where is the ball at the end?", "left\nmiddle\nright", 8, True, api_name="/think"
    )
    assert reply["answer"] in ("left", "middle", "right")
    assert [option["text"] for option in reply["options"]] == ["left", "middle", "right"]
    assert reply["slots"] == 8
    assert reply["explicit"]["generated_tokens"] >= 1
    assert "states" not in reply
    with pytest.raises(AppError, match="1 option"):
        client.predict(handle_file(str(CLIP)), "Where?", "left", 8, True, api_name="/think")


def test_film(client: Client) -> None:
    record = worlds.make("tally", 2, 5, "fresh")
    clip, question, options = client.predict("tally", 2, 5, api_name="/film")
    assert clip.endswith("tally-2-5.mp4")
    assert (question, options) == (record.question, "\n".join(record.options))
    with pytest.raises(AppError, match="whole number from 0"):
        client.predict("tally", 2, -1, api_name="/film")


def test_no_file_of_the_server_can_be_read(server: Server) -> None:
    for path in (str(ROOT / "app.py"), str(CLIP), str(server.log)):
        for clip in (
            {"path": path, "meta": {"_type": "gradio.FileData"}},
            {"path": path},
            {"video": {"path": path}},
            path,
        ):
            asked = httpx.post(f"{server.url}/gradio_api/call/think", json={"data": [clip, "Where?", "a\nb", 4, False]})
            if asked.status_code == 200:
                told = httpx.get(f"{server.url}/gradio_api/call/think/{asked.json()['event_id']}", timeout=30).text
                assert "event: complete" not in told
    for path in (ROOT / "app.py", ROOT / "assets" / "style.css", server.log):
        assert httpx.get(f"{server.url}/gradio_api/file={path}").status_code in (403, 404)


def test_closing_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stops waiting for a reply stops the model too, at its next stage."""
    import app

    ended = threading.Event()

    def endless(*args: object) -> None:
        report = args[-2]  # donors follow
        try:
            while True:
                report("Answering")
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(app.ask, "ask", endless)
    stages = app.thinking(None, None, "Where?", (), 4, False)
    assert next(stages) == "Answering"
    stages.close()
    assert ended.wait(10)
