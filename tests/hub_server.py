"""A server on localhost that speaks the part of the Hub's API that pushing and loading models need.

    with hub_server() as hub:
        subprocess.run(..., env=hub.environment(home))
        hub.files("user/name")["README.md"]

It keeps repositories in memory, as commits of whole trees. Large files travel by git LFS, as on the Hub: the commit
names a digest, and the bytes have been uploaded before.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "user"
# What the Hub's .gitattributes send by LFS.
LARGE = re.compile(r".*\.(safetensors|bin|pt|gguf)")
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Refused(Exception):
    """An answer that is an error, as the Hub gives it."""

    def __init__(self, status, code, message):
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The repositories: names of commits by revision, and the files of each commit."""

    def __init__(self):
        self.revisions: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.sent_large: set[str] = set()
        self.requests: list[str] = []
        self.url = ""

    def environment(self, home) -> dict[str, str]:
        """The environment of a process that uses this server and its own cache in `home`, and no proxy."""
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_of_the_test",
            "NO_PROXY": "localhost,127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }

    def files(self, repo, revision="main") -> dict[str, bytes]:
        if repo not in self.revisions:
            raise Refused(404, "RepoNotFound", "Repository not found")
        commit = self.revisions[repo].get(revision, revision)
        if commit not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[commit]

    def commit_of(self, repo, revision) -> str:
        self.files(repo, revision)
        return self.revisions[repo].get(revision, revision)

    def add_commit(self, repo, revision, files) -> str:
        text = json.dumps([repo, revision, len(self.commits)] + sorted(files))
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = files
        self.revisions[repo][revision] = name
        return name


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer("GET")

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, _):
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = self._chunks() if chunked else self.rfile.read(length)
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.hub.requests.append(f"{self.command} {unquote(parts.path)}")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for allowed, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, unquote(parts.path))
                if found and allowed == method:
                    answer(self, body, **found.groupdict())
                    return
            raise Refused(404, "EntryNotFound", f"No such address: {self.command} {self.path}")
        except Refused as refusal:
            self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), {"X-Error-Code": refusal.code})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # What the addresses answer.

    def who(self, body):
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.revisions:
            self._json(answer | {"error": "You already created this model repo"}, 409)
            return
        self.hub.revisions[repo] = {}
        self.hub.add_commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._json(answer)

    def validate(self, body):
        text = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else None
        wrong = [] if isinstance(metadata, dict) else ["empty or missing yaml metadata in repo card"]
        for entry in (metadata or {}).get("model-index", []):
            for result in entry.get("results", []):
                missing = {"task", "dataset", "metrics"} - set(result)
                wrong += [f'"model-index[0].results[0].{name}" is required' for name in missing]
        errors = [{"message": message} for message in wrong]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body, repo, revision):
        self.hub.files(repo, revision)
        asked = json.loads(body)["files"]
        found = [{"path": file["path"], "shouldIgnore": False, "uploadMode": "regular"} for file in asked]
        for file in found:
            if LARGE.fullmatch(file["path"]):
                file["uploadMode"] = "lfs"
        self._json({"files": found})

    def batch(self, body, repo):
        objects = []
        for file in json.loads(body)["objects"]:
            answer = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.hub.large:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/large/{file['oid']}", "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "BadRequest", "The digest of the content is another one")
        self.hub.large[oid] = body
        self._send(200)

    def commit(self, body, repo, revision):
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = dict(self.hub.files(repo, revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, "BadRequest", f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
                self.hub.sent_large.add(value["path"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        if "create_pr" in self.query:
            revision = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in self.hub.revisions[repo])}"
        name = self.hub.add_commit(repo, revision, files)
        answer = {"success": True, "commitOid": name, "commitUrl": f"{self.hub.url}/{repo}/commit/{name}"}
        if "create_pr" in self.query:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{revision.rpartition('/')[2]}"
        self._json(answer)

    def branch(self, body, repo, revision):
        if revision in self.hub.revisions.get(repo, {}):
            raise Refused(409, "Conflict", "Reference already exists")
        self.hub.revisions[repo][revision] = self.hub.commit_of(repo, "main")
        self._json({})

    def info(self, body, repo, revision="main"):
        files = self.hub.files(repo, revision)
        found = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), flags=re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else {}
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        known = {"tags": []} | {
            name: metadata[name] for name in ("tags", "library_name", "pipeline_tag") if name in metadata
        }
        sha = self.hub.commit_of(repo, revision)
        self._json({"id": repo, "sha": sha, "private": False, "siblings": siblings, "cardData": metadata} | known)

    def tree(self, body, repo, revision, path=None):
        entries, path = {}, path or ""
        for name, content in self.hub.files(repo, revision).items():
            if not name.startswith(f"{path}/" if path else ""):
                continue
            inner = name[len(path) + 1 if path else 0 :]
            if "/" in inner and "recursive" not in self.query:
                folder = name[: len(name) - len(inner)] + inner.partition("/")[0]
                entries[folder] = {"type": "directory", "path": folder, "oid": _digest(folder.encode()), "size": 0}
            else:
                entries[name] = {"type": "file", "path": name, "oid": _digest(content), "size": len(content)}
        if path and not entries:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        self._json(list(entries.values()))

    def paths(self, body, repo, revision):
        files = self.hub.files(repo, revision)
        # The client sends a form.
        asked = parse_qs(body.decode()).get("paths", [])
        self._json([
            {"type": "file", "path": path, "oid": _digest(files[path]), "size": len(files[path])}
            for path in asked if path in files
        ])  # fmt: skip

    def resolve(self, body, repo, revision, path):
        files = self.hub.files(repo, revision)
        commit = {"X-Repo-Commit": self.hub.commit_of(repo, revision)}
        if path not in files:
            message = json.dumps({"error": "Entry not found"}).encode()
            self._send(404, message, commit | {"X-Error-Code": "EntryNotFound"})
            return
        content = files[path]
        self._send(200, content, commit | {"ETag": f'"{_digest(content)}"', "X-Linked-Size": str(len(content))})


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.who),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<revision>.+)", Handler.branch),
    ("POST", rf"/api/models/{REPOSITORY}/paths-info/(?P<revision>.+)", Handler.paths),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/large/(?P<oid>\w+)", Handler.upload),
    ("GET", rf"/api/models/{REPOSITORY}", Handler.info),
    ("GET", rf"/api/models/{REPOSITORY}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>(?:refs/pr/\d+|[^/]+))/(?P<path>.+)", Handler.resolve),
]  # fmt: skip


@contextlib.contextmanager
def hub_server():
    """Run the server in a thread, and yield its `Hub`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
