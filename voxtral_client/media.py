"""Audio from files and streams: everything that FFmpeg's libraries read, by PyAV, once from beginning to end.

Times are those of the container: where it has no sound (a track that starts late, a gap, damage) the output is silent.
Damage is counted, and reported at the end, after everything that could be read has been yielded.
"""

import io
import logging
import math
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path

import av
import numpy as np

from . import wav
from .clock import Clock, Timed
from .containers import TELEPHONE, TELEPHONE_RATE, Bytes, samples
from .damage import Damage, Usual
from .errors import AudioError
from .protocol import RATE

# Seconds, unless stated otherwise.
LATEST_START = 60.0  # a track does not start later than this after its film; a larger number is a time of day
SHORT = 0.5  # this much may be missing at the end
CUT_IN = 10  # packets at the beginning that refer to earlier ones, in a stream that was cut out of a longer one
CONFIRMING = 16  # frames that must confirm a jump in the container's times
TRIES = 100  # errors of a container one after another
COUNTED = {"mp3", "aac", "ac3", "eac3", "dts"}  # without times: FFmpeg counts the frames
FILMS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
SURE = FILMS | {"flac", "aiff", "au"}  # contain their duration; others are estimated
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"Xing", b"Info", b"VBRI")  # between the frames of MP3
RATES = range(1000, 1_000_000)  # plausible sample rates
LANGUAGES = {"ar": "ara", "de": "ger deu", "en": "eng", "es": "spa", "fr": "fre fra", "hi": "hin", "it": "ita",
             "ja": "jpn", "ko": "kor", "nl": "dut nld", "pt": "por", "ru": "rus", "zh": "chi zho"}  # fmt: skip

logging.getLogger("libav").setLevel(logging.CRITICAL + 1)  # what FFmpeg reports is counted, not printed
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)
# Endings that are not part of a recording's name, as "2024" is in "call 24.12.2024".
ENDINGS = set(TELEPHONE) | {
    f".{ending}" for name in av.formats_available for ending in av.format.ContainerFormat(name).extensions
}


class AudioFile:
    """A file, or a pipe by its path. Raises AudioError, one line, where it cannot be read.

    `track`: number of the audio track, from 1, or its language; by default the file's default track.
    `endless`: a pipe or a device, which is read as it comes and may end at any time.
    `hours`: a longer file is refused where its own data say so, else when it becomes longer.
    """

    hours = math.inf

    def __init__(self, path: str | Path, track: str | None = None):
        self.name, self.path, self._track = str(path), Path(path), track
        missing = "is a link without a target" if self.path.is_symlink() else "no such file"
        try:
            mode = self.path.stat().st_mode
        except OSError as error:
            reason = missing if isinstance(error, FileNotFoundError) else error.strerror
            raise AudioError(f"{path}: {reason}") from None
        self.endless = stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)

    @cached_property
    def seconds(self) -> float | None:
        """The duration by the file's own data in seconds, None where it has none. Raises AudioError."""
        if self.endless:
            return None
        with self._decoder() as decoder:
            decoder.open()
            if decoder.duration == 0:
                raise AudioError(f"{self.name}: holds no audio samples")
            if (decoder.duration or 0) > 3600 * self.hours:
                raise self._too_long()
            return decoder.duration

    def blocks(self) -> Iterator[bytes]:
        """Yield the audio as 16 kHz mono PCM16 in pieces of about 0.1 s (3200 bytes), as it comes.

        Memory does not depend on the length. Raises AudioError where it is not audio, and at the end where it is
        damaged: everything that could be decoded has been yielded by then, at its own time.
        """
        size = 0
        with self._decoder() as decoder:
            for block in decoder.blocks():
                size += len(block)
                if size > 2 * RATE * 3600 * self.hours:
                    raise self._too_long()
                yield block

    def _too_long(self) -> AudioError:
        return AudioError(f"{self.name}: is longer than {self.hours:g} hours")

    def _decoder(self) -> "Decoder":
        try:
            return Decoder(open(self.path, "rb", buffering=0), self.name, self._track)
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be read ({error.strerror})") from None


