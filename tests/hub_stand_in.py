"""A small stand-in for the Hugging Face Hub on loopback: repositories with branches, tags, commits and large files."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


# Files of these endings are sent and stored as large ones.
LARGE = (".safetensors", ".bin")


class Hub:
    """
    The stand-in; a context manager that serves at `url`.

    Attributes:
        repositories (`dict`): name -> {"commits": {id: {path: bytes}}, "refs": {branch or tag: id}}.
        large (`dict[str, bytes]`): content of large files by their SHA-256.
        requests (`list[str]`): "METHOD path" of all that was asked.
        cuts (`int`): so many downloads of large files are still broken off in the middle.
        held (`threading.Event`): cleared, uploads of large files wait until it is set.
    """

    def __init__(self):
        self.repositories, self.large, self.requests, self.cuts = {}, {}, [], 0
        self.held = threading.Event()
        self.held.set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.held.set()
        self.server.shutdown()
        self.server.server_close()

    def commit_of(self, name: str, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's id means."""
        repository = self.repositories[name]
        return repository["refs"].get(revision, revision if revision in repository["commits"] else None)

    def commit(self, name: str, branch: str, change: dict[str, bytes | None]) -> str:
        """A new commit on a branch; `None` deletes a file."""
        repository = self.repositories[name]
        before = repository["refs"].get(branch)
        files = {**repository["commits"].get(before, {}), **change}
        files = {path: content for path, content in files.items() if content is not None}
        digest = hashlib.sha1(f"{before}{len(repository['commits'])}".encode()).hexdigest()
        repository["commits"][digest], repository["refs"][branch] = files, digest
        return digest


def blob_id(content: bytes) -> str:
    """What git calls this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str):
        self.answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self):
        """Find the method for a request by its path."""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        content = self.body() if self.command in ("POST", "PUT") else b""
        for pattern, method in ROUTES.items():
            match = re.fullmatch(f"({pattern[0]}) {pattern[1]}", f"{self.command} {path}")
            if match:
                name = match.groupdict().get("repo")
                if name is not None and name not in self.hub.repositories:
                    return self.missing("RepoNotFound")
                return method(self, content, **match.groupdict())
        self.answer(404, {"error": f"The stand-in does not know {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = route

    def create(self, content):
        asked = json.loads(content)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        name = name if "/" in name else f"me/{name}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = {"commits": {}, "refs": {}, "private": asked.get("private", False)}
        self.hub.commit(name, "main", {".gitattributes": b""})
        self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def who(self, content):
        self.answer(200, {"name": "me", "type": "user", "orgs": []})

    def card(self, content):
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, content, repo, revision):
        refs = self.hub.repositories[repo]["refs"]
        if revision in refs:
            return self.answer(409, {"error": "exists"})
        refs[revision] = refs["main"]
        self.answer(200, {})

    def tag(self, content, repo, revision):
        self.hub.repositories[repo]["refs"][json.loads(content)["tag"]] = self.hub.commit_of(repo, revision)
        self.answer(200, {})

    def info(self, content, repo, revision="main"):
        commit = self.hub.commit_of(repo, revision)
        if commit is None:
            return self.missing("RevisionNotFound")
        files = self.hub.repositories[repo]["commits"][commit]
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.answer(
            200, {"id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings, "tags": []}
        )

    def tree(self, content, repo, revision):
        commit = self.hub.commit_of(repo, revision.split("/")[0])
        if commit is None:
            return self.missing("RevisionNotFound")
        entries = []
        for path, item in sorted(self.hub.repositories[repo]["commits"][commit].items()):
            entry = {"type": "file", "path": path, "oid": blob_id(item), "size": len(item)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(item).hexdigest(), "size": len(item), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def preupload(self, content, repo, revision):
        commit = self.hub.commit_of(repo, revision)
        there = self.hub.repositories[repo]["commits"].get(commit, {})
        files = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if item["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": blob_id(there[item["path"]]) if item["path"] in there else None,
            }
            for item in json.loads(content)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, content, repo):
        objects = []
        for item in json.loads(content)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, content, oid):
        self.hub.held.wait()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "the content is not what was announced"})
        self.hub.large[oid] = content
        self.answer(200)

    def commit(self, content, repo, revision):
        change = {}
        for line in content.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                change[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                change[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                change[value["path"]] = None
        commit = self.hub.commit(repo, revision, change)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    def resolve(self, content, repo, revision, path):
        commit = self.hub.commit_of(repo, revision)
        if commit is None:
            return self.missing("RevisionNotFound")
        item = self.hub.repositories[repo]["commits"][commit].get(path)
        if item is None:
            return self.answer(404, {"error": "x"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha256(item).hexdigest() if path.endswith(LARGE) else blob_id(item)
        first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(item) - 1}/{len(item)}"
        if self.command == "GET" and path.endswith(LARGE) and self.hub.cuts:
            self.hub.cuts -= 1
            # Promise all and close half-way.
            self.send_response(206 if first else 200)
            for name, value in {**headers, "Content-Length": len(item) - first}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(item[first : first + max(1, (len(item) - first) // 2)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(1)
            return None
        self.answer(206 if first else 200, item[first:], **headers)


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    ("POST", "/api/repos/create"): Handler.create,
    ("GET", "/api/whoami-v2"): Handler.who,
    ("POST", "/api/validate-yaml"): Handler.card,
    ("POST", f"/api/models/{REPO}/branch/(?P<revision>.+)"): Handler.branch,
    ("POST", f"/api/models/{REPO}/tag/(?P<revision>.+)"): Handler.tag,
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)"): Handler.preupload,
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)"): Handler.commit,
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>.+)"): Handler.tree,
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)"): Handler.info,
    ("GET", f"/api/models/{REPO}"): Handler.info,
    ("POST", f"/{REPO}.git/info/lfs/objects/batch"): Handler.batch,
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})"): Handler.store,
    ("GET|HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): Handler.resolve,
}
