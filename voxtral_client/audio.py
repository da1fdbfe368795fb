"""Audio in the form of the realtime endpoint: 16 kHz mono PCM16 in small chunks."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from typing import TypeVar

import numpy as np
import soxr

from .protocol import RATE

CHUNK_SECONDS = 0.1
CANCELLED = 0.05  # share of the channels' power left in the mix if one is the other inverted (unrelated ones: half)

Item = TypeVar("Item")


def to_pcm16(samples: np.ndarray) -> bytes:
    """Convert float samples in [-1, 1], shape (n,), to little-endian PCM16 bytes, length 2 n.

    Values outside are clipped (a cast alone would wrap them around); NaN becomes silence.
    """
    scaled = np.rint(np.clip(np.nan_to_num(samples), -1, 1) * 32768.0)
    return np.minimum(scaled, 32767).astype("<i2").tobytes()


def mixed(block: np.ndarray) -> np.ndarray:
    """Mix float32 samples of shape (n, channels) to shape (n,); where the channels cancel, take the loudest one."""
    mono = block.mean(axis=1, dtype=np.float32)
    if block.shape[1] > 1 and len(block):
        powers = np.square(block).mean(axis=0)
        if np.square(mono).mean() < CANCELLED * powers.mean():
            return np.ascontiguousarray(block[:, powers.argmax()])
    return mono


class Resampler:
    """Converts blocks of any channel count at `rate` samples a second to PCM16 at 16 kHz mono, without seams.

    One soxr stream runs over all blocks, so block borders are inaudible. With the `last` block the output has
    round(n * 16000 / rate) samples for n input samples.
    """

    def __init__(self, rate: int):
        self._stream = None if rate == RATE else soxr.ResampleStream(rate, RATE, 1, dtype="float32")

    def __call__(self, block: np.ndarray, last: bool = False) -> bytes:
        """Convert `block`, float32 of shape (n, channels), to PCM16 bytes (may be empty)."""
        mono = mixed(block)
        if self._stream is not None:
            mono = self._stream.resample_chunk(mono, last=last)
        return to_pcm16(mono)


async def threaded(items: Iterator[Item], ahead: int = 1, stop: asyncio.Event | None = None) -> AsyncIterator[Item]:
    """Yield `items`, which a thread reads, at most `ahead` before they are needed, until their end or `stop`.

    Raises what `items` raises. The thread is a daemon: while it waits for a pipe, the process can end.
    """
    loop, room, closed = asyncio.get_running_loop(), threading.Semaphore(ahead), False
    queue: asyncio.Queue[tuple[Item | None, BaseException | None]] = asyncio.Queue()
    end = None, StopAsyncIteration()

    def read() -> None:
        with suppress(RuntimeError):  # the loop is closed
            try:
                for item in items:
                    loop.call_soon_threadsafe(queue.put_nowait, (item, None))
                    room.acquire()
                    if closed:
                        return
                last = end
            except BaseException as error:
                last = None, error
            loop.call_soon_threadsafe(queue.put_nowait, last)

    async def stopped() -> None:
        await stop.wait()
        queue.put_nowait(end)

    threading.Thread(target=read, daemon=True).start()
    stopping = asyncio.create_task(stopped()) if stop else None
    try:
        while (entry := await queue.get()) is not end:
            item, error = entry
            if error:
                raise error
            yield item
            room.release()
    finally:
        closed = True
        room.release()
        if stopping:
            stopping.cancel()


async def stream(
    blocks: Iterator[bytes], realtime: bool = False, stop: asyncio.Event | None = None
) -> AsyncIterator[bytes]:
    """Yield PCM16 blocks, which a thread reads (they may come from a pipe), until their end or `stop`.

    `realtime`: no block comes before a microphone would have recorded it. Raises what `blocks` raises.
    """
    clock, sent = asyncio.get_running_loop().time, 0.0
    start = clock()
    async with aclosing(threaded(blocks, 4, stop)) as reading:
        async for pcm in reading:
            sent += len(pcm) / 2 / RATE
            if realtime:
                await asyncio.sleep(start + sent - clock())
            yield pcm
