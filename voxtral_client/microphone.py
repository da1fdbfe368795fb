"""Input devices, and the microphone as a stream that continues after the device was unplugged. Needs PortAudio.

An unplugged device looks different from system to system: the stream finishes without an error, or it stays active
but no more blocks come. Both are detected. Streams are aborted, never stopped: stopping waits for the device.
"""

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import numpy as np

from .audio import CHUNK_SECONDS, Resampler
from .errors import AudioError
from .protocol import RATE

IDLE_SECONDS = 2.0  # without a block for this time, the device is gone
LOOKS = 4  # parts of that time: a suspended program looks once after it continues, before the waiting blocks are in
RETRY_SECONDS = 1.0
BACKLOG = 300  # blocks that wait while this process is busy: 30 s
SILENT_SECONDS = 10.0  # silence that is reported
SILENT_DB = -60.0  # a quiet room through a working microphone is louder

try:
    import sounddevice
except Exception as error:  # PortAudio is missing (OSError), or does not start
    sounddevice = error


@dataclass(frozen=True)
class Device:
    """An input device. `rate`: samples a second; `index`: PortAudio's number for it; `source`: PulseAudio's name."""

    number: int
    name: str
    host: str
    channels: int
    rate: int
    index: int
    source: str = ""


def silence_libraries() -> None:
    """Discard what ALSA, JACK and PortAudio print on stderr. Python's `sys.stderr` stays."""
    if sys.platform != "linux":
        return
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def devices(rescan: bool = False) -> list[Device]:
    """Return the input devices, on Linux with the sources of PulseAudio or PipeWire, which PortAudio does not list.

    `rescan` finds new devices; no stream may be open. Raises AudioError without PortAudio.
    """
    if isinstance(sounddevice, OSError):
        raise AudioError("PortAudio is missing; apt install libportaudio2 (Fedora: dnf install portaudio)")
    if isinstance(sounddevice, Exception):
        raise AudioError(f"PortAudio does not start: {sounddevice}")
    if rescan:  # PortAudio looks for devices only when it starts
        with contextlib.suppress(sounddevice.PortAudioError):
            while sounddevice._initialized:
                sounddevice._terminate()
            sounddevice._initialize()
    if not sounddevice._initialized:
        return []
    hosts, found = sounddevice.query_hostapis(), []
    for entry in sounddevice.query_devices():
        index, host, channels = entry["index"], entry["hostapi"], entry["max_input_channels"]
        # Windows lists each device once for each of four hosts.
        if channels and (sys.platform != "win32" or host == sounddevice.default.hostapi):
            rate = round(entry["default_samplerate"])
            found.append(Device(index, entry["name"], hosts[host]["name"], channels, rate, index))
    for pulse in [device for device in found if device.name == "pulse" and device.host == "ALSA"]:
        for number, name in enumerate(_pulse_sources(), found[-1].number + 1):
            found.append(replace(pulse, number=number, name=name, host="PulseAudio", source=name))
    return found


