"""A hub on this machine: the few endpoints that an upload needs, over HTTP, kept in memory."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class LocalHub(ThreadingHTTPServer):
    """Repositories by name, each with ``private`` and its ``files``; ``token`` is the only one that may write."""

    token = "hf_local"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            # a hub takes large files elsewhere, which is the client library's affair
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": file["path"], **mode} for file in json.loads(body)["files"]]})
        elif path.endswith("/commit/main"):
            self.commit(path.split("/api/models/")[1].removesuffix("/commit/main"), body)
        else:
            self.answer({"error": f"no {path}"}, 404)

    def do_GET(self) -> None:
        self.answer({"error": f"no {self.path}"}, 404)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.server.repositories
        if not known:
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.server.repositories[name] = {"private": private, "files": {}}
        self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": "1"}, 409 if known else 200)

    def commit(self, name: str, body: bytes) -> None:
        files = self.server.repositories[name]["files"]
        for line in filter(None, body.decode().split("\n")):
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1", "hookOutput": ""})

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class' name for it
        """Nothing on stderr."""


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
