"""How loud the audio is, what of it is silence, and where in it a word is. All positions are in samples."""

import numpy as np

from .protocol import FRAME, RATE

HOP = 320  # samples of one level reading: 20 ms
PAUSE = 3 * FRAME  # silence required on both sides of a point in a pause
RECENT = 30 * RATE  # the noise is measured in so much audio
NEAR = RATE // 2  # next to a pause, or before a word's end, loud sound within this distance is the voice
BREATH_DB = 35.0  # so far below the voice is only breath, and a word's soft beginning and tail
SOFT = RATE // 5 // HOP  # longest soft beginning or tail of a word, in readings
MAX_WORD = 2 * RATE  # longest word in the search for its start
FLOOR_DB = -65.0  # everything below is silence: the noise of a quiet microphone


class Levels:
    """The level of each 20 ms of audio in dB of full scale."""

    def __init__(self) -> None:
        self._db, self._start = np.empty(0), 0  # readings, and the position of the first
        self._rest = b""  # less than a reading
        self._measured = 0  # end of the audio in which the noise was measured
        self._floor = self._edge = self._loud = FLOOR_DB

    @property
    def end(self) -> int:
        """End of the audio so far."""
        return self._start + len(self._db) * HOP + len(self._rest) // 2

    def add(self, pcm: bytes) -> None:
        """Append PCM16 bytes, 16 kHz mono (an even number)."""
        pcm = self._rest + pcm
        whole = len(pcm) // (2 * HOP) * 2 * HOP
        self._rest = pcm[whole:]
        samples = np.frombuffer(pcm[:whole], "<i2").reshape(-1, HOP) / 32768
        power = np.einsum("ij,ij->i", samples, samples) / HOP  # half the time of square and mean
        self._db = np.concatenate([self._db, 10 * np.log10(power + 1e-10)])
        if self.end - self._measured >= RATE // 2:
            self._measure()

    def discard(self, before: int) -> None:
        """Forget the audio before a position that the noise is not measured in."""
        excess = (before - RECENT - self._start) // HOP
        if excess > 0:
            self._db, self._start = self._db[excess:], self._start + excess * HOP

    def readings(self, start: int, end: int) -> np.ndarray:
        """Return the level readings in dB within [start, end), shape (n,)."""
        first = max(0, -(-(start - self._start) // HOP))
        return self._db[first : max(first, (end - self._start) // HOP)]

    def sound(self, start: int, end: int) -> float:
        """Return the seconds of sound above the noise within [start, end)."""
        noise = max(self._floor, self._loud - BREATH_DB)
        return np.count_nonzero(self.readings(start, end) > noise) * HOP / RATE

    def pause(self, point: int) -> bool:
        """Is the audio around `point` silent? Audio that has not come yet counts as silent."""
        peak = self.readings(point - PAUSE, point + PAUSE).max(initial=FLOOR_DB)
        if peak <= self._floor:
            return True
        voice = min(self._voice(point - PAUSE - NEAR, point), self._voice(point, point + PAUSE + NEAR))
        return bool(peak <= voice - BREATH_DB)

    def longest_pause(self, start: int, end: int) -> int:
        """Return the middle of the longest of the quietest pauses within [start, end), which holds at least one."""
        count = 2 * PAUSE // HOP
        loudest = np.lib.stride_tricks.sliding_window_view(self.readings(start, end), count).max(axis=1)
        quiet = np.concatenate([[False], loudest <= max(loudest.min() + 3, FLOOR_DB), [False]])
        runs = np.flatnonzero(np.diff(quiet)).reshape(-1, 2)
        first, last = runs[np.diff(runs).argmax()]
        return start + (int(first + last) // 2 + count // 2) * HOP

    def quietest(self, start: int, end: int) -> tuple[float, int]:
        """Return level and position of the quietest reading within [start, end)."""
        readings = self.readings(start, end)
        if not len(readings):
            return 0.0, end
        quietest = int(readings.argmin())
        return float(readings[quietest]), -(-start // HOP) * HOP + quietest * HOP

    def word(self, earliest: int, marked: int) -> tuple[int, int]:
        """Return start and end of the word whose end the model marked in the frame that ends at `marked`.

        The mark is in the frame in which the word ends, or in the one before or after it. The end is where the sound
        becomes silent near the middle of that frame, or that middle. The start, not before `earliest`, is where the
        sound before the end began. Soft beginnings and tails belong to the word.
        """
        first = -(-max(earliest, marked - MAX_WORD, self._start) // HOP) * HOP
        levels = self.readings(first, marked + 2 * FRAME)
        loud = levels > max(self._edge, self._voice(marked - NEAR, marked) - BREATH_DB)
        expected = max(1, min((marked - FRAME // 2 - first) // HOP, len(levels)))  # index of what follows the word
        falls = np.flatnonzero(loud[:-1] & ~loud[1:]) + 1
        near, before = falls[abs(falls - expected) <= 2 * FRAME // HOP], falls[falls < expected]
        start = stop = int(near[abs(near - expected).argmin()]) if len(near) else expected
        if not len(near) and len(before) and not loud[before[-1] : expected].any():
            start = int(before[-1])
        while start > 0 and loud[max(0, start - 7) : start].any():  # less than 140 ms of silence: a plosive
            start -= 1
        while start < stop - 1 and not loud[start]:
            start += 1
        if len(near):
            stop += _soft(levels[stop - 1 :], self._edge)
            start -= _soft(levels[start::-1], self._edge)
        end = max(first + stop * HOP, earliest + HOP)
        return max(earliest, min(first + start * HOP, end - HOP)), end

    def _voice(self, start: int, end: int) -> float:
        """Return the level of the loud parts of [start, end), infinite where there is no audio."""
        readings = self.readings(start, end)
        return _shares(readings, 0.95)[0] if len(readings) else np.inf

    def _measure(self) -> None:
        """Measure the levels below which sound counts as silence.

        `_floor`: at most 8 dB above the noise floor, less where speech is little louder, but above what steady noise
        varies. Loud sound, for example a tone, has no effect. `_edge`: for the begin and end of a word. In steady noise
        it is nearer to the floor.
        """
        self._measured = self.end
        lowest, floor, self._loud = _shares(self._db[-RECENT // HOP :], 0.02, 0.1, 0.95)
        rise = min(8, max(2, 0.4 * (self._loud - floor)))
        self._floor = max(FLOOR_DB, floor + rise)
        self._edge = max(FLOOR_DB, floor + min(rise, 2 + 6 * (floor - lowest)))


def _soft(levels: np.ndarray, floor: float) -> int:
    """Return how many readings after the first belong to the same sound: it falls until it meets the floor."""
    same = (levels[1 : SOFT + 1] > floor) & (np.diff(levels[: SOFT + 1]) < 3)
    return int(np.argmin(np.append(same, False)))


def _shares(levels: np.ndarray, *shares: float) -> list[float]:
    """Return the levels below which these shares of all levels are. np.percentile's checks take longer than this."""
    ordered = np.sort(levels)
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in shares]
