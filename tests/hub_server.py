"""A server on the loopback that speaks as much of the hub's protocol as a download needs, and serves release assets.

/<owner>/<repo>/resolve/<revision>/<file>   HEAD and GET with Range, commit and ETag, redirects of renamed repositories
/assets/<file>                              plain files with Range
"""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """files {path: bytes}; renamed {old repo: new repo}; gated {repo}; cut {path: bytes until the first break}"""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.renamed, self.gated, self.cut, self.requests = {}, {}, set(), {}, []
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        server, path = self.server, self.path.lstrip("/")
        server.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith("assets/"):
            return self.send(path, body, {}) if path in server.files else self.refuse(404, "")
        if path.count("/") < 4:  # what a client asks beside its files
            return self.refuse(404, "")
        owner, repo, _, revision, file = path.split("/", 4)
        name = f"{owner}/{repo}"
        if name in server.renamed:
            self.send_response(307)
            self.send_header("Location", f"/{server.renamed[name]}/resolve/{revision}/{file}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if name in server.gated:
            return self.refuse(403, "GatedRepo")
        if not any(key.startswith(f"{name}/") for key in server.files):
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        key = f"{name}/{file}"
        if key not in server.files:
            return self.refuse(404, "EntryNotFound")
        digest = hashlib.sha256(server.files[key]).hexdigest()
        return self.send(key, body, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

    def refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, key: str, body: bool, headers: dict[str, str]):
        content, start = self.server.files[key], 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        stop = self.server.cut.pop(key, None)
        self.wfile.write(content[start:stop])
        if stop is not None:  # the line goes dead in mid file
            self.wfile.flush()
            self.connection.shutdown(2)
