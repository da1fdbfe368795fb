"""Audio as the realtime endpoint wants it: 16 kHz mono PCM16 in small chunks."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
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
    """A file that libsndfile reads (WAV, FLAC, OGG, MP3, ...), streamed from disk; through ffmpeg what it cannot.

    `seconds` is the duration by the file's header, None where it does not say. Raises AudioError
    with one line that says what is wrong with the path.
    """

    def __init__(self, path: str | Path):
        self.name = str(path)
        self.path = Path(path)
        if not self.path.exists():
            raise AudioError(f"{path}: no such file")
        if self.path.is_dir():
            raise AudioError(f"{path}: is a folder, not an audio file")
        if not os.access(self.path, os.R_OK):
            raise AudioError(f"{path}: no permission to read it")
        if self.path.is_file() and self.path.stat().st_size == 0:
            raise AudioError(f"{path}: the file is empty")
        self._ffmpeg = False
        try:
            info = soundfile.info(self.path)
        except soundfile.LibsndfileError as error:
            self.seconds = self._probe(error.error_string)
            self._ffmpeg = True
        else:
            if info.frames <= 0:
                raise AudioError(f"{path}: holds no audio samples")
            self.seconds = info.frames / info.samplerate

    def blocks(self) -> Iterator[bytes]:
        """Yield the file as 16 kHz mono PCM16 in pieces of about 0.1 s (3200 bytes).

        Memory does not depend on the file's length. Raises AudioError where the file is damaged.
        """
        try:
            yield from self._decode() if self._ffmpeg else read_blocks(soundfile.SoundFile(self.path))
        except (soundfile.LibsndfileError, OSError) as error:
            raise AudioError(f"{self.path}: damaged audio ({error})") from None

    def _probe(self, reason: str) -> float | None:
        """Return the duration by ffprobe, in seconds. Raises AudioError if there is no audio for ffmpeg either."""
        if not shutil.which("ffmpeg") or not shutil.which("ffprobe"):
            raise AudioError(
                f"{self.path}: not an audio file that libsndfile reads ({reason.rstrip('.')}); "
                "if it is a video or M4A, install ffmpeg: apt install ffmpeg"
            )
        fields = ["-show_entries", "stream=codec_type:format=duration", "-select_streams", "a"]
        command = ["ffprobe", "-v", "error", *fields, "-of", "json", f"file:{self.path}"]
        probe = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found = json.loads(probe.stdout or "{}")
        if not found.get("streams"):
            raise AudioError(f"{self.path}: not an audio file that libsndfile or ffmpeg reads")
        duration = found.get("format", {}).get("duration")
        return float(duration) if duration else None

    def _decode(self) -> Iterator[bytes]:
        """Yield what ffmpeg makes of the file's first audio stream."""
        form = ["-map", "0:a:0", "-f", "s16le", "-ac", "1", "-ar", str(RATE), "-"]
        command = ["ffmpeg", "-v", "error", "-nostdin", "-i", f"file:{self.path}", *form]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                while pcm := process.stdout.read(2 * round(RATE * CHUNK_SECONDS)):
                    yield pcm
                if process.wait():
                    lines = process.stderr.read().decode(errors="replace").strip().splitlines()
                    raise AudioError(f"{self.path}: damaged audio ({lines[-1] if lines else 'ffmpeg failed'})")
            finally:
                process.kill()


class StandardInput:
    """Audio from standard input: a WAV stream, or raw PCM16 mono at `raw` samples a second."""

    name, seconds = "-", None

    def __init__(self, raw: int | None = None):
        self._raw = raw

    def blocks(self) -> Iterator[bytes]:
        """Yield 16 kHz mono PCM16 in pieces of about 0.1 s as it comes. Raises AudioError."""
        descriptor = sys.stdin.fileno()
        form = {"samplerate": self._raw, "channels": 1, "format": "RAW", "subtype": "PCM_16"} if self._raw else {}
        try:
            yield from read_blocks(soundfile.SoundFile(descriptor, closefd=False, **form))
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"standard input: no WAV stream ({error.error_string.rstrip('.')}); for raw PCM16 give --raw RATE"
            ) from None


def read_blocks(file: soundfile.SoundFile) -> Iterator[bytes]:
    """Yield the rest of an open sound file as 16 kHz mono PCM16 in pieces of about 0.1 s."""
    with file:
        convert = Resampler(file.samplerate)
        frames = max(1, round(file.samplerate * CHUNK_SECONDS))
        while len(block := file.read(frames, dtype="float32", always_2d=True)):
            yield convert(block)
        yield convert(np.zeros((0, file.channels), np.float32), last=True)


AudioSource = AudioFile | StandardInput


async def stream(
    blocks: Iterator[bytes], realtime: bool = False, stop: asyncio.Event | None = None
) -> AsyncIterator[bytes]:
    """Turn PCM16 blocks into an async stream that ends early when `stop` is set.

    With `realtime` no block comes sooner than it would have been spoken. Blocks are read in a
    thread: they may come from a pipe.
    """
    clock, sent, stop = asyncio.get_running_loop().time, 0.0, stop or asyncio.Event()
    start, stopped = clock(), asyncio.create_task(stop.wait())
    try:
        while True:
            read = asyncio.ensure_future(asyncio.to_thread(next, blocks, None))
            await asyncio.wait({read, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set() or (pcm := read.result()) is None:
                return
            sent += len(pcm) / 2 / RATE
            if realtime:
                await asyncio.wait({stopped}, timeout=max(0.0, start + sent - clock()))
            if pcm:
                yield pcm
    finally:
        stopped.cancel()