def _pulse_sources() -> list[str]:
    command = ["pactl", "list", "short", "sources"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # OSError: there is no pactl
        lines = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.splitlines()
        return [line.split("\t")[1] for line in lines if line.count("\t")]
    return []


def choose(wanted: str | None, found: list[Device]) -> Device:
    """Return the device whose number, name or part of a name is `wanted`; the system's default for None.

    Raises AudioError where there is none, or more than one.
    """
    if not found:
        raise AudioError("no input device; plug one in or allow this program to use it in the system's settings")
    if wanted is None:
        return next((device for device in found if device.index == sounddevice.default.device[0]), found[0])
    if wanted.isdigit():
        matches = [device for device in found if device.number == int(wanted)]
    else:
        matches = [device for device in found if wanted.lower() in device.name.lower()]
        matches = [device for device in matches if device.name.lower() == wanted.lower()] or matches
    if not matches:
        raise AudioError(f"--device {wanted}: no such input device; --list-devices shows them")
    if len(matches) > 1:
        names = " and ".join(f"{device.name} ({device.number})" for device in matches)
        raise AudioError(f"--device {wanted}: matches {names}; give more of the name, or the number")
    return matches[0]


class Microphone:
    """Audio of one input device. Raises AudioError where there is no such device.

    `level`: of the last block, in dB relative to full scale. `dropped`: number of blocks (0.1 s) that were lost
    because this process was busy. `connected`: is the device available? `missing`: spans (start, end) of the audio, in
    seconds, in which it was not: they are silent. `say` receives messages for the user.
    """

    def __init__(self, wanted: str | None, channels: int | None, say: Callable[[str], None]):
        """`wanted`: see `choose`. `channels`: how many to record and mix down (default: one, if the device can)."""
        self.device = choose(wanted, devices())
        self.level, self.dropped, self.connected = -100.0, 0, False
        self._named, self._channels, self._say = wanted is not None, channels, say
        self._end = 0.0  # time at which the audio so far ends, while the device is away
        self.missing: list[tuple[float, float]] = []
        self._silence, self._reported, self._look_again, self._samples = 0.0, 0, 0.0, 0

    async def chunks(self, stop: asyncio.Event) -> AsyncIterator[bytes]:
        """Yield 16 kHz mono PCM16 in pieces of about 0.1 s until `stop` is set.

        While the device is away, silence comes at the same pace. Raises AudioError if the device cannot be opened at
        first.
        """
        capture, away = _Capture(self.device, self._channels), False
        self.connected, self._end = True, time.monotonic()  # it may go away before its first block
        try:
            while not stop.is_set():
                if pcm := await capture.read():
                    if away:
                        yield self._counted(self._silence_until(capture.first))
                        away = False
                    self._watch(pcm)
                    yield self._counted(pcm)
                if capture.gone or await self._moved():
                    yield self._counted(capture.close())
                    self.connected, self.level, away = False, -100.0, True
                    self._end = capture.last or self._end
                    self.missing.append((self._samples / RATE, self._samples / RATE))
                    self._say(f"{self.device.name} is gone: waiting until it is back (the session stays open)")
                    while not (self.connected or stop.is_set()):
                        capture = self._reopened() or capture
                        yield self._counted(self._silence_until(time.monotonic()))
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(0 if self.connected else RETRY_SECONDS):
                                await stop.wait()
                self._count(capture)
        finally:
            capture.close()

    def _counted(self, pcm: bytes) -> bytes:
        self._samples += len(pcm) // 2
        return pcm

    def _silence_until(self, moment: float) -> bytes:
        """Return the silence from the end of the audio to `moment`, both of `time.monotonic()`: it is missing."""
        count = max(0, round((moment - self._end) * RATE))
        self._end += count / RATE
        self.missing[-1] = self.missing[-1][0], self.missing[-1][1] + count / RATE
        return bytes(2 * count)

    async def _moved(self) -> bool:
        """Has PulseAudio moved the stream to another source, because its own went away? It reports no error."""
        if not self.device.source or time.monotonic() < self._look_again:
            return False
        self._look_again = time.monotonic() + IDLE_SECONDS
        return self.device.source not in await asyncio.to_thread(_pulse_sources)

    def _reopened(self) -> "_Capture | None":
        """Open the device, or the default one if none was named; return None if it is still away."""
        with contextlib.suppress(AudioError):
            found, old = devices(rescan=True), self.device
            if self._named:  # by its name: numbers change when devices come and go
                found = [device for device in found if (device.name, device.host) == (old.name, old.host)]
            self.device = choose(None, found)
            capture = _Capture(self.device, self._channels)
            self.connected = True
            self._say(f"{self.device.name} is back")
            return capture
        return None

    def _watch(self, pcm: bytes) -> None:
        """Measure the level; report each long silence once."""
        samples = np.frombuffer(pcm, "<i2") / 32768
        self.level = max(-100.0, 10 * float(np.log10(np.square(samples).mean() + 1e-12)))
        before = self._silence
        self._silence = before + len(samples) / RATE if self.level < SILENT_DB else 0.0
        if before < SILENT_SECONDS <= self._silence:
            self._say(
                f"nothing heard for {SILENT_SECONDS:.0f} s from {self.device.name} (level {self.level:.0f} dB): "
                "is it muted, is it the right one? --list-devices shows the others"
            )

    def _count(self, capture: "_Capture") -> None:
        """Count dropped blocks; report the first, tenth, hundredth, ... one."""
        self.dropped, capture.dropped = self.dropped + capture.dropped, 0
        if self.dropped >= max(1, 10 * self._reported):
            self._reported = self.dropped
            self._say(f"{self.dropped} blocks of audio lost so far: this machine is too busy")


class _Capture:
    """One open stream: blocks from PortAudio's thread wait in a bounded queue. Raises AudioError.

    `dropped`: number of lost blocks.
    """

    def __init__(self, device: Device, channels: int | None):
        self._over, self.dropped = False, 0
        self.first = self.last = 0.0  # times at which its audio begins and ends
        self._blocks: deque[np.ndarray] = deque()
        self._more, self._loop = asyncio.Event(), asyncio.get_running_loop()
        if device.source:
            os.environ["PULSE_SOURCE"] = device.source
        counts = [channels] if channels else [1, device.channels]
        settings = {"device": device.index, "dtype": "float32"}
        settings |= {"callback": self._called, "finished_callback": self._finished}
        for rate, count in itertools.product((RATE, device.rate), counts):
            with contextlib.ExitStack() as failed:
                try:
                    block = round(rate * CHUNK_SECONDS)
                    self._stream = sounddevice.InputStream(rate, block, channels=count, **settings)
                    failed.callback(self._stream.close)
                    self._stream.start()
                    failed.pop_all()
                    break
                except sounddevice.PortAudioError as error:
                    reason = error.args[0].partition(": ")[2] or error.args[0]
        else:
            requested = f" with {channels} channels" if channels else ""
            raise AudioError(f"{device.name}: cannot be opened{requested} ({reason})")
        self._convert = Resampler(rate)

    @property
    def gone(self) -> bool:
        """Has the device gone, and has all its audio been read?"""
        return self._over and not self._blocks

    def _called(self, block: np.ndarray, frames: int, when: object, status: object) -> None:
        """Receive a block, float32 of shape (frames, channels). PortAudio calls this in its own thread."""
        self.dropped += bool(status.input_overflow)
        self.last = time.monotonic()
        self.first = self.first or self.last - CHUNK_SECONDS
        if len(self._blocks) < BACKLOG:
            self._blocks.append(block.copy())
        else:
            self.dropped += 1
        self._loop.call_soon_threadsafe(self._more.set)

    def _finished(self) -> None:
        self._over = True
        self._loop.call_soon_threadsafe(self._more.set)

    async def read(self) -> bytes:
        """Return the next piece as PCM16; b"" where there is none: `gone` is then true if there will be none."""
        for _ in range(LOOKS):
            if self._blocks or self._over:
                break
            self._more.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SECONDS / LOOKS):
                    await self._more.wait()
        else:
            self._over = not self._blocks
        return self._convert(self._blocks.popleft()) if self._blocks else b""

    def close(self) -> bytes:
        """Release the device, once; return the rest of the audio, which the resampler holds."""
        if self._stream.closed:
            return b""
        self._stream.abort()
        self._stream.close()
        return self._convert(np.zeros((0, 1), np.float32), last=True)
