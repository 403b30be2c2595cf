"""A model hub on loopback, as far as huggingface_hub asks one for a model."""

import hashlib
import http.server
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from support.server.loopback import answering

COMMIT = "a" * 40
CUT_ABOVE = 100_000  # bytes: smaller files are always sent whole


@dataclass
class FakeHub:
    """A hub with one repository. Its fields may be changed while it runs.

    folder: files of the repository.
    repository: its name, ORG/NAME.
    old_name: name from which the hub redirects to ``repository``.
    token: token that requests must have; None = everybody may read.
    num_cuts: downloads that will end halfway.
    asked: method, path and range of each request.
    url: address of the hub.
    """

    folder: Path
    repository: str = "org/model"
    old_name: str = "org/old-model"
    token: str | None = None
    num_cuts: int = 0
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""

    @property
    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}

    def fetched(self) -> set[str]:
        """Returns the files of which a part was downloaded."""
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in paths}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Yields the hub while it answers."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with answering(Handler) as hub.url:
        yield hub


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the tests' output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        parts = parts[2:] if parts[:2] == ["api", "models"] else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == self.hub.old_name:
            return self._answer(307, headers={"Location": self.path.replace(name, self.hub.repository)})
        if name != self.hub.repository:
            return self._refuse(404, "RepoNotFound")
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "GatedRepo")
        if rest and rest[1] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if rest and rest[0] == "resolve":
            return self._file("/".join(rest[2:]))
        return self._answer(200, json.dumps(self._tree() if rest[:1] == ["tree"] else self._info()).encode())

    def _info(self) -> dict[str, object]:
        siblings = [{"rfilename": name, "size": p.stat().st_size} for name, p in self.hub.files.items()]
        name = self.hub.repository
        return {"id": name, "modelId": name, "sha": COMMIT, "private": False, "gated": False,
                "disabled": False, "tags": [], "siblings": siblings}  # fmt: skip

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": (size := path.stat().st_size), "oid": _hash(path)[:40],
             "lfs": {"oid": _hash(path), "size": size, "pointerSize": 134}}
            for name, path in self.hub.files.items()
        ]  # fmt: skip

    def _file(self, name: str) -> None:
        if (path := self.hub.files.get(name)) is None:
            return self._refuse(404, "EntryNotFound")
        data, wanted = path.read_bytes(), self.headers.get("Range", "")
        first = int(wanted.removeprefix("bytes=").partition("-")[0] or 0) if wanted else 0
        about = {"ETag": f'"{_hash(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        about |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{_hash(path)}"'}
        if first:
            about["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._answer(206 if first else 200, data[first:], about)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, headers={"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if len(body) > CUT_ABOVE and self.hub.num_cuts:
            self.hub.num_cuts -= 1
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
