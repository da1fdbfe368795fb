"""Limits of one WebSocket, as an ASGI connection, and the server's sessions. Specification: PROTOCOL.md, "Limits"."""

import asyncio
import json
import re
from argparse import Namespace

from starlette.types import Message, Receive, Send

MESSAGE_BYTES = 2**20  # of JSON: 24 s of audio
# Most audio that vLLM has queued and not transcribed; vLLM needs twice as much memory for it. WAITING_BYTES (33 s):
# while no transcription runs. AHEAD_BYTES (8.7 minutes): while one runs. This is large, because a client that has to
# wait gets no pongs, and may then close the connection.
WAITING_BYTES, AHEAD_BYTES = 2**20, 2**24
# Errors after which no transcription runs: all slots are in use, the engine has failed, or no model was chosen.
ENDED = re.compile('"code":"(processing_error|model_not_validated)"')
FRAME_BYTES = 2560  # PCM16 of one delta: 80 ms at 16 kHz
# The least memory of a message in vLLM's queue: an array of one sample takes more than a hundred bytes.
LEAST_AUDIO_BYTES, OTHER_BYTES = 256, 64
STALL_SECONDS = 30  # without a delta while audio waits
FIRST_AUDIO_SECONDS = 60  # more than the 40 s after which uvicorn closes a connection that answers no ping

# RFC 6455 leaves 4000 to 4999 to applications. HTTP's 408 is Request Timeout, 413 is Content Too Large.
IDLE_CODE, FULL_CODE = 4408, 4413


def sessions(args: Namespace, unknown: int = 0) -> int:
    """Return how many sessions vLLM's options allow at once, in all engines; `unknown` in each, where vLLM chooses."""
    return (getattr(args, "max_num_seqs", None) or unknown) * (getattr(args, "data_parallel_size", None) or 1)


class Limited:
    """A connection that closes when a limit is exceeded.

    - No message in either direction for `idle` seconds (0: no limit): 4408. Messages to the client count too, because a
      program may send a complete file and then only receive. Until the first audio the limit is FIRST_AUDIO_SECONDS, if
      that is less.
    - More than WAITING_BYTES are queued, and no transcription runs: 4413.
    - More than AHEAD_BYTES are queued: no message is received until deltas come, and TCP makes the client wait. If no
      delta comes for STALL_SECONDS: 4413.

    `has_audio`: whether there was any. `is_dialect`: the application bounds the audio that waits, and needs no slot
    before there is audio: only `idle` counts.
    """

    def __init__(self, receive: Receive, send: Send, idle: float, protocol: str | None, is_dialect: bool):
        self._receive, self._send, self._idle, self._protocol = receive, send, idle, protocol
        self._is_dialect = is_dialect
        self._last, self._closed = 0.0, False
        self._waiting = 0  # bytes of audio that vLLM has queued
        self._begun = False
        self._sent = asyncio.Event()  # a message was sent
        self.has_audio = False

    async def receive(self) -> Message:
        """Return the client's next message, or a disconnection when a limit is exceeded."""
        if not await self._may_receive():
            return await self._close(FULL_CODE, f"{self._waiting} bytes of audio wait, and no transcription runs")
        now = asyncio.get_running_loop().time
        self._last = now()
        message = asyncio.ensure_future(self._receive())
        try:
            while limit := self._limit():
                left = self._last + limit - now()
                if left <= 0:
                    what = "message" if self.has_audio else "audio"
                    return await self._close(IDLE_CODE, f"idle: no {what} for {limit / 60:g} minutes")
                if (await asyncio.wait([message], timeout=left))[0]:
                    break
            self._count((await message).get("text"))
            return message.result()
        finally:
            message.cancel()

    async def send(self, message: Message) -> None:
        """Send a message, unless this connection was closed here. Raises what the server's `send` raises."""
        if self._closed:
            return
        self._last = asyncio.get_running_loop().time()
        self._closed = message["type"] == "websocket.close"
        if message["type"] == "websocket.accept" and self._protocol:
            message = message | {"subprotocol": self._protocol}
        try:
            await self._send(message)
        except BaseException:
            self._closed = True  # the client is gone: `receive` must not wait for deltas, but return the disconnection
            raise
        finally:
            text = message.get("text") or ""
            if '"type":"transcription.delta"' in text:
                self._waiting = max(0, self._waiting - FRAME_BYTES)
            elif '"type":"transcription.done"' in text:
                self._waiting, self._begun = 0, False  # vLLM empties its queue
            elif '"type":"error"' in text and ENDED.search(text):
                self._begun = False
            self._sent.set()

    def _limit(self) -> float:
        """Return the seconds without a message after which the connection is closed; 0: never."""
        if self.has_audio or self._is_dialect:
            return self._idle
        return min(FIRST_AUDIO_SECONDS, self._idle or FIRST_AUDIO_SECONDS)

    async def _may_receive(self) -> bool:
        """Wait until more audio may be received. Return False if the limit stays exceeded."""
        while self._begun and self._waiting > AHEAD_BYTES and not self._closed:
            self._sent.clear()
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await self._sent.wait()
            except TimeoutError:
                return False
        return self._begun or self._waiting <= WAITING_BYTES or self._closed

    def _count(self, text: str | None) -> None:
        """Count what vLLM will queue for a message."""
        if self._is_dialect:
            self.has_audio = self.has_audio or ".append" in (text or "")
            return
        try:
            event = json.loads(text or "")
        except (ValueError, RecursionError):
            return  # vLLM ignores it
        if not isinstance(event, dict):
            return
        audio = event.get("audio")
        if event.get("type") == "input_audio_buffer.append" and isinstance(audio, str):
            self._waiting += max(len(audio) * 3 // 4 - audio[-2:].count("="), LEAST_AUDIO_BYTES)
            self.has_audio = True
        else:
            self._waiting += OTHER_BYTES
            self._begun |= event.get("type") == "input_audio_buffer.commit" and not event.get("final")

    async def _close(self, code: int, reason: str) -> Message:
        await self.send({"type": "websocket.close", "code": code, "reason": reason})
        return {"type": "websocket.disconnect", "code": code, "reason": reason}