class StandardInput(AudioFile):
    """Audio of any kind from standard input; with `raw`, PCM16 mono at that sample rate. Raises AudioError."""

    def __init__(self, raw: int | None = None, track: str | None = None):
        self.name, self.endless, self._track = "-", True, track
        self._raw = raw
        if sys.stdin is None or os.isatty(0):
            raise AudioError("standard input: a terminal gives no audio; write - after a pipe, or with < FILE")

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


class Decoder:
    """One pass over an open file, which it closes: one track is decoded and placed in time."""

    def __init__(self, file: io.FileIO, name: str, track: str | None = None, raw: int | None = None):
        """`name`: for messages. `raw`: the rate of PCM16 without a header."""
        self._name, self._track, self._raw = name, track, raw
        self._bytes = Bytes(file, name)
        self._container: av.container.InputContainer | None = None
        self._damage = Damage()
        self._first = True  # of the recordings in this file
        self._reached = 0.0  # end of all its tracks so far, in seconds
        self._capture = av.logging.Capture()  # of this thread

    def __enter__(self) -> "Decoder":
        self._errors = self._capture.__enter__()  # what FFmpeg has reported since the last frame
        return self

    def __exit__(self, *exception: object) -> None:
        if self._container:
            self._container.close()
        self._bytes.close()
        self._capture.__exit__(*exception)

    def open(self) -> None:
        """Open the container and find the track. Raises AudioError where there is none."""
        try:
            form = samples("s16le", self._raw) if self._raw else self._bytes.begin()
            if not form and (kind := TELEPHONE.get(Path(self._name).suffix.lower())):
                form = samples(kind, TELEPHONE_RATE)
            rest = self._bytes.rest() if self._bytes.on_disk else None
            # A playlist opens no other file.
            form["options"] = form.get("options", {}) | {"protocol_whitelist": "none"}
            self._container = av.open(self._bytes, metadata_errors="replace", **form)
        except (av.error.FFmpegError, ValueError):
            raise self._not_audio() from None
        except OSError as error:
            raise AudioError(f"{self._name}: cannot be read ({error.strerror})") from None
        self._stream = self._choose()
        self._stream.codec_context.thread_count = 1
        self._set_durations("format" in form, rest)

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

    def _set_durations(self, bare: bool, rest: int | None) -> None:
        """Set the duration in seconds, and the promised one, which is reliable; None where they are unknown.

        `bare`: the samples come without a container. `rest`: number of bytes after the header of a file on disk.
        """
        container, stream = self._container, self._stream
        start, kind = (container.start_time or 0) / av.time_base, container.format.name
        late = kind in FILMS and start < LATEST_START and self._first  # the sound of a film may start later
        self._start = 0.0 if late else start
        self.duration = container.duration / av.time_base if container.duration else None
        self._promised = None
        if bare:
            size, bytes_a_second = self._bytes.size, stream.codec_context.bit_rate / 8
            self.duration = None if rest is None else min(rest, size or rest) / bytes_a_second
            if size and (size < wav.UNKNOWN or size <= (rest or 0)):
                self._promised = size / bytes_a_second
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
            begun = timeline.now
            self.open()
            self._errors.clear()
            yield from self._decode(timeline)
            length = max(timeline.now - begun, self._reached)
            if self._promised and length < self._promised - max(SHORT, 0.01 * self._promised):
                self._damage.breaks_off(f"it breaks off after {length:.1f} s of {self._promised:.1f}")
            if not self._bytes.next():
                break
            self._container.close()
            self._first, self._reached = False, 0.0
        yield from timeline.flush()
        if not timeline.now:
            if not self._bytes.on_disk and self._container.format.name in FILMS:
                text = "cannot be read from a pipe, because its index is at its end; save it to a file first"
                raise AudioError(f"{self._name}: {text}")
            raise self._not_audio() if self._damage.parts else AudioError(f"{self._name}: holds no audio samples")
        if damage := str(self._damage):
            raise AudioError(f"{self._name}: damaged audio: {damage}")

    def _packets(self) -> Iterator[av.Packet]:
        """Yield the track's packets, as far as the container can be read."""
        tries = 0
        while True:
            try:
                for packet in self._container.demux():
                    tries = 0
                    if packet.stream_index == self._stream.index:
                        yield packet
                    elif packet.pts is not None and packet.stream.type == "video":
                        self._reached = max(self._reached, float(packet.pts * packet.time_base) - self._start)
                return
            except av.error.InvalidDataError:
                tries += 1
                if tries == TRIES:
                    self._damage.breaks_off("it cannot be read to its end")
                    return
            except (av.error.FFmpegError, OSError) as error:
                self._damage.breaks_off(f"it cannot be read to its end ({error.strerror})")
                return

    def _frames(self) -> Iterator["Decoded"]:
        """Decode the track, and count what cannot be decoded at its end."""
        kind = self._container.format.name
        usual = Usual()
        failed, lost, late, begun = 0, 0.0, 0.0, False  # `late`: of the container's times after damage, in seconds
        for packet in self._packets():
            length = float(packet.duration * packet.time_base) if packet.duration else 0.0
            try:
                frames = packet.decode()
                usual.add(packet.size, length)
            except av.error.FFmpegError:
                frames = []
                if kind == "mp3" and any(tag in bytes(packet) for tag in TAGS):
                    late -= length  # no sound, no time
                    self._errors.clear()
                else:
                    more = usual.excess(packet.size, length) if kind in COUNTED else 0.0
                    failed, lost, late = failed + 1, lost + length + more, late + more
            for frame in frames:
                damaged = failed > (0 if begun else CUT_IN) or bool(self._errors)
                at = None if frame.time is None else frame.time + late
                yield Decoded(frame, at, frame.samples / frame.sample_rate, lost if failed else None, damaged)
                self._errors.clear()
                failed, lost, begun = 0, 0.0, True
        if failed:
            self._damage.add(lost)

    def _decode(self, timeline: Timed) -> Iterator[bytes]:
        """Yield the track, each frame at its time."""
        clock = Clock(
            self._start, timeline.now, self.duration, self._promised and timeline.now + self._promised + SHORT
        )
        frames, ahead, damaged, silence = self._frames(), deque(), False, 0.0

        def following() -> list[float]:
            ahead.extend(islice(frames, CONFIRMING - len(ahead)))
            ends = accumulate((each.seconds for each in ahead), initial=timeline.now + decoded.seconds)
            return [each.time - end for each, end in zip(ahead, ends, strict=False) if each.time is not None]

        while decoded := ahead.popleft() if ahead else next(frames, None):
            damaged = damaged or decoded.damaged
            gap = clock.gap(decoded.time, timeline.now, damaged, following)
            if gap:
                yield from timeline.silence(timeline.now + gap)
                silence += gap
            if damaged and (gap or decoded.lost is not None):
                self._damage.add(max(gap, decoded.lost or 0.0))
                damaged = False
            yield from timeline.add(_samples(decoded.frame), decoded.frame.sample_rate)
        if silence and timeline.now > clock.end:
            self._damage.breaks_off(f"its times contradict each other: {silence:.1f} s of silence may be too much")


@dataclass
class Decoded:
    """A decoded frame. `time`: by the container, and `seconds`: its length, both in seconds.

    `lost`: seconds of the packets before it that could not be decoded, if any. `damaged`: the decoder complained.
    """

    frame: av.AudioFrame
    time: float | None
    seconds: float
    lost: float | None
    damaged: bool


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """Return a frame's samples, float32 of shape (n, channels)."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype.kind == "f":
        return np.clip(np.nan_to_num(samples), -8, 8).astype(np.float32)
    middle = 128 if samples.dtype == np.uint8 else 0
    return (samples.astype(np.float32) - middle) / (np.iinfo(samples.dtype).max + 1 - middle)
