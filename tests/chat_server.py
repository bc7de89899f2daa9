"""A local server of OpenAI's protocol that answers what a test tells it to, also wrongly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Send = Callable[["Handler"], None]
"""What a request is answered with."""


def answer(text: Any = "fine", **more: Any) -> dict[str, Any]:
    """A right answer; ``more`` replaces its fields, None takes one out."""
    message = {"role": "assistant", "content": text}
    found = {
        "id": "x",
        "model": "teacher-1",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5},
        **more,
    }
    return {name: value for name, value in found.items() if value is not None}


def choice(**fields: Any) -> dict[str, Any]:
    """An answer whose choice has other fields."""
    return answer(choices=[{**answer()["choices"][0], **fields}])


def sends(body: Any, status: int = 200, **headers: str) -> Send:
    """A whole answer; ``body``: bytes, or what becomes JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler: handler.reply(status, content, headers)


def fails(status: int, message: str = "no", code: str | None = None, **headers: str) -> Send:
    """An error as servers write it."""
    return sends({"error": {"message": message, "code": code}}, status, **headers)


def stalls(seconds: float) -> Send:
    """Nothing for a while."""

    def send(handler: Handler) -> None:
        time.sleep(seconds)

    return send


def drips(seconds: float) -> Send:
    """A byte now and then: no single read takes long."""

    def send(handler: Handler) -> None:
        handler.reply(200, b"{", {"Content-Length": "1000"})
        for _ in range(int(seconds / 0.05)):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    return send


def truncates(handler: Handler) -> None:
    """Half of the body."""
    content = json.dumps(answer()).encode()
    handler.reply(200, content[: len(content) // 2], {"Content-Length": str(len(content))})


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.seen.append((self.path, dict(self.headers)))
            prompt = body["messages"][-1]["content"]
            scripted = self.server.script.get(prompt, [])
            send = scripted.pop(0) if scripted else self.server.otherwise(body)
        try:
            send(self)
        except OSError:  # the client went away
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """``script``: prompt → what its requests are answered with, one after the other; ``otherwise``: all others."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: dict[str, list[Send]] = {}
        self.requests: list[dict[str, Any]] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.otherwise: Callable[[dict[str, Any]], Send] = lambda body: sends(
            answer(f"re: {body['messages'][-1]['content']}")
        )

    def handle_error(self, *arguments: Any) -> None:
        """Say nothing."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self) -> list[str]:
        """The prompts, in the order of the requests."""
        return [body["messages"][-1]["content"] for body in self.requests]


@contextmanager
def serving() -> Iterator[Server]:
    """A server until the block ends."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
