"""Audio as the realtime endpoint wants it: 16 kHz mono PCM16 in small chunks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 16_000  # samples a second, the only rate the model knows
CHUNK_SECONDS = 0.1


class AudioError(Exception):
    """The audio cannot be read; the message is one line for the user."""


def to_pcm16(samples: np.ndarray) -> bytes:
    """Convert float samples in [-1, 1], shape (n,), to little-endian PCM16 bytes, length 2 n.

    Values outside are clipped (a cast alone would wrap them around); NaN becomes silence.
    """
    scaled = np.rint(np.nan_to_num(samples, nan=0.0) * 32768.0)
    return np.clip(scaled, -32768, 32767).astype("<i2").tobytes()


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
        mono = block.mean(axis=1, dtype=np.float32)
        if self._stream is not None:
            mono = self._stream.resample_chunk(mono, last=last)
        return to_pcm16(mono)


class AudioFile:
    """A file that libsndfile reads (WAV, FLAC, OGG, MP3, ...), streamed from disk.

    `seconds` is the duration by the file's header. Raises AudioError with one line that says
    what is wrong with the path.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise AudioError(f"{path}: no such file")
        if self.path.is_dir():
            raise AudioError(f"{path}: is a folder, not an audio file")
        if self.path.stat().st_size == 0:
            raise AudioError(f"{path}: the file is empty")
        try:
            info = soundfile.info(self.path)
        except PermissionError:
            raise AudioError(f"{path}: no permission to read it") from None
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: not an audio file that libsndfile reads ({error.error_string})") from None
        if info.frames <= 0:
            raise AudioError(f"{path}: holds no audio samples")
        self.seconds = info.frames / info.samplerate

    def blocks(self) -> Iterator[bytes]:
        """Yield the file as 16 kHz mono PCM16 in pieces of about 0.1 s (3200 bytes).

        Memory does not depend on the file's length. Raises AudioError where the file is damaged.
        """
        try:
            with soundfile.SoundFile(self.path) as file:
                convert = Resampler(file.samplerate)
                frames = max(1, round(file.samplerate * CHUNK_SECONDS))
                while len(block := file.read(frames, dtype="float32", always_2d=True)):
                    yield convert(block)
                yield convert(np.zeros((0, file.channels), np.float32), last=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise AudioError(f"{self.path}: damaged audio ({error})") from None


async def stream(
    blocks: Iterator[bytes], realtime: bool = False, stop: asyncio.Event | None = None
) -> AsyncIterator[bytes]:
    """Turn PCM16 blocks into an async stream that ends early when `stop` is set.

    With `realtime` no block comes sooner than it would have been spoken.
    """
    clock, sent, stop = asyncio.get_running_loop().time, 0.0, stop or asyncio.Event()
    start = clock()
    for pcm in blocks:
        sent += len(pcm) / 2 / RATE
        if realtime:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(start + sent):
                    await stop.wait()
        if stop.is_set():
            return
        if pcm:
            yield pcm
