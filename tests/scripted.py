"""A realtime server whose every move is decided by a test: it has no model, and its faults cost no time.

`Scripted` is one session: it answers audio with deltas as vLLM does, and what they say is up to a `speak`.
`ScriptedServer` speaks vLLM's protocol for it over WebSockets, or OpenAI's, and serves `web/` as serve.sh does.
`Speaker` says given texts over and over, as fast as audio comes, to as many sessions as it is told to grant.
"""

import asyncio
import base64
import contextlib
import importlib
import json
import math
import mimetypes
from collections.abc import Callable, Sequence

import numpy as np
import websockets
from servers import ROOT
from threads import threaded
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from voxtral_client.protocol import FRAME, RATE
from voxtral_client.session import Done, SessionLost
from voxtral_client.timeline import Timeline

FLUSH = 10  # deltas that follow the end of the audio


class Scripted:
    """A session that answers frame k `lag(k)` seconds after the message that completes its audio.

    `speak(pcm, k)` is the text of delta k, with the audio so far. `fault`: the message at which the connection breaks.
    `block(message)`: how long the server does not read after it. `limit`: the session ends with so many deltas.
    """

    def __init__(
        self,
        lag: Callable[[int], float] = lambda k: 0.0,
        delay_tokens: int = 6,
        fault: int | None = None,
        block: Callable[[int], float] = lambda message: 0.0,
        speak: Callable[[bytes, int], str] = lambda pcm, k: "",
        limit: int | None = None,
    ):
        self.limit = limit
        self.lag, self.delay, self.fault, self.block, self.speak = lag, delay_tokens, fault, block, speak
        self.messages = self.frames = 0
        self.bytes = bytearray()
        self.events: asyncio.Queue = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def session(self, model):
        self.events = asyncio.Queue()
        yield self

    async def send(self, pcm):
        self.bytes += pcm
        self.messages += 1
        while 1000 * len(self.bytes) / 32 >= 1e3 * (82.5 + 80 * (self.delay + self.frames)) and not self._over:
            self._say(self._next())
            if self._over:
                self._say(Done(33 + self.delay, self.frames))
        if self.messages == self.fault:
            self.events.put_nowait(SessionLost("connection lost (no closing message)"))
        await asyncio.sleep(self.block(self.messages))

    async def finish(self):
        last = -(-len(self.bytes) // (2 * FRAME)) + FLUSH
        self._say(*[self._next() for _ in range(last - self.frames)], Done(33 + self.delay, last))

    async def receive(self):
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        return event

    @property
    def _over(self) -> bool:
        return self.limit is not None and self.frames >= self.limit

    def _next(self) -> str:
        self.frames += 1
        return self.speak(self.bytes, self.frames - 1)

    def _say(self, *events: object) -> None:
        lag = self.lag(self.frames - 1)
        for event in events if lag == 0 else ():
            self.events.put_nowait(event)
        if lag > 0:
            asyncio.get_running_loop().call_later(lag, lambda: [self.events.put_nowait(event) for event in events])


class Ear:
    """Recognizes the words of `tones`, for `Scripted.speak`; a word of which it hears only the end is "?".

    A word's text begins in the frame after its end, three characters a frame. `bare`: a session's first word comes
    without its space.
    """

    def __init__(self, texts: list[str], bare: bool = False):
        self._texts, self._bare, self._queue, self._begin = texts, bare, "", None

    def __call__(self, pcm: bytes, k: int) -> str:
        samples = np.frombuffer(bytes(pcm[2 * k * FRAME : 2 * (k + 1) * FRAME]), "<i2")
        hops = np.abs(samples[: len(samples) // 320 * 320].reshape(-1, 320)).max(axis=1) > 1000
        for number, loud in enumerate(hops):
            at = k * FRAME + number * 320
            if loud and self._begin is None:
                self._begin = at
            elif not loud and self._begin is not None:
                self._queue += self._word(pcm, self._begin, at)
                self._begin, self._bare = None, False
        said, self._queue = self._queue[:3], self._queue[3:]
        return said

    def _word(self, pcm: bytes, begin: int, end: int) -> str:
        sound = np.frombuffer(bytes(pcm[2 * begin : 2 * end]), "<i2").astype(float)
        pitch = np.abs(np.fft.rfft(sound, RATE)).argmax()  # in Hz
        number = round((pitch - 300) / 40)
        if end - begin < 0.9 * TONE or number >= len(self._texts):
            return " ?"
        return self._texts[number].lstrip() if self._bare else self._texts[number]


DIGITS = [f" number{i}" for i in range(190)]


def hearing(texts: list[str] = DIGITS) -> Callable[[], Scripted]:
    """What makes the sessions of a server that understands `tones`."""
    return lambda: Scripted(speak=Ear(texts))


TONE = round(0.4 * RATE)


def tones(count: int, gap: float = 0.6, lead: float = 0.5) -> np.ndarray:
    """Speak the words number 0 to `count` - 1: a tone of 0.4 s each, with `gap` seconds of silence after it."""
    time = np.arange(TONE) / RATE
    parts = [np.zeros(round(lead * RATE))]
    for number in range(count):
        parts += [0.2 * np.sin(2 * np.pi * (300 + 40 * number) * time), np.zeros(round(gap * RATE))]
    samples = np.concatenate(parts)
    return (samples + np.random.default_rng(0).normal(0, 1e-4, len(samples))).astype(np.float32)


class Items:
    """What a server says in OpenAI's dialect of PROTOCOL.md about one connection, made of the deltas of a session."""

    ITEM = "conversation.item.input_audio_transcription"

    def __init__(self):
        self.timeline, self._number = Timeline(), 0
        self.timeline.begin()

    def __call__(self, said: str | Done) -> list[dict]:
        """The events for the next delta or the end."""
        timeline, events = self.timeline, []
        if isinstance(said, Done):
            timeline.finish()
        else:
            timeline.add_delta(said)
            events += [self._event("delta", delta=said)] if said else []
        if (words := timeline.take()) or isinstance(said, Done):
            listed = [{"word": word.text.strip(), "start": word.start, "end": word.end} for word in words]
            text = "".join(word.text for word in words).strip()
            events.append(self._event("completed", transcript=text, words=listed, audio_end_ms=self._end))
            self._number += 1
            if timeline.partial:
                events.append(self._event("delta", delta="".join(word.text for word in timeline.partial)))
        if timeline.transcribed // FRAME % 6 == 0:
            transcribed = 1000 * timeline.transcribed // RATE
            events.append({"type": "voxtral.progress", "audio_end_ms": self._end, "transcribed_ms": transcribed})
        return events

    @property
    def _end(self) -> int:
        timeline = self.timeline
        wordless = 0 if timeline.partial else timeline.transcribed - 3 * RATE  # sound, but no word for so long
        return 1000 * max(timeline.committed, wordless) // RATE

    def _event(self, kind: str, **fields: object) -> dict:
        return {"type": f"{self.ITEM}.{kind}", "item_id": f"item_{self._number}", "content_index": 0} | fields


class ScriptedServer:
    """vLLM's `/v1/realtime`, `/v1/models` and `/captions/` on a loopback port, doing as it is told.

    With `?intent=transcription` it speaks OpenAI's dialect.

    `make()` returns the Scripted of the next session. `entry`: more fields of the model's entry. `key`: asked for.
    `refusal`: HTTP status of every WebSocket handshake. `greets`: does session.created come? `answers`: does anything
    else? `garbles`: is it no JSON? `cuts`: after so many deltas the connection of each session is reset, the later ones
    run on. `faults`: the same with other faults, see `_strike`. All may be changed while it runs, but for the `port`.
    `sessions`: those so far. `paths`: what was asked for by HTTP.
    """

    def __init__(
        self,
        make: Callable[[], Scripted] = Scripted,
        *,
        entry: dict | None = None,
        key: str = "",
        refusal: int | None = None,
        greets: bool = True,
        answers: bool = True,
        garbles: bool = False,
        cuts: list[int] = (),
        faults: list[dict] = (),
        port: int = 0,
    ):
        self.make, self.entry, self.key, self.refusal = make, entry or {}, key, refusal
        self.greets, self.answers, self.garbles = greets, answers, garbles
        self.faults = [{"after": cut} for cut in cuts] + list(faults)
        self.port = port
        self.sessions: list[Scripted] = []
        self.paths: list[str] = []

    async def __aenter__(self) -> "ScriptedServer":
        self._server = await websockets.serve(
            self._serve,
            "127.0.0.1",
            self.port,
            process_request=self._http,
            select_subprotocol=lambda _, offered: "voxtral" if "voxtral" in offered else None,
            max_size=None,
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}/v1/realtime"
        self.page = f"http://127.0.0.1:{self.port}/captions/"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.cut()
        self._server.close()
        await self._server.wait_closed()  # then another server can have the port

    def cut(self) -> None:
        """Reset all connections."""
        for connection in self._server.connections:
            connection.transport.abort()

    def _http(self, connection: websockets.ServerConnection, request: Request) -> Response | None:
        self.paths.append(request.path)
        if self._next("gone"):
            connection.transport.abort()
            return None
        offered = request.headers.get("Sec-WebSocket-Protocol", "")
        keys = (f"Bearer {self.key}", f"voxtral, key.{self.key.encode().hex()}")
        path, _, _ = request.path.partition("?")
        if path.startswith("/captions/"):
            return page(path.removeprefix("/captions/") or "index.html")
        if self.key and request.headers.get("Authorization", offered) not in keys:
            return reply(401, b"{}")
        if path == "/v1/models":
            models = {"data": [{"id": "scripted", "max_model_len": 32768} | self.entry]}
            return reply(200, json.dumps(models).encode())
        if path != "/v1/realtime":
            return reply(403, b"")
        fault = self._next("http")
        body = json.dumps({"error": {"message": fault.get("reason")}}) if "reason" in fault else ""
        more = {"Retry-After": fault["retry"]} if "retry" in fault else {}
        refusal = fault.get("http", self.refusal)
        return reply(refusal, body.encode(), **more) if refusal else None

    def _next(self, kind: str = "") -> dict:
        """The next fault, or nothing where it is of another kind."""
        fault = self.faults[0] if self.faults and (not kind or kind in self.faults[0]) else {}
        if fault and "always" not in fault:
            self.faults.pop(0)
        return fault

    async def _serve(self, socket: websockets.ServerConnection) -> None:
        session, fault = self.make(), self._next()
        self.sessions.append(session)
        if self.greets:
            await socket.send(json.dumps({"type": "session.created", "id": "sess-1", "created": 1}))
        items = Items() if "intent=transcription" in socket.request.path else None
        telling = asyncio.create_task(self._tell(socket, session, items, fault))
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in socket:
                event = json.loads(message)
                if event["type"] == "input_audio_buffer.append" and self.answers:
                    if items:
                        items.timeline.add_audio(base64.b64decode(event["audio"]))
                    await session.send(base64.b64decode(event["audio"]))
                elif self.answers and (event.get("final") or (items and event["type"] == "input_audio_buffer.commit")):
                    await session.finish()
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)

    async def _tell(
        self, socket: websockets.ServerConnection, session: Scripted, items: Items | None, fault: dict
    ) -> None:
        told = 0
        while True:
            said = await session.receive()  # so that the fault comes after audio
            if told == fault.get("after"):
                return await self._strike(socket, items, fault)
            told += not isinstance(said, Done)
            with contextlib.suppress(websockets.ConnectionClosed):
                for event in items(said) if items else [raw(said)]:
                    await socket.send("{" if self.garbles else json.dumps(event))

    async def _strike(self, socket: websockets.ServerConnection, items: Items | None, fault: dict) -> None:
        """What happens to a session in place of delta number `after`: the first of `error`, `done`, `mute`, `close`
        (with this code), `drop` (no close frame) in it, or else a reset. `always`: the later sessions fare the same.
        Of the way in: `http` is the status that a WebSocket gets (`reason` in its body, `retry` as Retry-After), `gone`
        the reset of an HTTP request or a WebSocket.
        """
        with contextlib.suppress(websockets.ConnectionClosed):
            await (await socket.ping())  # the client has read everything: no delta is lost by chance
            if "error" in fault:
                error = {"error": fault["error"], "code": fault["code"]}
                if items:
                    error = {"error": {"type": "server_error", "code": fault["code"], "message": fault["error"]}}
                await socket.send(json.dumps({"type": "error"} | error))
            elif "done" in fault:
                await socket.send(json.dumps({"type": "transcription.done", "text": ""}))
            elif "close" in fault:
                await socket.close(fault["close"], "by the test")
            elif "drop" in fault:
                socket.transport.write_eof()
            elif "mute" not in fault:
                socket.transport.abort()


class Speaker(ScriptedServer):
    """One text for every five frames of 80 ms. After `limit` frames in all, it is gone and refuses everybody.

    `slots`: sessions at once. `silent`: sessions are taken and never answered. `crowded`: answers nothing until it
    has refused a session. `tells`: /v1/models says how many sessions there are. `most`: sessions at once so far.
    """

    def __init__(
        self,
        texts: Sequence[str] = (" one", " two", " three"),
        limit: float = math.inf,
        slots: int = 1000,
        silent: bool = False,
        crowded: bool = False,
        tells: bool = False,
    ):
        super().__init__(entry={"max_sessions": slots} if tells else {})
        self.texts, self.limit, self.slots, self.silent, self.crowded = texts, limit, slots, silent, crowded
        self.frames = self.granted = self.refused = self.active = self.most = 0

    def _http(self, connection: websockets.ServerConnection, request: Request) -> Response | None:
        return reply(503, b"") if self.frames >= self.limit else super()._http(connection, request)

    async def _serve(self, socket: websockets.ServerConnection) -> None:
        await socket.send(json.dumps({"type": "session.created"}))
        if self.active >= self.slots:
            self.refused += 1
            await socket.send(json.dumps({"type": "error", "error": "The server is currently busy.", "code": "x"}))
            return await socket.wait_closed()
        self.active, self.granted = self.active + 1, self.granted + 1
        self.most = max(self.most, self.active)
        try:
            with contextlib.suppress(websockets.ConnectionClosed):
                await self.listen(socket)
        finally:
            self.active -= 1

    async def listen(self, socket: websockets.ServerConnection) -> None:
        """Be one session."""
        samples = said = 0
        async for message in socket:
            event = json.loads(message)
            while self.crowded and not self.refused:
                await asyncio.sleep(0.01)
            final = bool(event.get("final"))
            samples += len(base64.b64decode(event.get("audio", ""))) // 2
            while said < samples // FRAME + (FLUSH if final else 0) and not self.silent:
                if self.frames >= self.limit:
                    return socket.transport.abort()
                said, self.frames = said + 1, self.frames + 1
                text = self.texts[said // 5 % len(self.texts)] if said % 5 == 0 and not final else ""
                await socket.send(json.dumps(raw(text)))
            if final and not self.silent:
                await socket.send(json.dumps(raw(Done(39, said))))


def raw(said: str | Done) -> dict:
    """The event of vLLM's own protocol."""
    if not isinstance(said, Done):
        return {"type": "transcription.delta", "delta": said}
    usage = {"prompt_tokens": said.prompt_tokens, "completion_tokens": said.completion_tokens}
    return {"type": "transcription.done", "text": "", "usage": usage}


def reply(status: int, body: bytes, kind: str = "application/json", **more: str) -> Response:
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"} | more
    return Response(status, "", Headers(headers), body)


def page(name: str) -> Response:
    """A file of web/, with the headers that vllm_plugin/voxtral_web/page.py gives it."""
    headers = importlib.import_module("voxtral_web.page").HEADERS  # of this tree
    path = ROOT / "web" / name
    if not path.is_file():
        return reply(404, b"")
    return reply(200, path.read_bytes(), mimetypes.guess_type(name)[0] or "", **headers)


def scripted(*arguments: object, **options: object) -> contextlib.AbstractContextManager[ScriptedServer]:
    """A ScriptedServer in a thread of its own, for clients that are processes."""
    return threaded(ScriptedServer(*arguments, **options))


def speaking(**options: object) -> contextlib.AbstractContextManager[Speaker]:
    """A Speaker in a thread of its own."""
    return threaded(Speaker(**options))
