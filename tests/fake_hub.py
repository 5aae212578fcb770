"""A Hub on loopback that speaks as much of huggingface_hub's protocol as downloads need."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves folders as repositories: ``hub.repos["org/name"] = folder``.

    Trouble: ``gated`` (needs ``token``), ``cut`` {file name: bytes after which the connection
    drops, once}, ``hang`` (base names that stop halfway, or "api"), ``status`` {file name: code}.
    ``requests`` lists what was asked: (method, path, Range). What is pushed with ``token`` lands in
    ``pushed``: {"org/name": {path: bytes}}, and ``private`` names the repositories made so.
    """

    def __init__(self):
        self.repos, self.requests = {}, []
        self.pushed, self.private, self.stored = {}, set(), {}
        self.gated, self.token = set(), "hf_good"
        self.cut, self.hang, self.status = {}, set(), {}
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache) -> dict[str, str]:
        """What a process needs in its environment to take this for the Hub."""
        return {
            **{"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"},
            **{"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        }


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.stored[hashlib.sha256(body).hexdigest()] = body
        self.send_json({})

    def do_POST(self):
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append((self.command, path, None))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.fail(403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            hub.pushed.setdefault(repo, {})
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(repo)
            return self.send_json({"url": f"{hub.url}/{repo}"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for name in names
            ]
            return self.send_json({"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.send_json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.splitlines():
                record = json.loads(line)
                value = record["value"]
                if record["key"] == "file":
                    hub.pushed[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif record["key"] == "lfsFile":
                    hub.pushed[match[1]][value["path"]] = hub.stored[value["oid"]]
                elif record["key"] == "deletedFile":
                    del hub.pushed[match[1]][value["path"]]
            url = f"{hub.url}/{match[1]}/commit/{COMMIT}"
            return self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        return self.fail(404)

    def fail(self, status, code=None, message="no"):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self):
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return self.fail(404)
        repo = (api or file)[1]
        revision = api[3] if api else file[2]
        name = "api" if api else file[3]
        if api and "api" in hub.hang:
            hub.released.wait()
            return None
        if api and repo in hub.pushed:
            siblings = [{"rfilename": n} for n in hub.pushed[repo]]
            return self.send_json({"id": repo, "sha": COMMIT, "siblings": siblings})
        if repo not in hub.repos:
            return self.fail(401, "RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self.fail(404, "RevisionNotFound")
        if name in hub.status:
            return self.fail(hub.status[name])
        folder = Path(hub.repos[repo])
        if api:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            names = [p.relative_to(folder).as_posix() for p in files]
            if api[2] == "tree":
                tree = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": _digest(p)}
                    for n, p in zip(names, files, strict=True)
                ]
                return self.send_json(tree)
            siblings = [{"rfilename": n} for n in names]
            return self.send_json({"id": repo, "sha": COMMIT, "siblings": siblings})
        return self.send_file(folder / name, repo)

    def send_file(self, path, repo):
        hub = self.hub
        authorization = self.headers.get("Authorization")
        if repo in hub.gated and authorization != f"Bearer {hub.token}":
            return self.fail(403 if authorization else 401, "GatedRepo")
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        data, start = path.read_bytes(), 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_digest(path)}"')
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        limit = hub.cut.pop(path.name, None)
        if path.name in hub.hang:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            hub.released.wait()
            return None
        self.wfile.write(body[:limit])
        if limit is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        return None


def _digest(path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
