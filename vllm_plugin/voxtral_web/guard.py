"""Access control and limits. An ASGI middleware: `vllm serve --middleware voxtral_web.guard.Guard`.

vLLM runs it before its own authentication (vllm/entrypoints/serve/middleware/register.py). The specification is in
PROTOCOL.md, "Getting in" and "Limits". The guard adds what vLLM does not have:

- **Routes.** vLLM mounts about forty, and checks the key only below /v1, /v2, /inference and /cohere (its
  middleware/authenticate.py). Only ROUTES and FOLDERS pass, WebSockets only to REALTIME. HEAD is answered as GET, which
  FastAPI does not do.
- **Pages of other sites.** A browser lets any page send requests to any server, and names the page's site in `Origin`.
  The owner of a domain can point it at this server (DNS rebinding), so that `Host` and `Origin` agree. `Host` must
  therefore be a name that no outsider can own. Pages in ALLOWED_ORIGINS may read the responses (CORS), errors included:
  vLLM's --allowed-origins would leave out its 401 and the header X-Transcript-Warning.
- **Key.** A browser's WebSocket cannot send the header `Authorization`. It offers two subprotocols instead, `voxtral`
  and `key.` + the key in hexadecimal (a subprotocol must be a token of RFC 9110), or OpenAI's two. The guard turns the
  key into the header, and answers with the first one.
- **Limits** of a session (`limits.py`), and of the number of open WebSockets.

Environment: ALLOWED_ORIGINS and ALLOWED_HOSTS (both separated by spaces), SESSION_IDLE_MINUTES.
"""

import ipaddress
import os
import socket
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, QueryParams
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import refuse
from .limits import MESSAGE_BYTES, Limited, sessions

MISTRAL = "/v1/audio/transcriptions/realtime"
REALTIME = {"/v1/realtime", MISTRAL}  # the only routes that take a WebSocket
ROUTES = REALTIME | set("/v1/models /v1/audio/transcriptions /captions /health /metrics /version /ping".split())
FOLDERS = ("/captions/", "/metrics/")
PROTOCOL, KEY = "voxtral", "key."
OPENAI_PROTOCOL, OPENAI_KEY = "realtime", "openai-insecure-api-key."
IDLE_MINUTES = "10"
SOCKETS_PER_ADDRESS = 64  # WebSockets at once, or twice the server's sessions if that is more
SOCKETS_WITHOUT_AUDIO = 256  # of all addresses
STOP_SECONDS = 10  # for responses, when the server stops
# Endings that cannot be registered: RFC 6762 (local), RFC 8375 (home.arpa), ICANN (internal), and those of routers.
PRIVATE_ENDINGS = set("local home.arpa internal lan home localdomain intranet private corp fritz.box".split())


