"""A client of the server's two realtime dialects, for tests."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import websockets

OPENAI, MISTRAL = "?intent=transcription", "/v1/audio/transcriptions/realtime"
DONE = {OPENAI: "conversation.item.input_audio_transcription.completed", MISTRAL: "transcription.done"}
AHEAD_MS = 120_000  # PROTOCOL.md allows five minutes
APPEND = {OPENAI: "input_audio_buffer.append", MISTRAL: "input_audio.append"}


class Socket:
    """An open WebSocket. `events`: all messages so far."""

    def __init__(self, connection: websockets.ClientConnection, dialect: str):
        self.connection, self.dialect = connection, dialect
        self.events: list[dict] = []
        self.transcribed = 0.0  # ms, as the last voxtral.progress says

    async def send(self, kind: str, **fields: object) -> None:
        await self.connection.send(json.dumps({"type": kind} | fields))

    async def configure(self, rate: int = 16_000, kind: str = "", turns: int | None = None, **session: object) -> dict:
        """Choose the format, and the silence in ms that ends a turn; return the session in force."""
        if self.dialect == OPENAI:
            form = {"type": kind or "audio/pcm"} | ({} if kind else {"rate": rate})
            detection = turns and {"type": "server_vad", "silence_duration_ms": turns}
            session["audio"] = {"input": {"format": form, "turn_detection": detection}}
        else:
            session["audio_format"] = {"encoding": kind or "pcm_s16le", "sample_rate": rate}
            session["turn_detection"] = turns and {"min_silence_ms": turns}
        await self.send("session.update", session=session)
        return (await self.wait("session.updated"))["session"]

    async def append(self, data: bytes, size: int = 6400) -> None:
        for at in range(0, len(data), size):
            await self.send(APPEND[self.dialect], audio=base64.b64encode(data[at : at + size]).decode())

    async def commit(self) -> None:
        await self.send("input_audio_buffer.commit" if self.dialect == OPENAI else "input_audio.flush")

    async def receive(self) -> dict:
        async with asyncio.timeout(120):
            event = json.loads(await self.connection.recv())
        self.events.append(event)
        self.transcribed = event.get("transcribed_ms", self.transcribed)
        return event

    async def wait(self, kind: str) -> dict:
        """Return the next message of this type. Fails at an error."""
        while (event := await self.receive())["type"] != kind:
            assert event["type"] != "error", event
        return event

    async def done(self) -> dict:
        """Return the next item that is complete, with its text as `text` in both dialects."""
        event = await self.wait(DONE[self.dialect])
        return event | {"text": event.get("transcript", event.get("text"))}

    async def end(self, data: bytes, **options: object) -> dict:
        """Send audio while reading, commit it, and return the last item.

        At most AHEAD_MS before what is transcribed, which the server tells where it was asked for `progress`.
        """
        sending = asyncio.create_task(self._send_all(data, **options))
        try:
            while True:
                item = await self.done()
                if sending.done() and self.dialect == MISTRAL:
                    return item
                if sending.done() and item["audio_end_ms"] >= await sending:
                    return item
        finally:
            sending.cancel()

    async def _send_all(self, data: bytes, end_ms: float = 0.0, size: int = 6400) -> float:
        for at in range(0, len(data), size):
            while at / 32 - self.transcribed > AHEAD_MS:  # 16 kHz
                await asyncio.sleep(0.05)
            await self.append(data[at : at + size], size)
        await self.commit()
        return int(end_ms)

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["type"].endswith(kind)]


@asynccontextmanager
async def opened(server: object, dialect: str = OPENAI, query: str = "", **options: object) -> AsyncIterator[Socket]:
    """Open a socket and read its greeting."""
    url = server.url + dialect if dialect == OPENAI else server.url.replace("/v1/realtime", dialect)
    async with websockets.connect(url + query, max_size=None, **options) as connection:
        socket = Socket(connection, dialect)
        await socket.wait("session.created")
        yield socket
