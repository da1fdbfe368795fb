"""The guard of the WebSocket, an ASGI middleware: `vllm serve --middleware voxtral_web.guard.Guard`.

vLLM puts it outside its own authentication (vllm/entrypoints/serve/middleware/register.py). It does
what vLLM's realtime endpoint leaves out:

- **Key.** A browser's WebSocket cannot send the header `Authorization`. It offers two subprotocols
  instead, `voxtral` and `key.` + the key in hexadecimal (a subprotocol must be a token of RFC 9110).
  The guard makes the header of it and answers with `voxtral`: never with the key, which it takes
  out of the request. Not hexadecimal: HTTP 401.
- **Origin.** A browser lets any web page open a WebSocket to any server, localhost included, and
  says in `Origin` which page it is. One that comes from elsewhere than this server gets HTTP 403. Programs
  that are no browser send no Origin. ALLOWED_ORIGINS names others, separated by spaces.
- **Idle sessions.** A session keeps its slot for as long as its connection lives. One in which nothing
  came or went for SESSION_IDLE_MINUTES (0: no limit) is closed with 4408.
"""

import asyncio
import os
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROTOCOL, KEY = "voxtral", "key."
IDLE_CODE = 4408  # 4000 to 4999 are the applications' own (RFC 6455); 408 is HTTP's Request Timeout
IDLE_MINUTES = "10"


class Guard:
    """See the module's docstring. HTTP requests pass through untouched."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.idle = 60 * float(os.environ.get("SESSION_IDLE_MINUTES") or IDLE_MINUTES)
        self.origins = os.environ.get("ALLOWED_ORIGINS", "").lower().split()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._at_home(headers):
            return await JSONResponse({"error": "foreign origin"}, 403)(scope, receive, send)
        offered = scope.get("subprotocols", [])
        try:
            keys = [bytes.fromhex(name.removeprefix(KEY)) for name in offered if name.startswith(KEY)]
        except ValueError:
            return await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        kept = [(name, value) for name, value in scope["headers"] if name != b"sec-websocket-protocol"]
        if keys and "authorization" not in headers:
            kept.append((b"authorization", b"Bearer " + keys[0]))
        offered = [name for name in offered if not name.startswith(KEY)]
        scope = scope | {"headers": kept, "subprotocols": offered}
        watched = Watched(receive, send, self.idle, PROTOCOL if PROTOCOL in offered else None)
        await self.app(scope, watched.receive, watched.send)

    def _at_home(self, headers: Headers) -> bool:
        """Does the request come from a page of this server, or from no page at all?"""
        origin = headers.get("origin")
        if origin is None or origin.lower() in self.origins:
            return True
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""


class Watched:
    """A connection that ends itself when nothing comes or goes for `idle` seconds (0: never).

    Messages to the client count too: a program may send its whole file and then only listen.
    """

    def __init__(self, receive: Receive, send: Send, idle: float, protocol: str | None):
        self._receive, self._send, self._idle, self._protocol = receive, send, idle, protocol
        self._last, self._closed = 0.0, False

    async def receive(self) -> Message:
        """Return the client's next message, or its disconnection once it was idle for too long."""
        clock = asyncio.get_running_loop().time
        self._last = clock()
        message = asyncio.ensure_future(self._receive())
        try:
            while self._idle:
                left = self._last + self._idle - clock()
                if left <= 0:
                    return await self._close()
                if (await asyncio.wait([message], timeout=left))[0]:
                    break
            return await message
        finally:
            message.cancel()

    async def _close(self) -> Message:
        reason = f"idle: no message for {self._idle / 60:g} minutes"
        await self.send({"type": "websocket.close", "code": IDLE_CODE, "reason": reason})
        return {"type": "websocket.disconnect", "code": IDLE_CODE, "reason": reason}

    async def send(self, message: Message) -> None:
        """Pass a message on, unless the connection was closed here while the server still wrote."""
        if self._closed:
            return
        self._last = asyncio.get_running_loop().time()
        self._closed = message["type"] == "websocket.close"
        if message["type"] == "websocket.accept" and self._protocol:
            message = message | {"subprotocol": self._protocol}
        await self._send(message)
