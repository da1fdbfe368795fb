"""Several sessions at once, their words in order.

The speed of one session is limited by vLLM's work for each step; sixteen at once cost little more
(docs/performance.md). So a long file is cut in its pauses. A short file is one piece.
"""

import asyncio
import itertools
import random
import time
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .audio import stream, threaded
from .errors import GaveUp, Refused, SessionLost, Stopped, UserError, fault
from .levels import Levels
from .media import AudioFile
from .protocol import RATE
from .session import Server
from .timeline import Word, spaced
from .transcriber import Transcriber

USUAL, SHORT = (20, 60), (10, 16)  # shortest and longest piece in seconds: usually, and where sessions would be idle
LONGEST = 300  # seconds of a piece in which nobody pauses
PARALLEL = 64  # most sessions at once, where nobody says otherwise
GROW_SECONDS = 10.0  # after a refusal, until the pool asks for one session more
HELD = 960  # seconds of audio in all pieces, after which no more are read: 31 MB
TOKENS = ("prompt_tokens", "completion_tokens")


@dataclass
class Piece:
    """Part of a file: number of the file, offset in it in samples, audio, and whether it is the last part.

    `blocks()` yields the audio (PCM16 bytes, 16 kHz mono) from the piece's beginning, as often as it is called.
    `endless`: the audio may end at any time, and is complete all the same. `held`: samples of it in memory, None where
    it is read while it is sent. `begun`: `time.monotonic()` at the start of its transcription.
    """

    file: int
    offset: int
    blocks: Callable[[], Iterator[bytes]]
    last: bool
    endless: bool = False
    held: int | None = None
    transcriber: Transcriber | None = None
    begun: float = 0.0
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
    """Cut a file in its pauses into pieces for `width()` sessions. Each piece is read when it is requested.

    Where nobody pauses a piece becomes longer, up to LONGEST.
    """
    audio, offset, error, levels, looked = bytearray(), 0, None, Levels(), 0
    try:
        for block in source.blocks():
            audio += block
            levels.add(block)
            left = source.seconds and source.seconds - offset / RATE
            shortest, longest = limits(left, width())
            end = len(audio) // 2
            if end >= max(longest, looked + RATE):
                at, looked = levels.longest_pause(offset + shortest, offset + end) - offset, end
                if levels.pause(offset + at) or end >= LONGEST * RATE:
                    yield Piece(number, offset, partial(_held, bytes(audio[: 2 * at])), False, held=at)
                    del audio[: 2 * at]
                    offset, looked = offset + at, 0
                    levels.discard(offset)
    except Exception as problem:  # the worker that transcribes the last piece raises it
        error = problem
    yield Piece(number, offset, partial(_held, bytes(audio), error), True, held=len(audio) // 2)


def _held(pcm: bytes, error: Exception | None = None) -> Iterator[bytes]:
    """Yield audio that is in memory, then raise `error` if there is one."""
    yield pcm
    if error:
        raise error


async def _at_once(blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield blocks that are in memory: no thread has to wait for them."""
    for block in blocks:
        yield block


async def sessions_for_files(server: Server, model: str | None, most: int = PARALLEL) -> int:
    """Return how many sessions files may use at once: all but one, which stays free for people who talk.

    At most `most`, also where the server does not tell how many it has. Raises Refused or SessionLost.
    """
    known = (await server.model(model))["max_sessions"]
    return max(1, min(known - 1, most)) if known else most


class Pool:
    """Transcribes pieces in at most `size` sessions at once; where the server grants fewer, in fewer than it grants.

    When the server refuses a session, the pool leaves one of its own free for others. Later it asks for more again.
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
        """`stop`: begin no more pieces; of a file in one session, also send no more audio. `say` receives messages for
        the user. `realtime`: send no faster than a microphone would. `settings`: of each Transcriber.
        """
        self.size, self.started = size, time.monotonic()
        self._server, self._stop, self._say, self._realtime = server, stop, say, realtime
        self._settings = settings | {"numbers": itertools.count(1), "notify": self._notify}
        self._active: list[Piece] = []  # each has a session, or asks for one
        self._returned: list[Piece] = []  # by a server that had no session for them, in their order
        self._ended = asyncio.Event()  # a piece is not active any more
        self._transcribed = self._received = 0.0  # seconds, in the pieces that have ended
        self._message = ""  # the last one, which is not repeated
        self._lost = False  # the server is lost for all pieces
        self._crowded = False  # others have all its sessions
        self._limit, self._limited = size, self.started  # most sessions, `time.monotonic()` at which that was set
        self.counts: defaultdict[int, Counter] = defaultdict(Counter)

    @property
    def width(self) -> int:
        """Number of sessions that may run: `size`, or after a refusal fewer, and one more after each GROW_SECONDS."""
        return min(self.size, self._limit + int((time.monotonic() - self._limited) / GROW_SECONDS))

    @property
    def transcribed(self) -> float:
        """Seconds of audio that have been transcribed, in all files."""
        return self._transcribed + sum(piece.transcriber.transcribed for piece in self._active)

    @property
    def partial(self) -> str:
        """Partial text after what has been yielded."""
        return "".join(word.text for word in self._active[0].transcriber.partial) if self._active else ""

    @property
    def received(self) -> float:
        """Seconds of audio that have been read, in all files."""
        return self._received + sum(piece.transcriber.received for piece in self._active)

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
        self.started, last = time.monotonic(), ""
        order: asyncio.Queue[Piece | None] = asyncio.Queue()
        handing_out = asyncio.create_task(self._hand_out(pieces, order))
        try:
            while piece := await order.get():
                last = before = last if piece.offset else ""
                while isinstance(item := await piece.items.get(), Word):
                    item, before = replace(item, text=spaced(before, item.text)), ""
                    last = item.text
                    yield piece, item
                yield piece, item
            await handing_out
        finally:
            handing_out.cancel()
            await asyncio.gather(handing_out, return_exceptions=True)

    async def _hand_out(self, pieces: Iterator[Piece], order: asyncio.Queue[Piece | None]) -> None:
        """Begin pieces while sessions are free, those first that were returned. Put them into `order`, None last."""
        more = True
        try:
            async with aclosing(threaded(pieces)) as coming, asyncio.TaskGroup() as sessions:
                while not self._lost and not (self._crowded and self._stop.is_set()):
                    if self._crowded:
                        self._notify("WAITING", "all sessions of the server are taken: waiting for a free one")
                        await asyncio.sleep(random.uniform(1, 3))
                        self._crowded = False
                    elif self._full:
                        await self._change()
                    elif self._returned:
                        self._begin(self._returned.pop(0), sessions)
                    elif more and not self._stop.is_set():
                        if more := (piece := await anext(coming, None)) is not None:
                            order.put_nowait(piece)
                            self._begin(piece, sessions)
                    elif self._active:  # they may be returned
                        await self._change()
                    else:
                        break
        finally:
            for piece in self._returned:
                piece.items.put_nowait(Stopped())
            order.put_nowait(None)

    @property
    def _full(self) -> bool:
        return len(self._active) >= self.width or sum(piece.held or 0 for piece in self._active) > HELD * RATE

    async def _change(self) -> None:
        """Wait until a piece has ended, or until there may be one session more."""
        self._ended.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(GROW_SECONDS):
                await self._ended.wait()

    def _begin(self, piece: Piece, sessions: asyncio.TaskGroup) -> None:
        # An endless source cannot be read from its beginning a second time: it waits for a slot.
        piece.transcriber = Transcriber(self._server, impatient=not piece.endless, **self._settings)
        piece.begun = time.monotonic()
        self._active.append(piece)
        sessions.create_task(self._transcribe(piece))

    def _notify(self, state: str, message: str) -> None:
        if message and message != self._message:
            self._say(message)
        self._message = message or self._message

    async def _transcribe(self, piece: Piece) -> None:
        """Put the piece's words into its queue, and how it ended; or return it, where the server has no session."""
        complete, end, returned = piece.endless, Stopped(), False

        def blocks() -> Iterator[bytes]:
            nonlocal complete
            yield from piece.blocks()
            complete = True

        try:
            await piece.transcriber.open()
            # Pieces that have begun are finished even after Ctrl+C: so the transcript has no gaps.
            stop = self._stop if self.size == 1 else None
            chunks = stream(blocks(), self._realtime, stop) if piece.held is None else _at_once(blocks())
            async with aclosing(piece.transcriber.words(chunks)) as words:
                async for word in words:
                    piece.items.put_nowait(self._placed(word, piece))
            end = None if complete else end
        except (Refused, SessionLost, GaveUp) as error:
            end, returned = error, isinstance(error, SessionLost) and error.busy
            self._lost = self._lost or not returned
            if returned:
                self._limit, self._limited = max(1, len(self._active) - 2), time.monotonic()
                self._crowded = len(self._active) == 1
        except Exception as error:
            end = error if isinstance(error, UserError) else RuntimeError(fault(error))
        finally:
            self._active.remove(piece)
            if returned:
                insort(self._returned, piece, key=lambda piece: (piece.file, piece.offset))
            else:
                self._end(piece, end)
            self._ended.set()

    def _end(self, piece: Piece, end: Exception | None) -> None:
        """Put the end of the piece into its queue, and count it."""
        transcriber = piece.transcriber
        for word in transcriber.partial:  # no session will replace it any more
            piece.items.put_nowait(self._placed(word, piece))
        del piece.blocks  # its audio: the piece may wait long until those before it are written
        self._transcribed += min(transcriber.transcribed, transcriber.received)
        self._received += transcriber.received
        self.counts[piece.file].update({key: getattr(transcriber, key) for key in ("sessions", *TOKENS)})
        piece.items.put_nowait(end)

    @staticmethod
    def _placed(word: Word, piece: Piece) -> Word:
        """Return the word with times of the file."""
        return replace(word, start=word.start + piece.offset / RATE, end=word.end + piece.offset / RATE)
