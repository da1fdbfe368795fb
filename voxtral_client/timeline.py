"""State of one transcription: audio received, transcribed and committed; partial and final words. No I/O, no timers.

Positions are in samples of the input at 16 kHz, from its very first sample, across all sessions:

    0 ------------- committed ------------- transcribed ------------- received
      words final,            words partial: a            sent or waiting
      audio discarded         new session replaces them   to be sent

One delta is one frame of 80 ms (vLLM counts them the same in `usage.completion_tokens`). The prompt contains the
model's delay, so delta k of a session, counted from 0, transcribes the audio that ends 0.08 (k + 1) s after the
session's first sample, whatever `transcription_delay_ms` is: the client does not need the delay.

A commit point is in a pause: the audio around it is silent, and the model has had 0.32 s to write everything before it.
A new session from there begins with a complete word.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .protocol import FRAME, RATE

HOP = 320  # samples of one level reading: 20 ms
MARGIN = 4 * FRAME  # the model begins to write a word 0.01 to 0.2 s after its end, then one piece a frame
PAUSE = 3 * FRAME  # silence required on both sides of a commit point
MAX_PARTIAL = 30 * RATE  # audio without a pause that is not committed yet: more is committed between two words
WORDLESS_SECONDS = 1.5  # sound without a word that may be a cough; more is committed only if a second session agrees
NEAR = RATE // 2  # next to a pause, or before a word's end, loud sound within this distance is the voice
MAX_WORD = 2 * RATE  # longest word in the search for its start
FLOOR_DB = -65.0  # everything below is silence: the noise of a quiet microphone
# Chinese and Japanese are written without spaces; Korean, whose characters are as wide, is not.
UNSPACED = re.compile(
    "[\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Word:
    """A word, or a run of text in scripts without spaces.

    `text` begins with the space before the word, so that the transcript is the concatenation of all texts.
    `start`, `end`: seconds of the input. `session`: number of the session that transcribed it, from 1.
    """

    text: str
    start: float
    end: float
    session: int


class Timeline:
    """See the module's docstring. Input: audio by `add_audio`, deltas by `add_delta`. Output: `take`, `partial`."""

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        """`numbers`: source of the sessions' numbers, if several timelines share it."""
        self._numbers = numbers or itertools.count(1)
        self.committed = 0  # text before this sample is final
        self.session = 0  # number of the current session
        self.partial: list[Word] = []  # words after `committed`: a new session would replace them
        self._final: list[Word] = []  # final words not yet taken
        self._last_char = ""  # of the final text
        self._pcm, self._pcm_start = bytearray(), 0
        self._levels: list[float] = []
        self._levels_start = 0  # position of the first level reading
        self._floor, self._edge, self._noise_at = FLOOR_DB, FLOOR_DB, -RATE
        self._last_end = 0  # end of the last final word
        self._origin = self._frames = 0
        self._last_text = 0  # position of the last delta with text
        self._blanks: tuple[int, int] | None = None  # audio without words that a second session must confirm

    # --- audio ---

    @property
    def received(self) -> int:
        """End of the audio so far, in samples."""
        return self._pcm_start + len(self._pcm) // 2

    @property
    def transcribed(self) -> int:
        """End of the audio that the current session has transcribed, in samples."""
        return self._origin + self._frames * FRAME

    @property
    def session_length(self) -> int:
        """Number of samples that the current session has transcribed."""
        return self._frames * FRAME

    def add_audio(self, pcm: bytes) -> None:
        """Append PCM16 bytes, 16 kHz mono (an even number)."""
        self._pcm += pcm
        start = self._levels_start + len(self._levels) * HOP
        count = (self.received - start) // HOP
        if count > 0:
            samples = np.frombuffer(self.audio(start, count * HOP), "<i2").astype(np.float32) / 32768
            power = np.square(samples.reshape(count, HOP)).mean(axis=1)
            self._levels += (10 * np.log10(power + 1e-10)).tolist()

    def audio(self, start: int, count: int) -> bytes:
        """Return at most `count` samples from position `start` on, as PCM16 bytes. They must not be committed."""
        first = 2 * (start - self._pcm_start)
        assert first >= 0, "this audio has been discarded"
        return bytes(self._pcm[first : first + 2 * count])

    def drop_oldest(self, keep: int) -> tuple[int, int] | None:
        """Keep at most `keep` samples of audio not yet committed; return the span [start, end) that is lost, if any.

        Words that a session has transcribed in the dropped audio become final. Begin a new session afterwards.
        """
        start = self.received - keep
        if start <= self.committed:
            return None
        lost = max(self.committed, min(self.transcribed, start)), start
        self._commit(start, sum(_samples(word.end) <= start for word in self.partial))
        return lost if lost[1] > lost[0] else None

    # --- sessions ---

    def begin(self) -> int:
        """Start a new session: discard the partial words, return the position from which to send audio, in samples."""
        self.session = next(self._numbers)
        self.partial.clear()
        self._origin, self._frames, self._last_text = self.committed, 0, self.committed
        return self._origin

    def add_delta(self, text: str) -> None:
        """Add the text of the next frame, mostly empty; move the commit point where the audio allows it."""
        self._frames += 1
        now = self.transcribed
        if text:
            blank_before = now - self._last_text > FRAME
            self._add(text, blank_before)
            self._last_text = now
        point = min(now - MARGIN, self.received)
        if point <= self.committed or self._last_text > point:
            pass  # a word may still be coming
        elif self._quiet(point - PAUSE, point + PAUSE) and self.wordless_sound() <= WORDLESS_SECONDS:
            self._commit(point, len(self.partial))
        elif self._blanks and now >= self._blanks[1] + MARGIN and self._last_text <= self._blanks[0] + RATE:
            self._commit(point, len(self.partial))  # two sessions found no words
        if self.partial and now - self.committed > MAX_PARTIAL:
            self.commit_between_words()

    def commit_between_words(self) -> None:
        """Commit without a pause: at the quietest position after one of the partial words, if there is any."""
        now, best = self.transcribed, None
        ends = [_samples(word.end) for word in self.partial]
        late = [end for end in ends if end > (self.committed + now) // 2] or ends
        for end in late:
            if self.committed < end < now - MARGIN:
                level, point = self._quietest(max(end - 4 * HOP, self.committed + HOP), end + 8 * HOP)
                if best is None or level <= best[0]:
                    best = level, point, ends.index(end) + 1
        if best is None and now - MARGIN > self.committed + FRAME:
            level, point = self._quietest(max(now - 2 * RATE, self.committed + FRAME), now - MARGIN)
            best = level, point, sum(end <= point for end in ends)
        if best is not None:
            self._commit(best[1], best[2])

    def finish(self) -> None:
        """Commit everything: the input has ended, and the server has transcribed all of it."""
        self._commit(self.received, len(self.partial))

    def take(self) -> list[Word]:
        """Return the words committed since the last call."""
        words, self._final = self._final, []
        return words

    # --- the model stuck in blanks (vllm#47614) ---

    def wordless_sound(self) -> float:
        """Return the seconds of sound above the noise since the last word that were transcribed without a word."""
        loud = self._readings(self._answered, self.transcribed) > self._noise((0, self.received))
        return float(loud.sum()) * HOP / RATE

    def wordless(self) -> float:
        """Return the seconds of audio, silent or not, since the last word."""
        return (self.transcribed - self._answered) / RATE

    def suspect_blanks(self) -> None:
        """Require that a new session confirms the audio since the last word, which has no words."""
        self._blanks = self._last_text, self.transcribed

    # --- private ---

    @property
    def _answered(self) -> int:
        """End of the audio whose words are known; audio that a new session must confirm is included."""
        return max(self._last_text, self.committed, self._blanks[1] if self._blanks else 0)

    def _commit(self, point: int, words: int) -> None:
        """Make `point` the commit point and the first `words` partial words final."""
        if words:
            self._final += self.partial[:words]
            last = self.partial[words - 1]
            self._last_char, self._last_end = last.text[-1], _samples(last.end)
            del self.partial[:words]
        self.committed = point
        if self._blanks and point >= self._blanks[1]:
            self._blanks = None
        del self._pcm[: 2 * max(0, point - self._pcm_start)]
        self._pcm_start = max(self._pcm_start, point)
        excess = (point - 30 * RATE - self._levels_start) // HOP
        if excess > 0:
            del self._levels[:excess]
            self._levels_start += excess * HOP

    def _add(self, text: str, blank_before: bool) -> None:
        """Append the text of the last transcribed frame to the partial words."""
        if self._last_text == self._origin and self._last_char and _apart(self._last_char, text[0]):
            text = " " + text  # the first word of a later session may lack its space
        for i, piece in enumerate(_split(text)):
            last = self.partial[-1].text if self.partial else ""
            fresh = not last or piece[0].isspace() or last[-1].isspace()
            if fresh or i or (blank_before and piece[0].isalnum()):
                start, end = self._locate(self.transcribed - FRAME)
                self.partial.append(Word(piece, start / RATE, end / RATE, self.session))
            else:
                word = self.partial[-1]
                self.partial[-1] = Word(word.text + piece, word.start, word.end, word.session)

    def _locate(self, marked: int) -> tuple[int, int]:
        """Return start and end of the word whose end the model marked in the frame that ends at `marked`, in samples.

        The mark is in the frame in which the word ends, or in the one before or after it. The end is where the sound
        becomes silent near the middle of that frame. The start is where the sound began.
        """
        earliest = max(_samples(self.partial[-1].end) if self.partial else self._last_end, self._origin)
        first = -(-max(earliest, marked - MAX_WORD, self._levels_start) // HOP) * HOP
        loud = self._readings(first, marked + 2 * FRAME) > self._noise((marked - NEAR, marked), edge=True)
        expected = (marked - FRAME // 2 - first) // HOP  # index of the reading after the word's end
        falls = np.flatnonzero(loud[:-1] & ~loud[1:]) + 1
        falls = falls[abs(falls - expected) <= 2 * FRAME // HOP]
        stop = int(falls[abs(falls - expected).argmin()]) if len(falls) else max(expected, 1)
        start = stop
        while start > 0 and loud[max(0, start - 7) : start].any():  # less than 140 ms of silence: a plosive
            start -= 1
        while start < stop - 1 and not loud[start]:
            start += 1
        end = max(first + stop * HOP, earliest + HOP)
        return max(earliest, min(first + start * HOP, end - HOP)), end

    def _readings(self, start: int, end: int) -> np.ndarray:
        """Return the level readings in dB within [start, end), shape (n,)."""
        first = max(0, -(-(start - self._levels_start) // HOP))
        return np.array(self._levels[first : max(first, (end - self._levels_start) // HOP)])

    def _quiet(self, start: int, end: int) -> bool:
        """Is all audio within [start, end) silent? Audio that is not received yet counts as silent."""
        middle = (start + end) // 2
        noise = self._noise((start - NEAR, middle), (middle, end + NEAR))
        return bool((self._readings(start, end) <= noise).all())

    def _quietest(self, start: int, end: int) -> tuple[float, int]:
        """Return level and position of the quietest reading within [start, end)."""
        readings = self._readings(start, end)
        if not len(readings):
            return 0.0, end
        quietest = int(readings.argmin())
        return float(readings[quietest]), -(-start // HOP) * HOP + quietest * HOP

    def _noise(self, *voices: tuple[int, int], edge: bool = False) -> float:
        """Return the level in dB below which sound counts as silence: in the last 30 s, and in each span of `voices`.

        It is at most 8 dB above the noise floor, less where speech is little louder, and at least the loud parts of the
        quietest span less 35 dB: below that is only breath. Loud sound elsewhere, for example a tone, has no effect.
        `edge`: for the begin and end of a word. In steady noise that level is nearer to the floor.
        """
        if self.received - self._noise_at >= RATE // 2:
            self._noise_at = self.received
            recent = self._levels[-30 * RATE // HOP :]
            lowest, floor, loud = np.percentile(recent, (2, 10, 95)) if recent else [FLOOR_DB] * 3
            rise = min(8, 0.4 * (loud - floor))
            self._floor = max(FLOOR_DB, floor + rise)
            self._edge = max(FLOOR_DB, floor + min(rise, 2 + 6 * (floor - lowest)))
        readings = [self._readings(max(start, self.received - 30 * RATE), end) for start, end in voices]
        loud = min((_percentile(span, 0.95) for span in readings if len(span)), default=FLOOR_DB)
        return max(self._edge if edge else self._floor, loud - 35)


def _percentile(levels: np.ndarray, share: float) -> float:
    """np.percentile of some dozen levels, which needs ten times as long for its checks as for its work."""
    ordered, at = np.sort(levels), share * (len(levels) - 1)
    low = int(at)
    return float(ordered[low] + (at - low) * (ordered[min(low + 1, len(levels) - 1)] - ordered[low]))


def _samples(seconds: float) -> int:
    return round(seconds * RATE)


def _split(text: str) -> list[str]:
    """Split before each whitespace that follows a word. The pieces joined are the text."""
    pieces = [""]
    for c in text:
        if c.isspace() and pieces[-1].strip():
            pieces.append("")
        pieces[-1] += c
    return pieces


def _apart(before: str, after: str) -> bool:
    """Is a space missing between these two characters of different words?"""
    return not (before.isspace() or after.isspace() or UNSPACED.match(before) or UNSPACED.match(after))
