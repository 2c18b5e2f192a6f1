"""A server on this machine that answers ``huggingface_hub`` as the Hub does, with models in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
"""What a client must show to write, or to see what is private."""


@dataclass
class Repo:
    """Commits by hash, each with all files; revisions by name.

    Attributes:
        said: sizes that the listing says, where others than are true.
        cut: bytes that are sent of a file, where fewer than it has.
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """A commit with these files beside those of the one before."""
        files = self.commits.get(self.revisions.get(revision, ""), {}) | files
        lines = "".join(f"{name} {hashlib.sha1(each).hexdigest()}\n" for name, each in sorted(files.items()))
        commit = hashlib.sha1(lines.encode()).hexdigest()
        self.commits[commit], self.revisions[revision] = files, commit
        return commit


@dataclass
class Hub:
    """What the server has, and the paths that it was asked for."""

    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, name: str, folder: Path, **settings: bool) -> Repo:
        """A repository with the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        repo = self.repos[name] = Repo(**settings)
        repo.commit(files)
        return repo

    def sent(self) -> list[str]:
        """Names of the files whose content was asked for, since the last call."""
        names = [path.split("/resolve/")[1].split("/", 1)[1] for path in self.asked if "/resolve/" in path]
        self.asked.clear()
        return names


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        return repo if repo is not None and (self.known or not repo.private) else None

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.command == "GET":
            self.hub.asked.append(path)
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            file = None
        else:
            name, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
        repo = self.repo(name)
        if repo is None:
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        commit = repo.revisions.get(revision or "main", revision)
        files = repo.commits.get(commit)
        if files is None and repo.commits:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif file is None:
            listed = [
                {"rfilename": name, "size": repo.said.get(name, len(each))}
                for name, each in (files or {}).items()
            ]
            self.answer(200, {"id": name, "sha": commit, "private": repo.private, "siblings": listed})
        elif file not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            content = files[file]
            about = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": commit}
            self.answer(200, content if self.command == "HEAD" else content[: repo.cut.get(file)], **about)

    do_HEAD = do_GET

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self) -> None:
        self.hub.large[self.path.removeprefix("/large/")] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.asked.append(path)
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif not self.known:
            self.answer(401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            hrefs = {each["oid"]: {"href": f"{self.hub.endpoint}/large/{each['oid']}"} for each in wanted}
            objects = [{**each, "actions": {"upload": hrefs[each["oid"]]}} for each in wanted]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/preupload/" in path:
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            listed = [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in files]
            self.answer(200, {"files": listed})
        elif "/commit/" in path:
            self.commit(path.removeprefix("/api/models/").split("/commit/")[0], body)
        else:
            self.answer(404)

    def create(self, wanted: dict[str, str]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.hub.repos
        if not there:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.hub.repos[name] = Repo(private)
        self.answer(409 if there else 200, {"url": f"{self.hub.endpoint}/{name}"})

    def commit(self, name: str, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        commit = self.hub.repos[name].commit(files)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})


def cached(cache: Path, name: str, folder: Path) -> None:
    """Puts a folder's files into a cache as a download would, but that they aren't links."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


@contextmanager
def serving() -> Iterator[Hub]:
    """A server, until the end."""
    hub = Hub()
    handler = type("Of", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
