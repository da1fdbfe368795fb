"""Audio from files and streams: everything that FFmpeg's libraries read, by PyAV, once from beginning to end.

Times are those of the container: where it has no sound (a track that starts late, a gap, damage) the output is silent.
Damage is counted, and reported at the end, after everything that could be read has been yielded.
"""

import io
import logging
import os
import stat
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import av
import numpy as np

from . import wav
from .audio import CHUNK_SECONDS, AudioError, Resampler
from .protocol import RATE

# Seconds, unless stated otherwise.
GAP = 0.1  # a smaller difference between container time and samples is rounding or jitter
DAMAGED_GAP = 0.02  # the same after damage
JUMP = 1.0  # a larger step back in container time: its time base starts again, for one recording after another
LONGEST_GAP = 3600.0  # longest silence that is plausible where the container does not give its duration
LATEST_START = 60.0  # a track does not start later than this after its film; a larger number is a time of day
SHORT = 0.5  # this much may be missing at the end
CUT_IN = 10  # packets at the beginning that refer to earlier ones, in a stream that was cut out of a longer one
TRIES = 100  # errors of a container one after another
COUNTED = {"mp3", "aac", "ac3", "eac3", "dts"}  # without times: FFmpeg counts the frames
FILMS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
SURE = FILMS | {"flac", "aiff", "au"}  # contain their duration; others are estimated
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"Xing", b"Info", b"VBRI")  # between the frames of MP3
RATES = range(1000, 1_000_000)  # plausible sample rates
LANGUAGES = {"ar": "ara", "de": "ger deu", "en": "eng", "es": "spa", "fr": "fre fra", "hi": "hin", "it": "ita",
             "ja": "jpn", "ko": "kor", "nl": "dut nld", "pt": "por", "ru": "rus", "zh": "chi zho"}  # fmt: skip

av.logging.set_level(av.logging.ERROR)  # PyAV counts FFmpeg's errors
logging.getLogger("libav").setLevel(logging.CRITICAL + 1)  # and does not print them


class AudioFile:
    """A file, or a pipe by its path. Raises AudioError, one line, where it cannot be read.

    `track`: number of the audio track, from 1, or its language; by default the file's default track.
    `endless`: a pipe or a device, which is read as it comes and may end at any time.
    """

    def __init__(self, path: str | Path, track: str | None = None):
        self.name, self.path, self._track = str(path), Path(path), track
        try:
            status = self.path.stat()
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise AudioError(f"{path}: {reason}") from None
        if not os.access(self.path, os.R_OK):
            raise AudioError(f"{path}: no permission to read it")
        if stat.S_ISDIR(status.st_mode):
            raise AudioError(f"{path}: is a folder, not an audio file")
        self.endless = not stat.S_ISREG(status.st_mode)
        if not self.endless and status.st_size == 0:
            raise AudioError(f"{path}: the file is empty")

    @cached_property
    def seconds(self) -> float | None:
        """The duration by the file's own data in seconds, None where it has none. Raises AudioError."""
        if self.endless:
            return None
        with self._decoder() as decoder:
            decoder.open()
            if decoder.duration == 0:
                raise AudioError(f"{self.name}: holds no audio samples")
            return decoder.duration

    def blocks(self) -> Iterator[bytes]:
        """Yield the audio as 16 kHz mono PCM16 in pieces of about 0.1 s (3200 bytes), as it comes.

        Memory does not depend on the length. Raises AudioError where it is not audio, and at the end where it is
        damaged: everything that could be decoded has been yielded by then, at its own time.
        """
        with self._decoder() as decoder:
            yield from decoder.blocks()

    def _decoder(self) -> "Decoder":
        try:
            return Decoder(open(self.path, "rb", buffering=0), self.name, self._track)
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be read ({error.strerror})") from None


class StandardInput(AudioFile):
    """Audio of any kind from standard input; with `raw`, PCM16 mono at that sample rate. Raises AudioError."""

    def __init__(self, raw: int | None = None, track: str | None = None):
        self.name, self.endless, self._track = "-", True, track
        self._raw = wav.Wav("s16le", raw, 1, 2 * raw) if raw else None
        if sys.stdin is None or os.isatty(0):
            raise AudioError("standard input: a terminal gives no audio; write - behind a pipe, or with < FILE")

    def _decoder(self) -> "Decoder":
        return Decoder(io.FileIO(0, closefd=False), "standard input", self._track, self._raw)


def is_audio(path: Path) -> bool:
    """Can this file be transcribed? Its content decides, not its name."""
    try:
        with Decoder(open(path, "rb", buffering=0), "") as decoder:
            decoder.open()
    except (AudioError, OSError):
        return False
    return True


