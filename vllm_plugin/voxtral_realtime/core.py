"""What both dialects share: the audio of one socket becomes items, which have words with times.

    socket's audio   |------------ stretch ------------|---- stretch ----| ...   a client's commit or flush ends one
    items            |-- item --|-- item --|-- item ---|----- item ------| ...   a pause ends one (turns)

A stretch is one `Transcriber`, so sessions without an end, resume and watchdog are voxtral_client's. The end of a
stretch ends its session, which gives the last words at once. Stretches run one after the other: a socket never takes
more than one slot, and none without audio.

    client -> `_receive` -> the dialect's `handle` -> `append`, `commit`, `clear`         the audio of stretches
    `_transcribe` -> `_words`, for one stretch: `_pcm` -> Transcriber -> final words      over sessions of engine.py
    frames of these sessions -> `_follow`: partial text, ends of turns, progress
    words, text, ends -> the dialect's `on_...` -> `send` -> `_send` -> client

Times are in seconds from the socket's first sample.
"""

import asyncio
import base64
import json
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect
from voxtral_web.limits import AHEAD_BYTES, FULL_CODE, STALL_SECONDS

from voxtral_client.levels import PAUSE
from voxtral_client.protocol import RATE
from voxtral_client.session import Refused
from voxtral_client.timeline import MARGIN, WORDLESS_SECONDS, Word
from voxtral_client.transcriber import GaveUp, Transcriber

from .audio import ENCODINGS, HIGHEST_RATE, LOWEST_RATE, Intake
from .engine import Engine, Unavailable

PIECE_BYTES = RATE // 2  # of PCM16 that the transcriber takes at a time: 0.25 s
MOST_MESSAGES, MOST_STRETCHES = 256, 64  # that wait; then this client's messages and audio wait too
LEAST_SILENCE_MS = 2000 * PAUSE // RATE  # the timeline finds no shorter pauses
LONGEST_ITEM = 25.0  # seconds from its first word; then it ends where words are final, at the latest after 30 s
PROGRESS_SECONDS = 1.0
FAILED_CODE, BUSY_CODE = 1012, 1013  # of closes: Service Restart, Try Again Later

logger = logging.getLogger("vllm.voxtral_realtime")


