"""What one WebSocket may ask for: an ASGI connection that stays within PROTOCOL.md, "Limits"."""

import asyncio
import json
from collections.abc import Callable

from starlette.types import Message, Receive, Send

MESSAGE_BYTES = 2**20  # of JSON: 24 s of audio
# Of audio that is not yet understood; vLLM needs twice that to hold it. While no transcription goes on: 33 s.
# While one does: 8.7 minutes, so much because a client that is made to wait may take its own pings for lost.
WAITING_BYTES, AHEAD_BYTES = 2**20, 2**24
FRAME_BYTES = 2560  # PCM16 behind one delta: 80 ms at 16 kHz
# What vLLM's queue holds for a message beside its audio: an array of one sample takes more than a hundred bytes.
LEAST_AUDIO_BYTES, OTHER_BYTES = 256, 64
STALL_SECONDS = 30  # without a delta while audio waits
FIRST_AUDIO_SECONDS = 60  # more than the 40 s after which uvicorn closes one that answers no ping

# 4000 to 4999 are the applications' own (RFC 6455); 408 is HTTP's Request Timeout, 413 its Content Too Large.
IDLE_CODE, FULL_CODE = 4408, 4413


class Limited:
    """A connection that ends itself when a limit is passed.

    - Nothing came or went for `idle` seconds (0: never): 4408. Messages to the client count too: a program may
      send its whole file and then only listen. Until the first audio the limit is FIRST_AUDIO_SECONDS, if that is less.
    - More than WAITING_BYTES wait, and no transcription goes on: 4413.
    - More than AHEAD_BYTES wait: no more is received until deltas come, and TCP makes the client wait. Where none
      come for STALL_SECONDS: 4413.

    `audio_came` is called once. `heard`: was it?
    """

    def __init__(self, receive: Receive, send: Send, idle: float, protocol: str | None, audio_came: Callable[[], None]):
        self._receive, self._send, self._idle, self._protocol = receive, send, idle, protocol
        self._audio_came = audio_came
        self._last, self._closed = 0.0, False
        self._waiting = 0  # bytes of audio that vLLM has queued
        self._begun = False
        self._moved = asyncio.Event()  # a message went out
        self.heard = False

    async def receive(self) -> Message:
        """Return the client's next message, or its disconnection once a limit is passed."""
        if not await self._room():
            return await self._close(FULL_CODE, f"{self._waiting} bytes of audio wait, and no transcription goes on")
        clock = asyncio.get_running_loop().time
        self._last = clock()
        message = asyncio.ensure_future(self._receive())
        try:
            while limit := self._limit():
                left = self._last + limit - clock()
                if left <= 0:
                    what = "message" if self.heard else "audio"
                    return await self._close(IDLE_CODE, f"idle: no {what} for {limit / 60:g} minutes")
                if (await asyncio.wait([message], timeout=left))[0]:
                    break
            self._count((await message).get("text"))
            return message.result()
        finally:
            message.cancel()

    async def send(self, message: Message) -> None:
        """Pass a message on, unless the connection was closed here while the server still wrote."""
        if self._closed:
            return
        self._last = asyncio.get_running_loop().time()
        self._closed = message["type"] == "websocket.close"
        if message["type"] == "websocket.accept" and self._protocol:
            message = message | {"subprotocol": self._protocol}
        try:
            await self._send(message)
        except BaseException:
            self._closed = True  # nobody is there any more: `receive` must not wait for deltas, but hear of it
            raise
        finally:
            text = message.get("text") or ""
            if '"type":"transcription.delta"' in text:
                self._waiting = max(0, self._waiting - FRAME_BYTES)
            elif '"type":"transcription.done"' in text:
                self._waiting, self._begun = 0, False  # vLLM empties its queue
            elif '"type":"error"' in text and '"code":"processing_error"' in text:
                self._begun = False  # all slots are taken, or the engine has failed
            self._moved.set()

    def _limit(self) -> float:
        """Seconds without a message after which the connection ends; 0: never."""
        return self._idle if self.heard else min(FIRST_AUDIO_SECONDS, self._idle or FIRST_AUDIO_SECONDS)

    async def _room(self) -> bool:
        """Wait until there is room for more audio; return False if there will be none."""
        while self._begun and self._waiting > AHEAD_BYTES and not self._closed:
            self._moved.clear()
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await self._moved.wait()
            except TimeoutError:
                return False
        return self._begun or self._waiting <= WAITING_BYTES or self._closed

    def _count(self, text: str | None) -> None:
        """Book what vLLM will queue for a message."""
        try:
            event = json.loads(text or "")
        except (ValueError, RecursionError):
            return  # vLLM drops it
        if not isinstance(event, dict):
            return
        audio = event.get("audio")
        if event.get("type") == "input_audio_buffer.append" and isinstance(audio, str):
            self._waiting += max(len(audio) * 3 // 4 - audio[-2:].count("="), LEAST_AUDIO_BYTES)
            if not self.heard:
                self.heard = True
                self._audio_came()
        else:
            self._waiting += OTHER_BYTES
            self._begun |= event.get("type") == "input_audio_buffer.commit" and not event.get("final")

    async def _close(self, code: int, reason: str) -> Message:
        await self.send({"type": "websocket.close", "code": code, "reason": reason})
        return {"type": "websocket.disconnect", "code": code, "reason": reason}