class Guard:
    """See the module's docstring."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.idle = 60 * float(os.environ.get("SESSION_IDLE_MINUTES") or IDLE_MINUTES)
        self.origins = {origin.rstrip("/") for origin in os.environ.get("ALLOWED_ORIGINS", "").lower().split()}
        allowed = os.environ.get("ALLOWED_HOSTS", "").lower().split()
        self.hosts = {hostname(entry.partition("://")[2] or entry) for entry in allowed}
        self.per_address = SOCKETS_PER_ADDRESS
        self.open: dict[Limited, str] = {}  # the address of each WebSocket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._configure(scope["app"].state)
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if scope["type"] != "websocket":
            answer = refusal or self._answer
            if headers.get("origin", "").lower() in self.origins:
                answer = CORSMiddleware(answer, ["*"], ["*"], ["*"], expose_headers=["*"])
            return await answer(scope, receive, send)
        if refusal:
            return await refusal(scope, receive, send)
        offered = scope.get("subprotocols", [])
        try:
            keys = [bytes.fromhex(name.removeprefix(KEY)) for name in offered if name.startswith(KEY)]
        except ValueError:
            return await refuse(401, "the key must be in hexadecimal", "invalid_api_key")(scope, receive, send)
        keys += [name.removeprefix(OPENAI_KEY).encode() for name in offered if name.startswith(OPENAI_KEY)]
        kept = [(name, value) for name, value in scope["headers"] if name != b"sec-websocket-protocol"]
        if keys and "authorization" not in headers:
            kept.append((b"authorization", b"Bearer " + keys[0]))
        offered = [name for name in offered if not name.startswith((KEY, OPENAI_KEY))]
        scope = scope | {"headers": kept, "subprotocols": offered}
        answer = next((name for name in (PROTOCOL, OPENAI_PROTOCOL) if name in offered), None)
        await self._serve(scope, receive, send, answer)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request of HTTP."""
        answered = scope | {"method": "GET"} if scope["method"] == "HEAD" else scope
        await self.app(answered, receive, with_openai_errors(scope, receive, send))

    def _configure(self, state: object) -> None:
        """Read settings of the started server, and set what vLLM has no option for: uvicorn's longest message and stop.

        Without the latter a client that reads no response would keep the server from ending.
        """
        if args := getattr(state, "args", None):
            self.per_address = max(SOCKETS_PER_ADDRESS, 2 * sessions(args))
        if server := getattr(state, "server", None):
            server.config.ws_max_size, server.config.timeout_graceful_shutdown = MESSAGE_BYTES, STOP_SECONDS

    async def _serve(self, scope: Scope, receive: Receive, send: Send, protocol: str | None) -> None:
        """Run a WebSocket within its limits."""
        address = (scope.get("client") or ("",))[0]
        of_address = list(self.open.values()).count(address)
        if of_address >= self.per_address or sum(not each.has_audio for each in self.open) >= SOCKETS_WITHOUT_AUDIO:
            return await refuse(503, "too many WebSockets are open", "too_many_sockets")(scope, receive, send)
        limited = Limited(receive, send, self.idle, protocol, is_dialect(scope))
        self.open[limited] = address
        try:
            await self.app(scope, limited.receive, limited.send)
        finally:
            del self.open[limited]

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        """Return the response to a request that is refused, or None if the request may pass."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in ROUTES and not path.startswith(FOLDERS):
            if path.startswith("/v1/") and scope.get("method") == "POST":
                return refuse(501, "this server transcribes: POST /v1/audio/transcriptions", "not_served")
            return refuse(404, "not served here: see PROTOCOL.md", "not_served")
        if scope["type"] == "websocket" and path not in REALTIME:
            return refuse(404, "no WebSocket here: see PROTOCOL.md", "not_served")
        if path.startswith("/captions"):
            return None  # the page holds no secret, and can show what is wrong
        origin = headers.get("origin", "").lower()
        # A script's GET to its own server has no Origin. The response lets the page show what to do.
        by_script = path == "/v1/models" and headers.get("sec-fetch-site", "none") != "none"
        if origin in self.origins or not (origin or by_script):
            return None
        host = headers.get("host", "").lower()
        if not self._is_ours(hostname(host)):
            return refuse(403, f"{host!r} is not known as this server's name: set ALLOWED_HOSTS", "foreign_host")
        if origin and split(origin).netloc != host:
            return refuse(403, f"a page of {origin!r} may not use this server: set ALLOWED_ORIGINS", "foreign_origin")
        return None

    def _is_ours(self, host: str) -> bool:
        """Return whether `host` is an address, a name of this machine that no outsider can own, or allowed."""
        try:
            return bool(ipaddress.ip_address(host))
        except ValueError:
            own = socket.gethostname().lower()
            name, _, ending = host.partition(".")
            known = {"localhost", own} | self.hosts - {""}
            return host in known or (name == own.partition(".")[0] and (not ending or ending in PRIVATE_ENDINGS))


def is_dialect(scope: Scope) -> bool:
    """Return whether voxtral_realtime serves this WebSocket, which bounds by itself what waits."""
    query = QueryParams(scope.get("query_string", b""))
    return scope["path"].endswith(MISTRAL) or query.get("intent") == "transcription"


def hostname(netloc: str) -> str:
    """Return the name or address in a `Host` header, without port and brackets; "" if there is none."""
    return (split(f"//{netloc}").hostname or "").removesuffix(".")


def split(url: str) -> SplitResult:
    """Return the parts of a URL; empty ones if it is not valid."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def with_openai_errors(scope: Scope, receive: Receive, send: Send) -> Send:
    """Return a `send` that replaces vLLM's response 401 by an error in OpenAI's form."""
    refused = False

    async def send_explained(message: Message) -> None:
        nonlocal refused
        if message["type"] == "http.response.start" and message["status"] == 401:
            refused = True
            await refuse(401, "the server's key is missing or wrong", "invalid_api_key")(scope, receive, send)
        elif not refused:
            await send(message)

    return send_explained
