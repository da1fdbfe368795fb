"""Where the frames of a container belong, and their samples at 16 kHz with the silence between them."""

from collections.abc import Callable, Iterator

import numpy as np

from .audio import CHUNK_SECONDS, Resampler
from .protocol import RATE

# Seconds.
GAP = 0.1  # a smaller difference between container time and samples is rounding or jitter
DAMAGED_GAP = 0.02  # the same after damage
JUMP = 1.0  # a larger step back in container time: its time base starts again, for one recording after another
LONGEST_GAP = 3600.0  # longest silence that is plausible where the container does not give its duration


class Clock:
    """The gaps before frames, from the times in a container, which may be wrong or start again. All in seconds."""

    def __init__(self, start: float, now: float, duration: float | None, end: float | None):
        """`start`: container time at `now`. `duration` and `end` (of the output): of the recording, if known."""
        self._start = start
        self._zero = self._shift = now - start  # from container time to that of the output
        self._longest, self.end = duration or LONGEST_GAP, end or float("inf")

    def gap(self, time: float | None, now: float, damaged: bool, following: Callable[[], list[float]]) -> float:
        """Return the length of the silence before a frame with this container time, which would begin at `now`.

        `following`: by how much the frames after it are later in the container than in the output. They must confirm a
        jump: one wrong time has no effect.
        """
        smallest = DAMAGED_GAP if damaged else GAP
        gap = 0.0 if time is None else time + self._shift - now
        if -JUMP <= gap <= smallest:
            return 0.0
        votes = [abs(late + self._shift - gap) < abs(late + self._shift) for late in following()]
        if 2 * sum(votes) <= len(votes) and (votes or now + gap > self.end):
            return 0.0
        if self._shift != self._zero and -JUMP <= time + self._zero - now <= smallest:
            self._shift = self._zero  # it was a wrong time
            return 0.0
        if -JUMP <= gap <= self._longest and now + gap <= self.end:
            return gap
        self._shift -= gap
        if gap < 0 and abs(time - self._start) < JUMP:  # another recording
            self._zero, self._longest, self.end = self._shift, LONGEST_GAP, float("inf")
        return 0.0


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