class Invalid(Exception):
    """A client's message cannot be obeyed. `code`: for programs; `param`: the field that is wrong."""

    def __init__(self, message: str, code: str = "invalid_event", param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


@dataclass
class Item:
    """Words that a client gets together. `heard`: whether text of it was sent."""

    start: float
    end: float = 0.0
    words: list[Word] = field(default_factory=list)
    heard: bool = False
    announced: bool = False  # its end was sent before its words
    id: str = field(default_factory=lambda: f"item_{uuid.uuid4().hex[:20]}")

    @property
    def text(self) -> str:
        return "".join(word.text for word in self.words).strip()

    @property
    def fields(self) -> dict:
        """This project's own fields."""
        return {"words": [timed(word, "word") for word in self.words], "audio_end_ms": milliseconds(self.end)}


@dataclass
class Stretch:
    """Audio that one transcriber gets. `end`: None while more may come. `item`: the one that is not ended."""

    start: float
    item: Item
    end: float | None = None
    pcm: bytearray = field(default_factory=bytearray)  # that the transcriber has not taken
    task: asyncio.Task | None = None
    transcriber: Transcriber | None = None
    # How far `Connection._follow` is.
    session: int = 0
    committed: float = 0.0
    shown: float = 0.0  # end of the last word whose text was sent
    repeated: float = 0.0  # words before it were sent by an earlier session


class Connection:
    """One socket. A dialect is a subclass that only translates. Its `session()` is what is in force; `NAMES` matches
    the vendor's names of models, which mean the served one. `handle(event)` obeys a message; it raises Invalid.

    on_error(error, event)     a message cannot be obeyed, or the transcription failed ("server_busy", "server_error")
    on_start(item, start)      the item's first word begins at `start`
    on_text(item, text, first) more text of the item, which may still change; it often begins with a space
    on_end(item, stretch, last) the item is complete; `last`: the client ended it
    """

    NAMES: re.Pattern

    def __init__(self, socket: WebSocket):
        state = socket.app.state
        self.model = state.openai_serving_models.base_model_paths[0].name
        self.silence: float | None = None  # that ends an item
        self.progress = False
        self.intake = Intake("pcm_s16le", RATE)
        self._serving, self._models, self._socket = state.openai_serving_realtime, state.openai_serving_models, socket
        self._out: asyncio.Queue[dict | tuple[int, str]] = asyncio.Queue()
        self._moved = asyncio.Event()  # audio came or went, or a message went
        self._waiting = 0  # bytes of audio in all stretches
        self._received = self._audio_end = self._progress_at = 0.0
        self._stretches: deque[Stretch] = deque()  # the first one is transcribed, the last one takes audio
        self._begin_stretch()

    # --- for dialects ---

    def on_word(self, word: Word) -> None:
        """A word of the open item is final."""

    def on_progress(self, audio_end: float, transcribed: float) -> None:
        """Audio before `audio_end` is not needed any more."""

    def send(self, kind: str, **fields: object) -> None:
        """Queue a message for the client."""
        self._out.put_nowait({"type": kind} | fields)

    def close(self, code: int, reason: str = "") -> None:
        """Close the socket after the queued messages."""
        self._out.put_nowait((code, reason.encode()[:120].decode(errors="ignore")))  # RFC 6455: at most 123 bytes

    def fail(self, code: int, message: str) -> None:
        """Report that the transcription cannot go on, and close the socket."""
        self.on_error(Invalid(message, "server_busy" if code == BUSY_CODE else "server_error"), {})
        self.close(code, message)

    def check_model(self, name: object) -> None:
        """Raise Invalid if there is no such model."""
        if name and not (isinstance(name, str) and (self._models.is_base_model(name) or self.NAMES.fullmatch(name))):
            raise Invalid(f"the model {name!r:.80} does not exist; there is {self.model}", "model_not_found", "model")

    def set_format(self, encoding: str, rate: int, param: str) -> None:
        """Change the format of the audio that follows. Raises Invalid."""
        if encoding not in ENCODINGS:
            raise Invalid(f"the format {encoding!r} is none of {', '.join(ENCODINGS)}", param=param)
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise Invalid(f"the rate must be {LOWEST_RATE} to {HIGHEST_RATE}, not {rate}", param=param)
        if (encoding, rate) != (self.intake.encoding, self.intake.rate):
            self._add(self.intake.finish())
            self.intake = Intake(encoding, rate)

    def append(self, audio: object) -> None:
        """Add audio in base64. Raises Invalid."""
        try:
            seconds, pcm = self.intake.decode(base64.b64decode(audio, validate=True))
        except (ValueError, TypeError):
            raise Invalid("`audio` is not base64 of complete samples", "invalid_audio", "audio") from None
        self._received += seconds
        self._add(pcm)

    def commit(self, empty: bool = False) -> Stretch | None:
        """End the stretch and return it; None if it has no audio and must not be `empty`."""
        stretch = self._stretches[-1]
        if stretch.start == self._received and not empty:
            return None
        self._add(self.intake.finish())
        stretch.end = self._received
        self._begin_stretch()
        return stretch

    def clear(self) -> None:
        """Drop the audio of the open stretch, and its open item."""
        self.intake.finish()
        stretch = self._stretches.pop()
        self._waiting -= len(stretch.pcm)
        if stretch.task:
            stretch.task.cancel()
        self._begin_stretch()

    def _begin_stretch(self) -> None:
        self._stretches.append(Stretch(self._received, Item(self._received)))

    def _add(self, pcm: bytes) -> None:
        self._stretches[-1].pcm += pcm
        self._waiting += len(pcm)
        self._moved.set()

    # --- the socket ---

    async def serve(self) -> None:
        """Run until the client or the server closes the socket."""
        await self._socket.accept()
        self.send("session.created", session=self.session())
        try:
            self.check_model(self._socket.query_params.get("model"))
        except Invalid as error:
            self.on_error(error, {})
        work = self._receive(), self._send(), self._transcribe()
        tasks = [asyncio.create_task(self._reporting(each)) for each in work]
        try:
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _reporting(self, work: Any) -> None:
        try:
            await work
        except (WebSocketDisconnect, OSError):
            pass  # the client is gone
        except Exception:
            logger.exception("a realtime socket failed")
            self.fail(1011, "the server failed: its log says why")

    async def _receive(self) -> None:
        while True:
            while self._full:
                try:
                    async with asyncio.timeout(STALL_SECONDS):
                        await self._wait()
                except TimeoutError:
                    self.close(FULL_CODE, f"{self._waiting} bytes of audio wait, and nothing was transcribed")
                    return await asyncio.Future()  # until `_send` has closed it
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            event = {}
            try:
                event = _parsed(message.get("text"))
                self.handle(event)
            except Invalid as error:
                self.on_error(error, event)

    @property
    def _full(self) -> bool:
        full = self._waiting > AHEAD_BYTES or len(self._stretches) > MOST_STRETCHES
        return full or self._out.qsize() > MOST_MESSAGES

    async def _send(self) -> None:
        while isinstance(message := await self._out.get(), dict):
            await self._socket.send_text(json.dumps(message))
            self._moved.set()
        await self._socket.close(*message)

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    # --- the words ---

    async def _transcribe(self) -> None:
        """Transcribe one stretch after the other."""
        while True:
            while not ((stretch := self._stretches[0]).pcm or stretch.end is not None):
                await self._wait()
            stretch.task = asyncio.create_task(self._words(stretch))
            try:
                await asyncio.wait([stretch.task])
                if not stretch.task.cancelled():  # by `clear`
                    stretch.task.result()
                    self._stretches.popleft()
            except (Refused, GaveUp) as error:
                busy = isinstance(error, Unavailable) and error.busy
                return self.fail(BUSY_CODE if busy else FAILED_CODE, str(error))
            finally:
                stretch.task.cancel()
                await asyncio.gather(stretch.task, return_exceptions=True)
            self._moved.set()

    async def _words(self, stretch: Stretch) -> None:
        engine = Engine(self._serving, lambda text: self._follow(stretch, text))
        stretch.transcriber = Transcriber(engine)
        await stretch.transcriber.open()
        async with aclosing(stretch.transcriber.words(self._pcm(stretch))) as words:
            async for word in words:
                word = replace(word, start=stretch.start + word.start, end=stretch.start + word.end)
                stretch.item.words.append(word)
                self.on_word(word)
        self._follow(stretch)
        self._end(stretch, stretch.end, last=True)

    async def _pcm(self, stretch: Stretch) -> AsyncIterator[bytes]:
        """Yield the stretch's audio. A client that does not read gets nothing transcribed."""
        while stretch.pcm or stretch.end is None:
            if stretch.pcm and self._out.qsize() <= MOST_MESSAGES:
                piece = bytes(stretch.pcm[:PIECE_BYTES])
                del stretch.pcm[:PIECE_BYTES]
                self._waiting -= len(piece)
                self._moved.set()
                yield piece
            else:
                await self._wait()

    def _follow(self, stretch: Stretch, text: str = "") -> None:
        """Report what the last frame, of which `text` is the text, has changed beside final words."""
        transcriber = stretch.transcriber
        if text and transcriber.partial:
            self._show(stretch, text)
        at = min(stretch.start + transcriber.committed, self._received if stretch.end is None else stretch.end)
        if self.silence is not None and at != stretch.end:  # which ends the item anyway
            self._end_turn(stretch, at)
        if not stretch.item.words:
            self._audio_end = at
        if self.progress and (now := time.monotonic()) >= self._progress_at:
            self._progress_at = now + PROGRESS_SECONDS
            self.on_progress(self._audio_end, min(stretch.start + transcriber.transcribed, self._received))

    def _show(self, stretch: Stretch, text: str) -> None:
        """Send the text of a frame, unless an earlier session has sent that word."""
        partial, session = stretch.transcriber.partial, stretch.transcriber.session
        word = partial[-1]
        if session != stretch.session:
            stretch.session, stretch.repeated = session, stretch.shown
            text = "".join(word.text for word in partial)  # perhaps with a space that the session lacks
        if (word.start + word.end) / 2 >= stretch.repeated:
            stretch.shown = word.end
            self._say(stretch, word, text)

    def _say(self, stretch: Stretch, word: Word, text: str) -> None:
        item, first = stretch.item, not stretch.item.heard
        if first and not text.strip():
            return
        item.heard = True
        if first:
            self.on_start(item, stretch.start + word.start)
        self.on_text(item, text, first)

    def _end_turn(self, stretch: Stretch, at: float) -> None:
        """End the item at a pause of the length asked for; if none comes, in sound without words or after 25 s."""
        words, transcriber = stretch.item.words, stretch.transcriber
        committed, stretch.committed = transcriber.committed > stretch.committed, transcriber.committed
        long = words and stretch.start + transcriber.transcribed - words[0].start > LONGEST_ITEM
        if words and committed and (long or at + MARGIN / RATE - words[-1].end >= self.silence):
            self._end(stretch, at)
            if partial := transcriber.partial:  # until now it was shown as part of the item before
                self._say(stretch, partial[0], "".join(word.text for word in partial))
        elif words or transcriber.partial:
            transcriber.commit_wordless(self.silence + WORDLESS_SECONDS)  # the next frame ends the item

    def _end(self, stretch: Stretch, at: float, last: bool = False) -> None:
        stretch.item.end = self._audio_end = at
        self.on_end(stretch.item, stretch, last)
        stretch.item = Item(at)


def timed(word: Word, name: str) -> dict:
    """Return a word with its times in seconds; `name`: the field with the text."""
    return {name: word.text.strip(), "start": round(word.start, 3), "end": round(word.end, 3)}


def milliseconds(seconds: float) -> int:
    """Return whole milliseconds before a time, which may be a sum with rounding errors."""
    return int(1000 * seconds + 0.001)


def _parsed(text: str | None) -> dict:
    """Return a message's object. Raises Invalid."""
    try:
        event = json.loads(text or "")
    except (ValueError, RecursionError):
        raise Invalid("the message is not JSON", "invalid_json") from None
    if not isinstance(event, dict):
        raise Invalid("the message is no JSON object")
    return event


def value(container: dict, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """Return a field of a message, `default` if it is missing or null. Raises Invalid: not of `kind`, or no number."""
    found = container.get(name)
    if found is None:
        return default
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise Invalid(f"`{name}` has the wrong type: {found!r:.80}", param=name)
    if isinstance(found, (int, float)) and not abs(found) < 1e6:  # NaN is not either
        raise Invalid(f"`{name}` is out of range: {found!r:.80}", param=name)
    return found
