"""A W&B server of a few lines: takes runs, and can hang, refuse or fail from any moment on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """``mode``: "ok", "hang" (takes a request and never answers) or an HTTP status; ``runs``: what came, by id.

    ``fails``: the requests that ``mode`` is about: "all", or "uploads" (rows and files, not the opening of a run).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode: str | int = "ok"
        self.fails = "all"
        self.runs: dict[str, dict[str, Any]] = {}
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def run(self, name: str) -> dict[str, Any]:
        return self.runs.setdefault(name, {"opened": {}, "history": {}, "summary": {}, "complete": False, "files": []})


@contextmanager
def serving() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        upload = not self.path.startswith("/graphql") and self.path != "/"
        if self.server.mode != "ok" and (upload or self.server.fails == "all"):
            if self.server.mode == "hang":
                self.server.over.wait()
                return
            self._send(int(self.server.mode), {"error": "made to fail"})
        elif self.path.startswith("/graphql"):
            self._send(200, {"data": self._graphql(json.loads(body))})
        else:
            parts = self.path.strip("/").split("/")
            if parts[0] == "files" and parts[-1] == "file_stream":  # /files/ENTITY/PROJECT/RUN/file_stream
                self._stream(self.server.run(parts[3]), json.loads(body))
            self._send(200, {})

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _send(self, code: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        query, given = request["query"], request.get("variables") or {}
        if "upsertBucket" in query:
            run = self.server.run(given["name"])
            run["opened"].update({k: v for k, v in given.items() if v is not None})
            project = {"id": "P", "name": given.get("project") or "kd", "entity": {"id": "E", "name": "someone"}}
            shown = given.get("displayName") or given["name"]
            bucket = {"id": "B" + given["name"], "name": given["name"], "displayName": shown, "project": project}
            bucket |= {"description": "", "config": "{}", "sweepName": None, "historyLineCount": len(run["history"])}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": None}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/storage/{name}"} for name in given["files"]]
            self.server.run(given["run"])["files"] += given["files"]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        return {}

    def _stream(self, run: dict[str, Any], sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run["history"].update({part["offset"] + n: json.loads(x) for n, x in enumerate(part["content"])})
            elif name == "wandb-summary.json":
                run["summary"] = json.loads(part["content"][-1])
        run["complete"] = run["complete"] or bool(sent.get("complete"))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the tests read what was said by ``kd``."""
