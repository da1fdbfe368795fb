"""Audio out of files and streams: everything that FFmpeg's libraries read, by PyAV, once from beginning to end.

Times are those of the container: where there is no sound (a track that starts late, a gap, damage) there is silence.
Damage is counted, and told at the end, when all that could be read has been yielded.
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

GAP = 0.1  # seconds between the container's clock and the samples that are no rounding or jitter
DAMAGED_GAP = 0.02  # the same behind damage
JUMP = 1.0  # so far back the clock has begun anew: one recording behind another
LONGEST_GAP = 3600.0  # seconds of silence that are believed where the container does not say how long it is
LATEST_START = 60.0  # a track starts so much after its film at most; a larger number is a clock of the day
SHORT = 0.5  # seconds that may be missing at the end
CUT_IN = 10  # packets at the beginning that refer to some before them, in a stream that was cut out of a longer one
TRIES = 100  # errors of a container one after the other
COUNTED = {"mp3", "aac", "ac3", "eac3", "dts"}  # without times: FFmpeg counts the frames that it finds
FILMS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
SURE = FILMS | {"flac", "aiff", "au"}  # say how long they are, and do not guess
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"Xing", b"Info", b"VBRI")  # between the frames of MP3
RATES = range(1000, 1_000_000)  # samples a second; others are damage
LANGUAGES = {"ar": "ara", "de": "ger deu", "en": "eng", "es": "spa", "fr": "fre fra", "hi": "hin", "it": "ita",
             "ja": "jpn", "ko": "kor", "nl": "dut nld", "pt": "por", "ru": "rus", "zh": "chi zho"}  # fmt: skip

av.logging.set_level(av.logging.ERROR)  # PyAV counts what FFmpeg complains about
logging.getLogger("libav").setLevel(logging.CRITICAL + 1)  # and nobody prints it


class AudioFile:
    """A file, or a pipe by its path. Raises AudioError, one line, where it cannot be audio.

    `track`: number of the audio track, from 1, or its language; by default the one that the file says.
    `endless`: a pipe or a device, which is read as it comes and may be ended at any time.
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
        """The duration as the file tells it, None where it does not. Raises AudioError where it is no audio."""
        if self.endless:
            return None
        with self._open() as file, Decoder(file, self.name, self._track) as decoder:
            decoder.open()
            if decoder.duration == 0:
                raise AudioError(f"{self.name}: holds no audio samples")
            return decoder.duration

    def blocks(self) -> Iterator[bytes]:
        """Yield the audio as 16 kHz mono PCM16 in pieces of about 0.1 s (3200 bytes), as it comes.

        Memory does not depend on the length. Raises AudioError where it is no audio, and at the end where it is
        damaged: all that could be decoded has been yielded by then, at its own time.
        """
        with self._open() as file, Decoder(file, self.name, self._track) as decoder:
            yield from decoder.blocks()

    def _open(self) -> io.FileIO:
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be read ({error.strerror})") from None


class StandardInput:
    """Audio from standard input, of any kind; with `raw`, PCM16 mono at so many samples a second. Raises AudioError."""

    name, seconds, endless = "-", None, True

    def __init__(self, raw: int | None = None, track: str | None = None):
        self._raw, self._track = raw, track
        if sys.stdin is None or os.isatty(0):
            raise AudioError("standard input: a terminal gives no audio; write - behind a pipe, or with < FILE")

    def blocks(self) -> Iterator[bytes]:
        """Yield 16 kHz mono PCM16 in pieces of about 0.1 s as it comes. Raises AudioError as AudioFile does."""
        raw = wav.Wav("s16le", self._raw, 1, 2 * self._raw) if self._raw else None
        with Decoder(io.FileIO(0, closefd=False), "standard input", self._track, raw) as decoder:
            yield from decoder.blocks()


AudioSource = AudioFile | StandardInput


def is_audio(path: Path) -> bool:
    """Can this file, found in a folder, be transcribed? Its content is asked, not its name."""
    try:
        with open(path, "rb", buffering=0) as file, Decoder(file, "") as decoder:
            decoder.open()
    except (AudioError, OSError):
        return False
    return True


