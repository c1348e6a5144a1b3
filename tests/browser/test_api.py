"""The page's API: two endpoints, documented, that read no file of the server's."""

from __future__ import annotations

import json
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
    for endpoint in told.values():
        assert all(parameter["python_type"]["description"] for parameter in endpoint["parameters"])
        assert "http" not in json.dumps([parameter["example_input"] for parameter in endpoint["parameters"]])
    clip, _, options, *_ = told["/think"]["parameters"]
    assert (ROOT / clip["example_input"]["path"]).is_file()
    assert (options["parameter_has_default"], options["parameter_default"]) == (True, "")


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


def test_what_is_of_a_wrong_kind_gets_a_sentence(client: Client, server: Server) -> None:
    before = len(server.log.read_text())
    clip, question = handle_file(str(CLIP)), "Where is the ball at the end?"
    for given, told in (
        ([clip, question, "", None, False], "number of pauses must be a whole number from 0 to 32, not 'None'"),
        ([clip, question, "", "x", False], "number of pauses"),
        ([clip, question, "", 2.5, False], "number of pauses"),
        ([clip, 7, "", 8, False], "question must be text"),
        ([clip, question, ["left", "right"], 8, False], "options must be text"),
        ([{"video": clip}, question, "", 8, False], "must be an uploaded file"),
        ([7, question, "", 8, False], "must be an uploaded file"),
    ):
        with pytest.raises(AppError, match=told):
            client.predict(*given, api_name="/think")
    for given, told in (
        (["cups", "abc", 5], "number of steps must be a whole number from 1 to 10"),
        (["cups", 2.5, 5], "number of steps"),
        (["cups", 2, "abc"], "seed must be a whole number"),
        (["chess", 2, 5], "no world"),
    ):
        with pytest.raises(AppError, match=told):
            client.predict(*given, api_name="/film")
    assert "Traceback" not in server.log.read_text()[before:]


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
    stages = app.thinking({"any": None}, "any", None, "Where?", (), 4, False)
    assert next(stages) == "Answering"
    stages.close()
    assert ended.wait(10)