class Bytes:
    """An open file as PyAV reads it, without the header of WAV and without what follows its samples."""

    def __init__(self, file: io.FileIO, name: str):
        """`name`: FFmpeg recognizes a few formats by their ending only."""
        self.name, self._file = name, file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.head = b""  # bytes read from the file, but not yet by PyAV
        self._left: int | None = None  # bytes of samples left, by WAV's header
        self.on_disk = stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.tell() == 0
        self._seekable = self.on_disk

    def begin(self) -> wav.Wav | None:
        """Read a header of WAV, if there is one, and return its data. Raises AudioError for an empty file."""
        found, read = wav.read_header(self._take)
        if not read:
            raise AudioError(f"{self.name}: is empty")
        if found:
            self._left, self._seekable = found.size, False
        if self._seekable:
            self._file.seek(0)
        elif not found or not found.form:
            self.head = read  # FFmpeg needs it
        return found

    def rest(self) -> int:
        """Return the number of bytes from here to the end of a file on disk."""
        return os.fstat(self._file.fileno()).st_size - self._file.tell()

    def frames(self) -> int | None:
        """Return the number of frames by the header of an MP3 file, if it has one: FFmpeg may estimate the duration."""
        if not self._seekable:
            return None
        here = self._file.tell()
        self._file.seek(0)
        head = self._file.read(10)
        tag = 10 + sum((byte & 127) << 7 * (3 - n) for n, byte in enumerate(head[6:10]))
        self._file.seek(tag if head.startswith(b"ID3") else 0)
        head = self._file.read(2048)
        self._file.seek(here)
        at = max(head.find(b"Xing"), head.find(b"Info"))
        return int.from_bytes(head[at + 8 : at + 12]) if at >= 0 and head[at + 7] & 1 else None

    def seekable(self) -> bool:
        """May FFmpeg seek? PyAV calls this. Films may have their index at the end."""
        return self._seekable

    def read(self, count: int) -> bytes:
        """Return the next bytes, `count` at most; none at the end. PyAV calls this."""
        if self._left == 0:  # by the header, which may be wrong
            self.head = self.head or self._take(8)
            if wav.is_chunk(self.head):
                return b""
            self._left = None
        if self.head:
            data, self.head = self.head[:count], self.head[count:]
            return data
        data = self._file.read(count if self._left is None else min(count, self._left))
        if self._left is not None:
            self._left -= len(data)
        return data

    def _take(self, count: int) -> bytes:
        """Read `count` bytes, fewer only at the end."""
        data, self.head = self.head[:count], self.head[count:]
        while len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        return data