class Bytes:
    """An open file as PyAV reads it. WAV's header is taken off, and so is what stands behind its sound."""

    def __init__(self, file: io.FileIO, name: str):
        """`name`: FFmpeg knows a few formats by their ending only."""
        self.name, self._file = name, file
        self._head = b""  # read from the file, not yet by PyAV
        self._left: int | None = None  # bytes of sound left, by WAV's header
        self.on_disk = stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.tell() == 0
        self._to_and_fro = self.on_disk

    def begin(self) -> wav.Wav | None:
        """Look at what comes; return what a header of WAV says."""
        found, read = wav.read_header(self._take)
        if not read:
            raise AudioError(f"{self.name}: is empty")
        self._left = found.size if found else None
        if found:
            self._to_and_fro = False
        if self._to_and_fro:
            self._file.seek(0)
        elif not found or not found.form:
            self._head = read  # FFmpeg needs it
        return found

    def another(self) -> bool:
        """Does another WAV file follow?"""
        return wav.is_another(self._head)

    def rest(self) -> int:
        """Return the bytes from here to the end of a file on disk."""
        return os.fstat(self._file.fileno()).st_size - self._file.tell()

    def frames(self) -> int | None:
        """Return how many frames this MP3 file has, where it says so; FFmpeg's duration may be a guess."""
        if not self._to_and_fro:
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

    # --- what PyAV calls ---

    def seekable(self) -> bool:
        """May FFmpeg go to and fro? Films keep their table of contents at the end."""
        return self._to_and_fro

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go elsewhere in a file on disk."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in a file on disk."""
        return self._file.tell()

    def read(self, count: int) -> bytes:
        """Return what there is, `count` bytes at most; nothing at the end."""
        if self._left == 0:  # by the header, which may be wrong
            self._head = self._head or self._take(8)
            if wav.is_chunk(self._head):
                return b""
            self._left = None
        if self._head:
            data, self._head = self._head[:count], self._head[count:]
            return data
        data = self._file.read(count if self._left is None else min(count, self._left))
        if self._left is not None:
            self._left -= len(data)
        return data

    def _take(self, count: int) -> bytes:
        """Read `count` bytes, fewer only at the end."""
        data, self._head = self._head[:count], self._head[count:]
        while len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        return data


