"""Several sessions at once, their words in order.

One session is bound by vLLM's work for each step; sixteen at once cost little more (README, "Measured").
So a long file is cut in its quietest pauses; a short one is a piece by itself.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import numpy as np

from .audio import RATE, AudioError, AudioSource, stream
from .session import Lost, Refused
from .timeline import HOP, Word
from .transcriber import GaveUp, Transcriber

SHORTEST_PIECE, LONGEST_PIECE = 20 * RATE, 60 * RATE
QUIET = RATE // 2 // HOP  # length of the pause to look for, in level readings


@dataclass
class Piece:
    """Part of a file: number of the file, offset in it in samples, audio, and whether it is the last part."""

    file: int
    offset: int
    blocks: Iterable[bytes]
    last: bool
    transcriber: Transcriber | None = None
    items: asyncio.Queue = field(default_factory=asyncio.Queue)  # Word; at the end None or the Exception


def whole(number: int, source: AudioSource) -> Iterator[Piece]:
    """Return a file as one piece, streamed from disk."""
    yield Piece(number, 0, source.blocks(), True)


def cut(number: int, source: AudioSource) -> Iterator[Piece]:
    """Cut a file into pieces of 20 to 60 s, each read when it is asked for."""
    audio, offset, error = bytearray(), 0, None
    try:
        for block in source.blocks():
            audio += block
            if len(audio) >= 2 * LONGEST_PIECE:
                at = quietest_pause(np.frombuffer(audio, "<i2"))
                yield Piece(number, offset, Audio(audio[: 2 * at]), False)
                offset += at
                audio = audio[2 * at :]
    except AudioError as damage:
        error = damage
    yield Piece(number, offset, Audio(audio, error), True)


class Audio:
    """Audio in memory, to be iterated over as often as needed; ends with `error` if there is one."""

    def __init__(self, pcm: bytes, error: AudioError | None = None):
        self._pcm, self._error = bytes(pcm), error

    def __iter__(self) -> Iterator[bytes]:
        if self._pcm:
            yield self._pcm
        if self._error:
            raise self._error


def quietest_pause(samples: np.ndarray) -> int:
    """Return the middle of the first of the quietest half seconds behind SHORTEST_PIECE, in samples."""
    readings = samples[SHORTEST_PIECE : len(samples) // HOP * HOP].astype(np.float32).reshape(-1, HOP)
    levels = 10 * np.log10(np.square(readings).mean(axis=1) + 1.0)
    loudest = np.lib.stride_tricks.sliding_window_view(levels, QUIET).max(axis=1)
    first = int((loudest <= loudest.min() + 3).argmax())
    return SHORTEST_PIECE + (first + QUIET // 2) * HOP


class Pool:
    """Transcribes pieces by at most `size` sessions at once.

    `make(impatient)` returns a new Transcriber for a piece. Where the server has fewer slots than `size`, the
    pool makes do with those it gets.
    """

    def __init__(self, make: Callable[[bool], Transcriber], size: int, stop: asyncio.Event, realtime: bool = False):
        self._make, self._size, self._stop, self._realtime = make, size, stop, realtime
        self._active: list[Piece] = []
        self._understood = self._heard = 0
        self.sessions = self.prompt_tokens = self.completion_tokens = 0

    @property
    def understood(self) -> float:
        """Seconds of audio that have been understood, in all files."""
        return (self._understood + sum(p.transcriber.timeline.understood for p in self._active)) / RATE

    @property
    def tail(self) -> str:
        """Unsettled text behind what has been yielded."""
        return "".join(word.text for word in self._active[0].transcriber.timeline.tail) if self._active else ""

    @property
    def heard(self) -> float:
        """Seconds of audio that have been read, in all files."""
        return (self._heard + sum(p.transcriber.timeline.heard for p in self._active)) / RATE

    async def run(self, pieces: Iterator[Piece]) -> AsyncIterator[tuple[Piece, Word | Exception | None]]:
        """Yield each piece's words in order, with times of the file, then None or what went wrong.

        After something went wrong, the rest of that piece is missing; others go on.
        """
        order: asyncio.Queue[Piece | None] = asyncio.Queue()
        returned: list[Piece] = []
        reading = asyncio.Lock()

        async def next_piece() -> Piece | None:
            async with reading:
                if returned:
                    return returned.pop()
                if self._stop.is_set() or (piece := await asyncio.to_thread(next, pieces, None)) is None:
                    return None
                order.put_nowait(piece)
                return piece

        async def work() -> None:
            while piece := await next_piece():
                if not await self._transcribe(piece):
                    returned.append(piece)  # no slot for this worker: the others will see to it
                    if self._active:
                        return

        async def work_all() -> None:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self._size):
                        workers.create_task(work())
            finally:
                order.put_nowait(None)

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
        piece.transcriber = self._make(bool(self._active))
        self._active.append(piece)
        timeline, end = piece.transcriber.timeline, None
        try:
            await piece.transcriber.open()
            # Pieces at work are finished even when told to stop: so the transcript has no holes.
            chunks = stream(iter(piece.blocks), self._realtime, self._stop if self._size == 1 else None)
            async with aclosing(piece.transcriber.words(chunks)) as words:
                async for word in words:
                    piece.items.put_nowait(self._placed(word, piece))
        except Lost as error:
            if error.busy:
                return False
            end = error
        except (Refused, GaveUp, AudioError) as error:
            end = error
        finally:
            self._active.remove(piece)
        for word in timeline.tail:  # no session will replace it any more
            piece.items.put_nowait(self._placed(word, piece))
        piece.items.put_nowait(end)
        self._understood += min(timeline.understood, timeline.heard)
        self._heard += timeline.heard
        self.sessions += piece.transcriber.sessions
        self.prompt_tokens += piece.transcriber.prompt_tokens
        self.completion_tokens += piece.transcriber.completion_tokens
        return True

    @staticmethod
    def _placed(word: Word, piece: Piece) -> Word:
        """Return the word with times of the file."""
        return replace(word, start=word.start + piece.offset / RATE, end=word.end + piece.offset / RATE)