class Decoder:
    """One pass over an open file, which it closes: one track is decoded and placed in time."""

    def __init__(self, file: io.FileIO, name: str, track: str | None = None, raw: wav.Wav | None = None):
        """`name`: for messages. `raw`: the form of the samples, where there is no header."""
        self._name, self._track, self._raw = name, track, raw
        self._bytes = Bytes(file, name)
        self._container: av.container.InputContainer | None = None
        self._damaged, self._lost = 0, 0.0  # number of damaged parts, and their seconds
        self._reached = 0.0  # end of all tracks so far, in seconds
        self._broken_off = ""  # why it ends too early
        self._errors = 0  # errors that FFmpeg had reported at the last damaged part

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._container:
            self._container.close()
        self._bytes.close()

    def open(self) -> None:
        """Open the container and find the track. Raises AudioError where there is none."""
        options = {"protocol_whitelist": "none"}  # a playlist opens no other file
        try:
            form = self._raw or self._bytes.begin()
            rest = self._bytes.rest() if form and self._bytes.on_disk else None
            if form and form.form:
                options |= {"sample_rate": str(form.rate), "ch_layout": f"{form.channels}c", "probesize": "32"}
            elif form:
                options |= {"ignore_length": "1"}
            kind = {"format": form.form if form else None, "options": options}
            self._container = av.open(self._bytes, **kind, metadata_errors="replace", io_open=_refuse)
        except (av.error.FFmpegError, ValueError):
            raise self._not_audio() from None
        except OSError as error:
            raise AudioError(f"{self._name}: cannot be read ({error.strerror})") from None
        self._stream = self._choose()
        self._stream.codec_context.thread_count = 1
        self._set_durations(form, rest)

    def _not_audio(self) -> AudioError:
        if self._name == "standard input":
            return AudioError("standard input: not an audio stream, or damaged; for raw PCM16 give --raw RATE")
        return AudioError(f"{self._name}: not an audio file, or too damaged to be read")

    def _choose(self) -> av.AudioStream:
        """Return the requested track. Raises AudioError."""
        tracks, track = self._container.streams.audio, self._track
        if not tracks:
            raise AudioError(f"{self._name}: has no audio track")
        if track is None:
            chosen = next((s for s in tracks if s.disposition & av.stream.Disposition.default), tracks[0])
        else:
            codes = LANGUAGES.get(track.lower(), track.lower()).split()
            known = {str(n): stream for n, stream in enumerate(tracks, 1)}
            chosen = known.get(track) or next((s for s in tracks if (s.language or "").lower() in codes), None)
        if chosen is None:
            there = ", ".join(f"{n} ({stream.language or 'no language'})" for n, stream in known.items())
            raise AudioError(f"{self._name}: has no audio track {track}; there are: {there}")
        if chosen.codec_context is None:
            raise AudioError(f"{self._name}: its audio is of a kind that cannot be decoded")
        if chosen.rate not in RATES:
            raise self._not_audio()
        return chosen

    def _set_durations(self, form: wav.Wav | None, rest: int | None) -> None:
        """Set the duration in seconds, and the promised one, which is reliable; None where they are unknown.

        `rest`: number of bytes after the header of a WAV file on disk.
        """
        container, stream = self._container, self._stream
        start, kind = (container.start_time or 0) / av.time_base, container.format.name
        self._start = 0.0 if kind in FILMS and start < LATEST_START else start
        self.duration = container.duration / av.time_base if container.duration else None
        self._promised = None
        if form and form.form:
            size = form.size
            self.duration = None if rest is None else min(rest, size or rest) / form.bytes_a_second
            if size is not None and (size < wav.UNKNOWN or size <= (rest or 0)):
                self._promised = size / form.bytes_a_second
        elif kind == "mp3" and (frames := self._bytes.frames()):
            self._promised = frames * (1152 if stream.rate >= 32_000 else 576) / stream.rate
        elif kind in SURE:
            end = stream.duration and (stream.duration + (stream.start_time or 0)) * stream.time_base
            ends = [self.duration, float(end) - self._start if end else None]
            self._promised = min(filter(None, ends), default=None)

    def blocks(self) -> Iterator[bytes]:
        """Yield the track as AudioFile.blocks does. Raises AudioError."""
        timeline = Timed()
        while True:
            begun, self._errors = timeline.now, reported_errors()
            self.open()
            yield from self._decode(timeline)
            length = max(timeline.now - begun, self._reached)
            if self._promised and length < self._promised - max(SHORT, 0.01 * self._promised):
                self._broken_off = self._broken_off or f"it breaks off after {length:.1f} s of {self._promised:.1f}"
            if self._bytes.head[:4] not in wav.FORMS:
                break
            self._container.close()
        yield from timeline.flush()
        if not timeline.now:
            if not self._bytes.on_disk and self._container.format.name in FILMS:
                text = "cannot be read from a pipe, because its index is at its end; save it to a file first"
                raise AudioError(f"{self._name}: {text}")
            raise self._not_audio() if self._damaged else AudioError(f"{self._name}: holds no audio samples")
        damage = [self._broken_off] if self._broken_off else []
        if self._damaged:
            parts = f"{self._damaged} parts" if self._damaged > 1 else "one part"
            damage.insert(0, f"{max(self._lost, 0.1):.1f} s in {parts} could not be decoded")
        if damage:
            raise AudioError(f"{self._name}: damaged audio: {'; '.join(damage)}")

    def _packets(self) -> Iterator[av.Packet]:
        """Yield the packets of all tracks, as far as the container can be read."""
        tries = 0
        while True:
            try:
                for packet in self._container.demux():
                    tries = 0
                    yield packet
                return
            except av.error.InvalidDataError:
                tries += 1
                if tries == TRIES:
                    self._broken_off = "it cannot be read to its end"
                    return
            except (av.error.FFmpegError, OSError) as error:
                self._broken_off = f"it cannot be read to its end ({error.strerror})"
                return

    def _decode(self, timeline: "Timed") -> Iterator[bytes]:
        """Yield the track, each frame at its time, and count what cannot be decoded."""
        stream, kind = self._stream, self._container.format.name
        zero = shift = timeline.now - self._start  # from container time to ours; container time may start again
        failed, undecoded = 0, 0.0  # packets since the last good one, and their seconds
        size, time = 0, 0.0  # bytes and seconds of the good ones
        for packet in self._packets():
            if packet.stream_index != stream.index:
                if packet.pts is not None and packet.stream.type == "video":
                    self._reached = max(self._reached, float(packet.pts * packet.time_base) - self._start)
                continue
            length, late = float(packet.duration * packet.time_base) if packet.duration else 0.0, 0.0
            try:
                frames = packet.decode()
                size, time = size + packet.size, time + length
            except av.error.FFmpegError:
                frames = []
                if kind == "mp3" and any(tag in bytes(packet) for tag in TAGS):
                    late, self._errors = -length, reported_errors()  # no sound, no time
                else:
                    # A packet that is much too large contains several.
                    late = max(0.0, packet.size * time / size - length) if kind in COUNTED and size else 0.0
                    failed, undecoded = failed + 1, undecoded + length + late
            zero, shift = zero + late, shift + late
            for frame in frames:
                at = timeline.now if frame.time is None else frame.time + shift
                if shift != zero and frame.time is not None and frame.time + zero >= timeline.now - GAP:
                    shift, at = zero, frame.time + zero  # it was a wrong time
                longest = LONGEST_GAP if self.duration is None or shift > 0 else self.duration
                if not -JUMP <= at - timeline.now <= longest:
                    shift, at = shift + timeline.now - at, timeline.now
                damaged = failed > (0 if timeline.now else CUT_IN) or reported_errors() > self._errors
                gap = at - timeline.now
                if gap > (DAMAGED_GAP if damaged else GAP):
                    yield from timeline.silence(at)
                else:
                    gap = 0.0
                if damaged and (failed or gap):
                    self._count_damage(max(gap, undecoded))
                failed, undecoded = 0, 0.0
                yield from timeline.add(_samples(frame), frame.sample_rate)
        if failed:
            self._count_damage(undecoded)

    def _count_damage(self, seconds: float) -> None:
        self._damaged, self._lost, self._errors = self._damaged + 1, self._lost + seconds, reported_errors()


