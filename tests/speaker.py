"""A realtime server without a model: it says given texts over and over, as fast as audio comes, and fails on demand."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator

import websockets
from threads import threaded
from websockets.asyncio.server import serve
from websockets.datastructures import Headers
from websockets.http11 import Response

FRAME = 1280


class Speaker:
    """One text for every `every` frames of 80 ms. After `limit` frames in all, it is gone and refuses everybody.

    `slots`: sessions at once. `silent`: sessions are taken and never answered. `crowded`: answers nothing until it
    has refused a session.
    """

    def __init__(self, texts=(" one", " two", " three"), every=5, limit=None, slots=1000, silent=False, crowded=False):
        self.texts, self.every, self.limit, self.slots, self.silent = texts, every, limit, slots, silent
        self.crowded = crowded
        self.frames = self.sessions = self.refused = self.active = self.most = 0

    @property
    def gone(self) -> bool:
        return self.limit is not None and self.frames >= self.limit

    def answer(self, connection, request):
        if self.gone:
            return Response(503, "Gone", Headers([("Content-Length", "0")]), b"")
        if request.path == "/v1/models":
            body = json.dumps({"data": [{"id": "m", "max_model_len": 32768}]}).encode()
            return Response(200, "OK", Headers([("Content-Length", str(len(body)))]), body)

    async def session(self, socket) -> None:
        await socket.send(json.dumps({"type": "session.created"}))
        if self.active >= self.slots:
            self.refused += 1
            await socket.send(json.dumps({"type": "error", "error": "The server is currently busy.", "code": "x"}))
            return await socket.wait_closed()
        self.active, self.sessions = self.active + 1, self.sessions + 1
        self.most = max(self.most, self.active)
        try:
            with contextlib.suppress(websockets.ConnectionClosed):
                await self.listen(socket)
        finally:
            self.active -= 1

    async def listen(self, socket) -> None:
        samples = said = 0
        async for message in socket:
            event = json.loads(message)
            while self.crowded and not self.refused:
                await asyncio.sleep(0.01)
            final = bool(event.get("final"))
            samples += len(base64.b64decode(event.get("audio", ""))) // 2
            frames = samples // FRAME + (10 if final else 0)
            while said < frames and not self.silent:
                if self.gone:
                    return socket.transport.abort()
                said, self.frames = said + 1, self.frames + 1
                text = self.texts[said // self.every % len(self.texts)] if said % self.every == 0 else ""
                await socket.send(json.dumps({"type": "transcription.delta", "delta": text if not final else ""}))
            if final and not self.silent:
                usage = {"prompt_tokens": 39, "completion_tokens": said}
                await socket.send(json.dumps({"type": "transcription.done", "text": "", "usage": usage}))


@contextlib.asynccontextmanager
async def serving(speaker: Speaker) -> AsyncIterator[Speaker]:
    server = await serve(speaker.session, "127.0.0.1", 0, process_request=speaker.answer, max_size=None)
    speaker.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/realtime"
    try:
        yield speaker
    finally:
        server.close(close_connections=True)
        with contextlib.suppress(websockets.ConnectionClosed):
            await server.wait_closed()


def speaking(**options) -> contextlib.AbstractContextManager[Speaker]:
    """Run a Speaker on loopback in a thread; it has its `url`."""
    return threaded(serving(Speaker(**options)))
