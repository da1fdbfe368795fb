"""Several sessions at once, their words in order.

The speed of one session is limited by vLLM's work for each step; sixteen at once cost little more
(docs/performance.md). So a long file is cut in its quietest pauses. A short file is one piece.
"""

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from . import UserError
from .audio import stream, threaded
from .cli import fault
from .media import AudioFile
from .protocol import RATE
from .session import Refused, Server, SessionLost
from .timeline import HOP, Word
from .transcriber import GaveUp, Transcriber

USUAL, SHORT = (20, 60), (10, 16)  # shortest and longest piece in seconds: usually, and where sessions would be idle
HELD = 960  # seconds of audio in all pieces at most: 31 MB
TOKENS = ("prompt_tokens", "completion_tokens")
QUIET = RATE // 2 // HOP  # length of the pause to look for, in level readings


class Stopped(Exception):
    """Ctrl+C came before the end of a file."""


@dataclass
class Piece:
    """Part of a file: number of the file, offset in it in samples, audio, and whether it is the last part.

    `blocks()` yields the audio (PCM16 bytes, 16 kHz mono) from the piece's beginning, as often as it is called.
    `endless`: the audio may end at any time, and is complete all the same.
    """

    file: int
    offset: int
    blocks: Callable[[], Iterator[bytes]]
    last: bool
    endless: bool = False
    transcriber: Transcriber | None = None
    begun: float = 0.0  # `time.monotonic()` at the start of its transcription
    items: asyncio.Queue = field(default_factory=asyncio.Queue)  # Word; at the end None or the Exception


def uncut(number: int, source: AudioFile) -> Piece:
    """Return a file as one piece, streamed from disk."""
    return Piece(number, 0, source.blocks, True, source.endless)


def limits(left: float | None, width: int) -> tuple[int, int]:
    """Return the shortest and the longest length of a piece, in samples, where `width` sessions share `left` seconds.

    Towards the end of a file pieces become shorter, so that all sessions have work to the end.
    """
    share = 1.0 if left is None else (left / (3 * width) - SHORT[0]) / (USUAL[0] - SHORT[0])
    share = min(1.0, max(0.0, share))
    longest = min(SHORT[1] + share * (USUAL[1] - SHORT[1]), max(SHORT[1], HELD / width))
    shortest = min(SHORT[0] + share * (USUAL[0] - SHORT[0]), longest * SHORT[0] / SHORT[1])
    return round(shortest * RATE), round(longest * RATE)


def cut(number: int, source: AudioFile, width: Callable[[], int]) -> Iterator[Piece]:
    """Cut a file into pieces for `width()` sessions. Each piece is read when it is requested."""
    audio, offset, error = bytearray(), 0, None
    try:
        for block in source.blocks():
            audio += block
            left = source.seconds and source.seconds - offset / RATE
            shortest, longest = limits(left, width())
            if len(audio) >= 2 * longest:
                at = quietest_pause(np.frombuffer(audio, "<i2"), shortest)
                yield Piece(number, offset, partial(_held, bytes(audio[: 2 * at])), False)
                offset += at
                audio = audio[2 * at :]
    except Exception as problem:  # the worker that transcribes the last piece raises it
        error = problem
    yield Piece(number, offset, partial(_held, bytes(audio), error), True)


def _held(pcm: bytes, error: Exception | None = None) -> Iterator[bytes]:
    """Yield audio that is in memory, then raise `error` if there is one."""
    if pcm:
        yield pcm
    if error:
        raise error