class Timed:
    """Converts samples of any form to PCM16 at 16 kHz, with silence where it is requested."""

    def __init__(self) -> None:
        self._form: tuple[int, int] | None = None  # rate and channels of the resampler's input
        self._begun = self._written = 0  # samples of output: when the resampler was made, and now
        self._taken = 0  # samples of input since the resampler was made
        self._waiting: list[np.ndarray] = []  # the last of them, not yet resampled

    @property
    def now(self) -> float:
        """Seconds so far."""
        return self._begun / RATE + (self._taken / self._form[0] if self._form else 0.0)

    def add(self, samples: np.ndarray, rate: int) -> Iterator[bytes]:
        """Add samples, float32 of shape (n, channels); yield PCM16 in pieces of about CHUNK_SECONDS."""
        form = rate, samples.shape[1]
        if form != self._form:
            yield from self.flush()
            self._form, self._resample = form, Resampler(rate)
        self._waiting.append(samples)
        self._taken += len(samples)
        if sum(map(len, self._waiting)) >= rate * CHUNK_SECONDS:
            yield self._out(self._resample(np.concatenate(self._waiting)))
            self._waiting = []

    def silence(self, until: float) -> Iterator[bytes]:
        """Fill up to `until` seconds."""
        yield from self.flush()
        missing = round(until * RATE) - self._written
        chunk = round(RATE * CHUNK_SECONDS)
        for at in range(0, missing, chunk):
            yield self._out(bytes(2 * min(chunk, missing - at)))
        self._begun = self._written

    def flush(self) -> Iterator[bytes]:
        """Yield what the resampler still holds."""
        if self._form:
            rest = self._waiting or [np.zeros((0, self._form[1]), np.float32)]
            yield self._out(self._resample(np.concatenate(rest), last=True))
        self._form, self._begun, self._taken, self._waiting = None, self._written, 0, []

    def _out(self, pcm: bytes) -> bytes:
        self._written += len(pcm) // 2
        return pcm


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """Return a frame's samples, float32 of shape (n, channels)."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype.kind == "f":
        return np.clip(np.nan_to_num(samples), -8, 8).astype(np.float32)
    middle = 128 if samples.dtype == np.uint8 else 0
    return (samples.astype(np.float32) - middle) / (np.iinfo(samples.dtype).max + 1 - middle)


def reported_errors() -> int:
    """Return how many errors FFmpeg has reported."""
    return av.logging.get_last_error()[0]


def _refuse(url: str, flags: int, options: dict) -> None:
    """A playlist may name any file or address; only the list itself is read."""
    raise ValueError(f"{url} is not opened")