class Decoder:
    """One pass over a file: the container is opened, one track decoded and placed in time."""

    def __init__(self, file: io.FileIO, name: str, track: str | None = None, raw: wav.Wav | None = None):
        """`name`: for messages. `raw`: how the samples are, where no header says it."""
        self._name, self._track, self._raw = name, track, raw
        self._bytes = Bytes(file, name)
        self._container: av.container.InputContainer | None = None
        self._places, self._lost = 0, 0.0  # where something was damaged, and for how many seconds
        self._reached = 0.0  # end of all tracks so far, in seconds
        self._trouble = ""  # why it ends before its end
        self._complaints = 0  # of FFmpeg, up to the last place that was damaged

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._container:
            self._container.close()

    def open(self) -> None:
        """Find the track. Raises AudioError where there is none."""
        try:
            form, options = (
                self._raw or self._bytes.begin(),
                {"protocol_whitelist": "none"},
            )  # a list opens no other file
            rest = self._bytes.rest() if form and self._bytes.on_disk else None
            if form and form.form:
                options |= {"sample_rate": str(form.rate), "ch_layout": f"{form.channels}c", "probesize": "32"}
            elif form:
                options |= {"ignore_length": "1"}
            self._container = av.open(
                self._bytes,
                format=form.form if form else None,
                options=options,
                metadata_errors="replace",
                io_open=_refuse,
            )
        except (av.error.FFmpegError, ValueError):
            raise self._stranger() from None
        except OSError as error:
            raise AudioError(f"{self._name}: cannot be read ({error.strerror})") from None
        self._stream = self._choose()
        self._stream.codec_context.thread_count = 1
        self._lengths(form, rest)

    def _stranger(self) -> AudioError:
        if self._name == "standard input":
            return AudioError("standard input: not an audio stream, or damaged; for raw PCM16 give --raw RATE")
        return AudioError(f"{self._name}: not an audio file, or too damaged to be read")

    def _choose(self) -> av.AudioStream:
        """Return the track that is asked for."""
        tracks, track = self._container.streams.audio, self._track
        if not tracks:
            raise AudioError(f"{self._name}: has no audio track")
        if track is None:
            chosen = next((s for s in tracks if s.disposition & av.stream.Disposition.default), tracks[0])
        else:
            wanted = LANGUAGES.get(track.lower(), track.lower()).split()
            known = {str(n): stream for n, stream in enumerate(tracks, 1)}
            chosen = known.get(track) or next((s for s in tracks if (s.language or "").lower() in wanted), None)
        if chosen is None:
            there = ", ".join(f"{n} ({stream.language or 'no language'})" for n, stream in known.items())
            raise AudioError(f"{self._name}: has no audio track {track}; there are: {there}")
        if chosen.codec_context is None:
            raise AudioError(f"{self._name}: its audio is of a kind that cannot be decoded")
        if chosen.rate not in RATES:
            raise self._stranger()
        return chosen

    def _lengths(self, form: wav.Wav | None, rest: int | None) -> None:
        """Note the duration in seconds, and the promised one, which can be believed; None where they are unknown.

        `rest`: bytes behind the header of a WAV file on disk.
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
            begun, self._complaints = timeline.now, complaints()
            self.open()
            yield from self._decode(timeline)
            length = max(timeline.now - begun, self._reached)
            if self._promised and length < self._promised - max(SHORT, 0.01 * self._promised):
                self._trouble = self._trouble or f"it breaks off after {length:.1f} s of {self._promised:.1f}"
            if not self._bytes.another():
                break
            self._container.close()
        yield from timeline.flush()
        if not timeline.now and not self._bytes.on_disk and self._container.format.name in FILMS:
            raise AudioError(f"{self._name}: has its index at its end, behind a pipe's reach; save it to a file first")
        if not timeline.now and self._places:
            raise self._stranger()
        if not timeline.now:
            raise AudioError(f"{self._name}: holds no audio samples")
        told = []
        if self._places:
            places = f"{self._places} places" if self._places > 1 else "one place"
            told.append(f"{max(self._lost, 0.1):.1f} s in {places} could not be decoded")
        if self._trouble:
            told.append(self._trouble)
        if told:
            raise AudioError(f"{self._name}: damaged audio: {'; '.join(told)}")

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
                    self._trouble = "it cannot be read to its end"
                    return
            except (av.error.FFmpegError, OSError) as error:
                self._trouble = f"it cannot be read to its end ({error.strerror})"
                return

    def _decode(self, timeline: "Timed") -> Iterator[bytes]:
        """Yield the track, each frame at its time, and count what cannot be decoded."""
        stream, mp3 = self._stream, self._container.format.name == "mp3"
        counted = self._container.format.name in COUNTED
        zero = shift = timeline.now - self._start  # from the container's clock to ours; it may begin anew
        failed, unheard = 0, 0.0  # packets since the last good one, and their seconds
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
                if mp3 and any(tag in bytes(packet) for tag in TAGS):
                    late, self._complaints = -length, complaints()  # no sound, no time
                else:
                    # One that is much too large is several, taken for one.
                    late = max(0.0, packet.size * time / size - length) if counted and size else 0.0
                    failed, unheard = failed + 1, unheard + length + late
            zero, shift = zero + late, shift + late
            for frame in frames:
                at = timeline.now if frame.time is None else frame.time + shift
                if shift != zero and frame.time is not None and frame.time + zero >= timeline.now - GAP:
                    shift, at = zero, frame.time + zero  # it was a wrong time
                if at < timeline.now - JUMP or not self._plausible(at - timeline.now, shift):
                    shift, at = shift + timeline.now - at, timeline.now
                damaged = failed > (0 if timeline.now else CUT_IN) or complaints() > self._complaints
                gap = at - timeline.now
                if gap > (DAMAGED_GAP if damaged else GAP):
                    yield from timeline.silence(at)
                else:
                    gap = 0.0
                if damaged and (failed or gap):
                    self._book(max(gap, unheard))
                failed, unheard = 0, 0.0
                yield from timeline.add(_samples(frame), frame.sample_rate)
        if failed:
            self._book(unheard)

    def _book(self, lost: float) -> None:
        """Note that so many seconds are damaged."""
        self._places, self._lost, self._complaints = self._places + 1, self._lost + lost, complaints()

    def _plausible(self, gap: float, shift: float) -> bool:
        """Is it to be believed that there is no sound for `gap` seconds?"""
        longest = LONGEST_GAP if self.duration is None or shift > 0 else self.duration
        return gap <= longest


class Timed:
    """Samples of any form in, PCM16 at 16 kHz out; silence where it is asked for."""

    def __init__(self) -> None:
        self._form: tuple[int, int] | None = None  # rate and channels of what the resampler takes
        self._begun = self._written = 0  # samples of output: when the resampler was made, and now
        self._taken = 0  # samples that it was given
        self._waiting: list[np.ndarray] = []  # the last of them
        self._count = 0  # how many these are

    @property
    def now(self) -> float:
        """Seconds so far."""
        return self._begun / RATE + (self._taken / self._form[0] if self._form else 0.0)

    def add(self, samples: np.ndarray, rate: int) -> Iterator[bytes]:
        """Take samples, float32 of shape (n, channels)."""
        form = rate, samples.shape[1]
        if form != self._form:
            yield from self.flush()
            self._form, self._resample = form, Resampler(rate)
        self._waiting.append(samples)
        self._count += len(samples)
        self._taken += len(samples)
        if self._count >= rate * CHUNK_SECONDS:
            yield self._out(self._resample(np.concatenate(self._waiting)))
            self._waiting, self._count = [], 0

    def silence(self, until: float) -> Iterator[bytes]:
        """Fill up to `until` seconds."""
        yield from self.flush()
        missing = round(until * RATE) - self._written
        chunk = round(RATE * CHUNK_SECONDS)
        for at in range(0, missing, chunk):
            yield self._out(bytes(2 * min(chunk, missing - at)))
        self._begun = self._written

    def flush(self) -> Iterator[bytes]:
        """Give what the resampler holds back."""
        if self._form:
            rest = self._waiting or [np.zeros((0, self._form[1]), np.float32)]
            yield self._out(self._resample(np.concatenate(rest), last=True))
        self._form, self._begun, self._taken, self._waiting, self._count = None, self._written, 0, [], 0

    def _out(self, pcm: bytes) -> bytes:
        self._written += len(pcm) // 2
        return pcm


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """Return a frame's samples, float32 of shape (n, channels)."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return np.clip(np.nan_to_num(samples), -8, 8).astype(np.float32)


def complaints() -> int:
    """Return how many errors FFmpeg has reported."""
    return av.logging.get_last_error()[0]


def _refuse(url: str, flags: int, options: dict) -> None:
    """A playlist may name any file or address; only the list itself is read."""
    raise ValueError(f"{url} is not opened")
