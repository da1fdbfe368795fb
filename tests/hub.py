"""A small hub on loopback for huggingface_hub: one repository at one commit, and the faults of real networks.

What the library asks for (huggingface_hub 2.4.0, file_download.py): HEAD and GET of
/OWNER/NAME/resolve/REVISION/FILE. As on the real hub, large files redirect to another host, with
X-Linked-Etag (sha256) and X-Linked-Size; small ones come directly, with git's sha1 as ETag. With `xet` the
large file is offered by Xet too (X-Xet-Hash, and a link to where the library gets a token for Xet's server).
"""

import hashlib
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "someone/voxtral"
COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_secret"
XET_HASH = "ab" + "0" * 62  # another hash than sha256, of the same bytes

# A sitecustomize.py: Xet's transfer gets the bytes over HTTP; where the library puts them is the library's matter.
WITHOUT_XET_SERVER = """
import os, urllib.request
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
from huggingface_hub import file_download

def xet_get(*, incomplete_path, **_):
    urllib.request.urlretrieve(os.environ["HF_ENDPOINT"] + "/cdn/consolidated.safetensors", incomplete_path)

file_download.xet_get = xet_get
"""


class Hub:
    """Serves `files` (name: bytes). Faults are attributes, to be set at any time.

    `cuts`: bytes after which each of the next downloads of the large file ends: by a reset at 0, else closed early.
    `hold`: bytes after which it sends nothing more until `released`. `spoil`: it arrives with a wrong byte. `gated`,
    `private`, `status`: how it refuses. `claims`: size it claims for the large file. `xet`: offers it by Xet, without
    a server of Xet: the library's download fails, unless the test puts WITHOUT_XET_SERVER in its place.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.asked: list[tuple[str, str, str]] = []  # method, path, Range
        self.cuts: list[int] = []
        self.spoil = self.gated = self.private = self.xet = False
        self.status = self.claims = self.hold = 0
        self.holding, self.released = threading.Event(), threading.Event()
        self.sent = 0  # bytes of large files
        self.leaked = False  # the token was shown to the other host
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_HEAD

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def downloaded(self) -> set[str]:
        """Names of the files that were fetched, whole or in part."""
        return {path.rsplit("/", 1)[-1] for method, path, _ in self.asked if method == "GET"}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append((request.command, request.path, request.headers.get("Range", "")))
        authorized = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if request.path.startswith("/cdn/"):
            self.leaked |= "Authorization" in request.headers
            return self._send(request, self.files[request.path.rsplit("/", 1)[-1]], large=True)
        prefix, _, rest = request.path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        refusal = None
        if self.status:
            refusal = self.status, ""
        elif prefix != f"/{REPOSITORY}" or (self.private and not authorized):
            refusal = 401, "RepoNotFound"  # the real hub does not tell the two apart
        elif self.gated and not authorized:
            refusal = 401, "GatedRepo"
        elif revision not in (COMMIT, "main"):
            refusal = 404, "RevisionNotFound"
        elif name not in self.files:
            refusal = 404, "EntryNotFound"
        if refusal:
            return self._head(request, refusal[0], {"X-Error-Code": refusal[1], "Content-Length": "0"})
        content = self.files[name]
        if name.endswith(".safetensors"):
            other_host = f"http://localhost:{self._http.server_port}/cdn/{name}"
            about = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "Location": other_host}
            about |= {"X-Linked-Size": str(self.claims or len(content)), "X-Repo-Commit": COMMIT}
            if self.xet:
                about |= {"X-Xet-Hash": XET_HASH, "Link": f'<{self.url}/api/no-such-token>; rel="xet-auth"'}
            return self._head(request, 302, about | {"Content-Length": "0"})
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self._send(request, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _head(self, request, status: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()

    def _send(self, request, content: bytes, headers: dict[str, str] | None = None, large: bool = False) -> None:
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        body, headers = content[start:], dict(headers or {})
        if large and self.spoil:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(request, 206 if start else 200, headers | {"Content-Length": str(len(body))})
        if request.command == "HEAD":
            return
        if large and self.hold:
            request.wfile.write(body[: self.hold])
            self.holding.set()
            self.released.wait(60)
            request.close_connection = True
            return
        if not (large and self.cuts):
            request.wfile.write(body)
            self.sent += len(body) * large
            return
        cut = self.cuts.pop(0)
        request.wfile.write(body[:cut])
        self.sent += cut
        request.close_connection = True
        if not cut:  # a reset, as when a router forgets the connection; it would discard bytes that are not read yet
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
