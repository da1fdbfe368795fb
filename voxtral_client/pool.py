"""Several sessions at once, their words in order.

One session is bound by vLLM's work for each step; sixteen at once cost little more (docs/performance.md).
So a long file is cut in its quietest pauses; a short one is a piece by itself.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import numpy as np

from . import UserError
from .audio import stream, threaded
from .cli import fault
from .media import AudioSource
from .protocol import RATE
from .session import Refused, SessionLost
from .timeline import HOP, Word
from .transcriber import GaveUp, Transcriber

USUAL, SHORT = (20, 60), (10, 16)  # seconds of a piece, at least and at most; where sessions would stand idle
HELD = 960  # seconds of audio in all pieces at most: 31 MB
QUIET = RATE // 2 // HOP  # length of the pause to look for, in level readings


class Stopped(Exception):
    """Ctrl+C came before the end of a file."""


@dataclass
class Piece:
    """Part of a file: number of the file, offset in it in samples, audio, and whether it is the last part.

    `endless`: the audio may be ended at any time, and is complete all the same.
    """

    file: int
    offset: int
    blocks: Iterable[bytes]
    last: bool
    endless: bool = False
    transcriber: Transcriber | None = None
    begun: float = 0.0  # by the clock of `time.monotonic`
    items: asyncio.Queue = field(default_factory=asyncio.Queue)  # Word; at the end None or the Exception


def uncut(number: int, source: AudioSource) -> Iterator[Piece]:
    """Return a file as one piece, streamed from disk."""
    yield Piece(number, 0, Streamed(source), True, source.endless)


def limits(left: float | None, width: int) -> tuple[int, int]:
    """Return how long a piece is at least and at most, in samples, where `left` seconds go to `width` sessions.

    Towards the end of a file pieces become shorter, so that all sessions have work to the end.
    """
    share = 1.0 if left is None else (left / (3 * width) - SHORT[0]) / (USUAL[0] - SHORT[0])
    share = min(1.0, max(0.0, share))
    longest = min(SHORT[1] + share * (USUAL[1] - SHORT[1]), max(SHORT[1], HELD / width))
    shortest = min(SHORT[0] + share * (USUAL[0] - SHORT[0]), longest * SHORT[0] / SHORT[1])
    return round(shortest * RATE), round(longest * RATE)


def cut(number: int, source: AudioSource, width: Callable[[], int]) -> Iterator[Piece]:
    """Cut a file into pieces for `width()` sessions, each read when it is asked for."""
    audio, offset, error = bytearray(), 0, None
    try:
        for block in source.blocks():
            audio += block
            left = source.seconds and source.seconds - offset / RATE
            shortest, longest = limits(left, width())
            if len(audio) >= 2 * longest:
                at = quietest_pause(np.frombuffer(audio, "<i2"), shortest)
                yield Piece(number, offset, Audio(audio[: 2 * at]), False)
                offset += at
                audio = audio[2 * at :]
    except Exception as problem:  # the worker that transcribes the last piece raises it
        error = problem
    yield Piece(number, offset, Audio(audio, error), True)


class Streamed:
    """The audio of a source, from its beginning as often as it is iterated over."""

    def __init__(self, source: AudioSource):
        self._source = source

    def __iter__(self) -> Iterator[bytes]:
        return self._source.blocks()


class Audio:
    """Audio in memory, to be iterated over as often as needed; ends with `error` if there is one."""

    def __init__(self, pcm: bytes, error: Exception | None = None):
        self._pcm, self._error = bytes(pcm), error

    def __iter__(self) -> Iterator[bytes]:
        if self._pcm:
            yield self._pcm
        if self._error:
            raise self._error


def quietest_pause(samples: np.ndarray, shortest: int) -> int:
    """Return the middle of the first of the quietest half seconds behind `shortest`, in samples."""
    readings = samples[shortest : shortest + (len(samples) - shortest) // HOP * HOP].astype(np.float32).reshape(-1, HOP)
    levels = 10 * np.log10(np.square(readings).mean(axis=1) + 1.0)
    loudest = np.lib.stride_tricks.sliding_window_view(levels, QUIET).max(axis=1)
    first = int((loudest <= loudest.min() + 3).argmax())
    return shortest + (first + QUIET // 2) * HOP


class Pool:
    """Transcribes pieces by at most `size` sessions at once.

    `make(impatient)` returns a new Transcriber for a piece. Where the server has fewer slots than `size`, the
    pool makes do with those it gets.
    """

    def __init__(
        self,
        make: Callable[[bool], Transcriber],
        size: int,
        stop: asyncio.Event,
        realtime: bool = False,
        say: Callable[[str], None] = lambda message: None,
    ):
        self._make, self.size, self._stop, self._realtime, self._say = make, size, stop, realtime, say
        self._active: list[Piece] = []
        self._transcribed = self._received = 0
        self._lost = False  # the server: one piece has found out for all
        self._refused = False  # the server has granted as many sessions as it can
        self.sessions = self.prompt_tokens = self.completion_tokens = 0

    @property
    def width(self) -> int:
        """How many sessions there are, or, until one is refused, may be."""
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

    async def run(self, pieces: Iterator[Piece]) -> AsyncIterator[tuple[Piece, Word | Exception | None]]:
        """Yield each piece's words in order, with times of the file, then None or what went wrong.

        After something went wrong, the rest of that piece is missing; others go on, unless the server is lost: then no
        more pieces are begun.
        """
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
            waiting = False
            while piece := await next_piece():
                if await self._transcribe(piece):
                    waiting = False
                    continue
                returned.append(piece)
                if self._active or self._stop.is_set():
                    return  # no slot for this worker: the others will see to it
                if not waiting:
                    self._say("all sessions of the server are taken: waiting for a free one")
                waiting = True
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

    async def _transcribe(self, piece: Piece) -> bool:
        """Put the piece's words into its queue; return False if the server has no slot for it."""
        piece.transcriber = self._make(not piece.endless)  # what comes only once cannot be begun again
        piece.begun = time.monotonic()
        self._active.append(piece)
        end, ended, busy = Stopped(), asyncio.Event(), False
        try:
            await piece.transcriber.open()
            # Pieces at work are finished even when told to stop: so the transcript has no holes.
            stop = self._stop if self.size == 1 else None
            chunks = stream(iter(piece.blocks), self._realtime, stop, ended)
            async with aclosing(piece.transcriber.words(chunks)) as words:
                async for word in words:
                    piece.items.put_nowait(self._placed(word, piece))
            if ended.is_set() or piece.endless:
                end = None
        except (Refused, SessionLost, GaveUp) as error:
            end, busy = error, isinstance(error, SessionLost) and error.busy
            self._lost, self._refused = self._lost or not busy, self._refused or busy
        except UserError as error:
            end = error
        except Exception as error:
            end = RuntimeError(fault(error))
        finally:
            self._active.remove(piece)
            if not busy:
                self._book(piece, end)
        return not busy

    def _book(self, piece: Piece, end: Exception | None) -> None:
        """Put the end of the piece into its queue, and count it."""
        timeline = piece.transcriber.timeline
        for word in timeline.partial:  # no session will replace it any more
            piece.items.put_nowait(self._placed(word, piece))
        piece.items.put_nowait(end)
        piece.blocks = ()  # may wait long for those before it to be written
        self._transcribed += min(timeline.transcribed, timeline.received)
        self._received += timeline.received
        self.sessions += piece.transcriber.sessions
        self.prompt_tokens += piece.transcriber.prompt_tokens
        self.completion_tokens += piece.transcriber.completion_tokens

    @staticmethod
    def _placed(word: Word, piece: Piece) -> Word:
        """Return the word with times of the file."""
        return replace(word, start=word.start + piece.offset / RATE, end=word.end + piece.offset / RATE)
