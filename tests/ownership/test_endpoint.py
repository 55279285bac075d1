"""Asking a model behind an OpenAI-style address."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import pytest

from fedllm.errors import ConfigError, ResourceError
from fedllm.ownership.endpoint import KEY_VARIABLE, Endpoint


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, dict[str, str], Any]]] = []
    reply: ClassVar[tuple[int, bytes]] = (200, b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, dict(self.headers), body))
        status, reply = self.reply
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "file:///etc/hostname")
        self.end_headers()
        self.wfile.write(reply or json.dumps({"choices": [{"text": body["prompt"][::-1]}]}).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    Handler.asked.clear()
    Handler.reply = (200, b"")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_each_prompt_is_asked_once_without_sampling(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret-token")
    assert Endpoint(url, "suspect")(["abc", "xyz"]) == ["cba", "zyx"]
    assert [(path, body["prompt"]) for path, _, body in Handler.asked] == [
        ("/v1/completions", "abc"),
        ("/v1/completions", "xyz"),
    ]
    assert Handler.asked[0][2] == {"model": "suspect", "prompt": "abc", "max_tokens": 48, "temperature": 0}
    assert Handler.asked[0][1]["Authorization"] == "Bearer secret-token"


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/completions"])
def test_the_address_may_be_given_in_any_length(end: str) -> None:
    assert Endpoint(f"http://host:8000{end}").address == "http://host:8000/v1/completions"


@pytest.mark.parametrize("bad", ["file:///etc/passwd", "ftp://host", "host:8000", "http://"])
def test_other_addresses_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Endpoint(bad)
    assert refused.value.code == "BAD_VALUE"


@pytest.mark.parametrize(
    "reply",
    [
        (500, b"row of data"),
        (302, b"x"),
        (200, b"row of data"),
        (200, b'{"choices": []}'),
        (200, b'{"choices":[{"text":7}]}'),
    ],
)
def test_what_is_no_answer_is_named_without_quoting_it(url: str, reply: tuple[int, bytes]) -> None:
    Handler.reply = reply
    with pytest.raises(ResourceError) as refused:
        Endpoint(url)(["secret prompt"])
    assert refused.value.code == "ENDPOINT_FAILED"
    assert "row of data" not in str(refused.value) and "secret prompt" not in str(refused.value)


def test_nobody_there_is_said_so() -> None:
    with pytest.raises(ResourceError) as refused:
        Endpoint("http://127.0.0.1:9", timeout_s=2)(["abc"])
    assert refused.value.code == "ENDPOINT_FAILED" and "/v1/completions" in refused.value.where
