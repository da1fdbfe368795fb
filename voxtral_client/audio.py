"""Audio as the realtime endpoint wants it: 16 kHz mono PCM16 in small chunks."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from typing import TypeVar

import numpy as np
import soxr

from . import UserError
from .protocol import RATE

CHUNK_SECONDS = 0.1
CANCELLED = 0.05  # of the channels' power is left: one is the other upside down (unlike channels leave half)

Item = TypeVar("Item")


class AudioError(UserError):
    """The audio cannot be read."""


def to_pcm16(samples: np.ndarray) -> bytes:
    """Convert float samples in [-1, 1], shape (n,), to little-endian PCM16 bytes, length 2 n.

    Values outside are clipped (a cast alone would wrap them around); NaN becomes silence.
    """
    scaled = np.rint(np.clip(np.nan_to_num(samples), -1, 1) * 32768.0)
    return np.minimum(scaled, 32767).astype("<i2").tobytes()


def mixed(block: np.ndarray) -> np.ndarray:
    """Mix float32 samples of shape (n, channels) to one channel; where the channels cancel, take the loudest alone."""
    mono = block.mean(axis=1, dtype=np.float32)
    if block.shape[1] > 1 and len(block):
        powers = np.square(block).mean(axis=0)
        if np.square(mono).mean() < CANCELLED * powers.mean():
            return np.ascontiguousarray(block[:, powers.argmax()])
    return mono


class Resampler:
    """Blocks of any rate and channel count in, PCM16 at 16 kHz mono out, without seams.

    One soxr stream runs over all blocks, so block borders are inaudible and the output has
    round(n * 16000 / rate) samples for n input samples once `last` has been passed.
    """

    def __init__(self, rate: int):
        """`rate`: samples a second of the blocks to come."""
        self._stream = None if rate == RATE else soxr.ResampleStream(rate, RATE, 1, dtype="float32")

    def __call__(self, block: np.ndarray, last: bool = False) -> bytes:
        """Convert `block`, float32 of shape (n, channels), to PCM16 bytes (may be empty)."""
        mono = mixed(block)
        if self._stream is not None:
            mono = self._stream.resample_chunk(mono, last=last)
        return to_pcm16(mono)


async def threaded(items: Iterator[Item], ahead: int = 1) -> AsyncIterator[Item]:
    """Yield `items`, which a thread reads, `ahead` at most beyond those taken. Their exceptions come through.

    The thread is a daemon: where it waits for a pipe, it holds nobody up.
    """
    loop, room, closed = asyncio.get_running_loop(), threading.Semaphore(ahead), False
    queue: asyncio.Queue[tuple[Item | None, BaseException | None]] = asyncio.Queue()

    def post(item: Item | None, error: BaseException | None = None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(queue.put_nowait, (item, error))

    def read() -> None:
        try:
            for item in items:
                post(item)
                room.acquire()
                if closed:
                    return
            post(None, StopAsyncIteration())
        except BaseException as error:
            post(None, error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            item, error = await queue.get()
            if isinstance(error, StopAsyncIteration):
                return
            if error:
                raise error
            yield item
            room.release()
    finally:
        closed = True
        room.release()


async def stream(
    blocks: Iterator[bytes],
    realtime: bool = False,
    stop: asyncio.Event | None = None,
    ended: asyncio.Event | None = None,
) -> AsyncIterator[bytes]:
    """Turn PCM16 blocks into an async stream that ends early when `stop` is set; `ended` is set at their own end.

    With `realtime` no block comes sooner than it would have been spoken. Blocks are read in a
    thread: they may come from a pipe.
    """
    clock, sent, stop = asyncio.get_running_loop().time, 0.0, stop or asyncio.Event()
    start, stopped = clock(), asyncio.create_task(stop.wait())
    try:
        async with aclosing(threaded(blocks, 4)) as reading:
            while True:
                read = asyncio.ensure_future(anext(reading, None))
                await asyncio.wait({read, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if stop.is_set():
                    read.cancel()
                    await asyncio.gather(read, return_exceptions=True)
                    return
                if (pcm := read.result()) is None:
                    break
                sent += len(pcm) / 2 / RATE
                if realtime:
                    await asyncio.wait({stopped}, timeout=max(0.0, start + sent - clock()))
                if pcm:
                    yield pcm
        if ended:
            ended.set()
    finally:
        stopped.cancel()