def quietest_pause(samples: np.ndarray, shortest: int) -> int:
    """Return the middle of the first of the quietest half seconds after `shortest`, both in samples.

    `samples`: int16, shape (n,), n at least `shortest` + 0.5 s.
    """
    readings = samples[shortest : shortest + (len(samples) - shortest) // HOP * HOP].astype(np.float32).reshape(-1, HOP)
    levels = 10 * np.log10(np.square(readings).mean(axis=1) + 1.0)
    loudest = np.lib.stride_tricks.sliding_window_view(levels, QUIET).max(axis=1)
    first = int((loudest <= loudest.min() + 3).argmax())
    return shortest + (first + QUIET // 2) * HOP


class Pool:
    """Transcribes pieces in at most `size` sessions at once; where the server grants fewer, in those it grants.

    `counts`: sessions, prompt_tokens and completion_tokens so far, by the number of the file.
    """

    def __init__(
        self,
        server: Server,
        size: int,
        stop: asyncio.Event,
        say: Callable[[str], None] = lambda message: None,
        realtime: bool = False,
        **settings: Any,
    ):
        """`stop`: begin no more pieces. `say` receives messages for the user. `settings`: of each Transcriber."""
        self.size, self.started = size, time.monotonic()
        self._server, self._stop, self._say, self._realtime = server, stop, say, realtime
        self._settings = settings | {"numbers": itertools.count(1), "notify": self._notify}
        self._active: list[Piece] = []
        self._transcribed = self._received = 0
        self._message = ""  # the last one, which is not repeated
        self._lost = self._refused = False  # the server is lost for all pieces; it has granted all its sessions
        self.counts: defaultdict[int, Counter] = defaultdict(Counter)

    @property
    def width(self) -> int:
        """Number of sessions that run, or may run until the server refuses one."""
        return max(1, len(self._active)) if self._refused else self.size

    @property
    def transcribed(self) -> float:
        """Seconds of audio that have been transcribed, in all files."""
        return (self._transcribed + sum(p.transcriber.timeline.transcribed for p in self._active)) / RATE

    @property
    def partial(self) -> str:
        """Partial text after what has been yielded."""
        return "".join(word.text for word in self._active[0].transcriber.timeline.partial) if self._active else ""

    @property
    def received(self) -> float:
        """Seconds of audio that have been read, in all files."""
        return (self._received + sum(p.transcriber.timeline.received for p in self._active)) / RATE

    @property
    def speed(self) -> str:
        """Amount of audio, time and speed, for the user."""
        took = time.monotonic() - self.started
        return f"{self.received:.1f} s of audio in {took:.1f} s: {self.received / took:.1f} × real time"

    async def run(self, pieces: Iterator[Piece]) -> AsyncIterator[tuple[Piece, Word | Exception | None]]:
        """Yield each piece's words in order, with times of the file, then None or the exception that ended it.

        After an exception the rest of that piece is missing. Other pieces continue, unless the server is lost: then no
        more pieces are begun. `self.started` is the time of the call.
        """
        self.started = time.monotonic()
        order: asyncio.Queue[Piece | None] = asyncio.Queue()
        returned: list[Piece] = []
        reading = asyncio.Lock()

        async def next_piece() -> Piece | None:
            async with reading:
                if self._lost:
                    return None
                if returned:
                    return returned.pop()
                if self._stop.is_set() or (piece := await anext(coming, None)) is None:
                    return None
                order.put_nowait(piece)
                return piece

        async def work() -> None:
            while piece := await next_piece():
                if not await self._transcribe(piece):
                    returned.append(piece)
                    if self._active or self._stop.is_set():
                        return  # no slot for this worker: the others transcribe the piece
                    self._notify("WAITING", "all sessions of the server are taken: waiting for a free one")
                    await asyncio.sleep(random.uniform(1, 3))

        async def work_all() -> None:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self.size):
                        workers.create_task(work())
            finally:
                for piece in returned:
                    piece.items.put_nowait(Stopped())
                order.put_nowait(None)

        async with aclosing(threaded(pieces)) as coming:
            working = asyncio.create_task(work_all())
            try:
                while piece := await order.get():
                    while isinstance(item := await piece.items.get(), Word):
                        yield piece, item
                    yield piece, item
                await working
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)

    def _notify(self, state: str, message: str) -> None:
        if message and message != self._message:
            self._say(message)
        self._message = message or self._message

    async def _transcribe(self, piece: Piece) -> bool:
        """Put the piece's words into its queue; return False if the server has no slot for it."""
        # An endless source cannot be read from its beginning a second time: it waits for a slot.
        piece.transcriber = Transcriber(self._server, impatient=not piece.endless, **self._settings)
        piece.begun = time.monotonic()
        self._active.append(piece)
        end, ended, busy = Stopped(), asyncio.Event(), False
        try:
            await piece.transcriber.open()
            # Pieces that have begun are finished even after Ctrl+C: so the transcript has no gaps.
            stop = self._stop if self.size == 1 else None
            chunks = stream(piece.blocks(), self._realtime, stop, ended)
            async with aclosing(piece.transcriber.words(chunks)) as words:
                async for word in words:
                    piece.items.put_nowait(self._placed(word, piece))
            if ended.is_set() or piece.endless:
                end = None
        except (Refused, SessionLost, GaveUp) as error:
            end, busy = error, isinstance(error, SessionLost) and error.busy
            self._lost, self._refused = self._lost or not busy, self._refused or busy
        except Exception as error:
            end = error if isinstance(error, UserError) else RuntimeError(fault(error))
        finally:
            self._active.remove(piece)
            if not busy:
                self._end(piece, end)
        return not busy

    def _end(self, piece: Piece, end: Exception | None) -> None:
        """Put the end of the piece into its queue, and count it."""
        transcriber, timeline = piece.transcriber, piece.transcriber.timeline
        for word in timeline.partial:  # no session will replace it any more
            piece.items.put_nowait(self._placed(word, piece))
        del piece.blocks  # its audio: the piece may wait long until those before it are written
        self._transcribed += min(timeline.transcribed, timeline.received)
        self._received += timeline.received
        self.counts[piece.file].update({key: getattr(transcriber, key) for key in ("sessions", *TOKENS)})
        piece.items.put_nowait(end)

    @staticmethod
    def _placed(word: Word, piece: Piece) -> Word:
        """Return the word with times of the file."""
        return replace(word, start=word.start + piece.offset / RATE, end=word.end + piece.offset / RATE)
