"""A hub on this machine: the few endpoints that an upload needs, over HTTP, kept in memory."""

import base64
import hashlib
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
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif path.endswith("/commit/main"):
            self.commit(path.split("/api/models/")[1].removesuffix("/commit/main"), body)
        else:
            self.answer({"error": f"no {path}"}, 404)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.server.objects[self.path.rpartition("/")[2]] = body
        self.answer({})

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
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.objects[entry["value"]["oid"]]
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1", "hookOutput": ""})

    def answer(self, value: Any, status: int = 200, *, kind: str = "application/json") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
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
