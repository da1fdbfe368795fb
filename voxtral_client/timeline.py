"""State of one transcription: audio received, transcribed and committed; partial and final words. No I/O, no clock.

Positions are in samples of the input at 16 kHz, from its very first sample, across all sessions:

    0 ------------- committed ------------- transcribed ------------- received
      words final,            words partial: a            sent or waiting
      audio discarded         new session replaces them   to be sent

One delta is one frame of 80 ms (vLLM counts them the same in `usage.completion_tokens`). The
prompt holds the model's delay, so delta k of a session, counted from 0, speaks of the audio that
ends 0.08 (k + 1) s after the session's first sample, whatever `transcription_delay_ms` is: the
client never needs to know the delay.

A commit point lies in a pause: the audio around it is silent, and the model has had 0.32 s to
speak of everything before it. A new session that starts there gets whole words only.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .protocol import FRAME, RATE

HOP = 320  # samples of one level reading: 20 ms
MARGIN = 4 * FRAME  # the model speaks of a word 0.01 to 0.2 s after its end, then a piece a frame
PAUSE = 3 * FRAME  # silence required on both sides of a commit point
MAX_TAIL = 30 * RATE  # so much audio not yet committed without a pause is committed between two words
WORDLESS_SECONDS = 1.5  # sound without a word that may be a cough; more of it is not committed unasked
NEAR = RATE // 2  # so far beside a pause, or before a word's end, what is loud is the voice
MAX_WORD = 2 * RATE  # longest word considered when its start is looked for
FLOOR_DB = -65.0  # below this everything is silence: the noise of a quiet microphone
# Chinese and Japanese are written without spaces; Korean, whose characters are as wide, is not.
UNSPACED = re.compile(
    "[\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Word:
    """A word, or a run of text in scripts without spaces.

    `text` carries its own leading space, so that the transcript is the plain concatenation.
    `start`, `end`: seconds of the input. `session`: number of the session it came from, from 1.
    """

    text: str
    start: float
    end: float
    session: int


class Timeline:
    """See the module's docstring. Audio goes in by `add_audio`, deltas by `add_delta`."""

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        """`numbers`: where the numbers of sessions come from, if several timelines share them."""
        self._numbers = numbers or itertools.count(1)
        self.committed = 0  # text before this sample is final
        self.session = 0  # number of the current session
        self.partial: list[Word] = []  # words after `committed`: a new session would replace them
        self._final: list[Word] = []  # final words not yet taken
        self._spoken = ""  # the last character of the final text
        self._pcm, self._pcm_start = bytearray(), 0
        self._levels: list[float] = []
        self._levels_start = 0  # position of the first level reading
        self._floor, self._edge, self._noise_at = FLOOR_DB, FLOOR_DB, -RATE
        self._last_end = 0  # end of the last final word
        self._origin = self._frames = 0
        self._last_text = 0  # position of the last delta with text
        self._blanks: tuple[int, int] | None = None  # blank stretch that a second session must confirm

    # --- audio ---

    @property
    def received(self) -> int:
        """End of the audio so far."""
        return self._pcm_start + len(self._pcm) // 2

    @property
    def transcribed(self) -> int:
        """End of the audio that the current session has spoken of."""
        return self._origin + self._frames * FRAME

    @property
    def session_length(self) -> int:
        """Samples that the current session has spoken of."""
        return self._frames * FRAME

    def add_audio(self, pcm: bytes) -> None:
        """Append PCM16 bytes (an even number)."""
        self._pcm += pcm
        start = self._levels_start + len(self._levels) * HOP
        count = (self.received - start) // HOP
        if count > 0:
            samples = np.frombuffer(self.audio(start, count * HOP), "<i2").astype(np.float32) / 32768
            power = np.square(samples.reshape(count, HOP)).mean(axis=1)
            self._levels += (10 * np.log10(power + 1e-10)).tolist()

    def audio(self, start: int, count: int) -> bytes:
        """Return up to `count` kept samples from `start` on as PCM16 bytes."""
        first = 2 * (start - self._pcm_start)
        assert first >= 0, "audio asked for that was trimmed away"
        return bytes(self._pcm[first : first + 2 * count])

    def drop_oldest(self, keep: int) -> tuple[int, int] | None:
        """Keep at most `keep` samples of audio not yet committed; return the span lost for good, if any.

        What a session has transcribed of the dropped audio stays. Begin a new session afterwards.
        """
        start = self.received - keep
        if start <= self.committed:
            return None
        lost = max(self.committed, min(self.transcribed, start)), start
        self._commit(start, sum(_samples(word.end) <= start for word in self.partial))
        return lost if lost[1] > lost[0] else None

    # --- sessions ---

    def begin(self) -> int:
        """Start a new session: forget the partial words, return the position from which to send audio."""
        self.session = next(self._numbers)
        self.partial.clear()
        self._origin, self._frames, self._last_text = self.committed, 0, self.committed
        return self._origin

    def add_delta(self, text: str) -> None:
        """Book the next delta."""
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
            self._commit(point, len(self.partial))  # two sessions agree that there are no words
        if self.partial and now - self.committed > MAX_TAIL:
            self.commit_between_words()

    def commit_between_words(self) -> None:
        """Commit where it is quietest behind a word among the partial words, where there is no pause."""
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
        """Commit everything: the input has ended and the server has spoken of all of it."""
        self._commit(self.received, len(self.partial))

    def take(self) -> list[Word]:
        """Return the words committed since the last call."""
        words, self._final = self._final, []
        return words

    # --- the model stuck in blanks (vllm#47614) ---

    def wordless_sound(self) -> float:
        """Seconds of sound above the noise, transcribed without a word since the last word."""
        start = self._answered
        return float((self._readings(start, self.transcribed) > self._noise((0, self.received))).sum()) * HOP / RATE

    def wordless(self) -> float:
        """Seconds of audio, silent or not, since the last word."""
        return (self.transcribed - self._answered) / RATE

    def suspect_blanks(self) -> None:
        """Note that everything since the last word is to be confirmed by a new session."""
        self._blanks = self._last_text, self.transcribed

    # --- private ---

    @property
    def _answered(self) -> int:
        """End of the audio that needs no asking again; a stretch under examination counts as answered."""
        return max(self._last_text, self.committed, self._blanks[1] if self._blanks else 0)

    def _commit(self, point: int, words: int) -> None:
        """Make `point` the commit point and the first `words` partial words final."""
        if words:
            self._final += self.partial[:words]
            self._spoken, self._last_end = self.partial[words - 1].text[-1], _samples(self.partial[words - 1].end)
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
        """Append text of the frame just transcribed to the partial words."""
        if self._last_text == self._origin and self._spoken and _apart(self._spoken, text[0]):
            text = " " + text  # the first word of a later session may come without its space
        for i, piece in enumerate(_split(text)):
            last = self.partial[-1].text if self.partial else ""
            fresh = not last or piece[0].isspace() or last[-1].isspace()
            if fresh or i or (blank_before and piece[0].isalnum()):
                start, end = self._locate(self.transcribed - FRAME)
                self.partial.append(Word(piece, start / RATE, end / RATE, self.session))
            else:
                word = self.partial[-1]
                self.partial[-1] = Word(word.text + piece, word.start, word.end, word.session)

    def _locate(self, spoken: int) -> tuple[int, int]:
        """Return start and end of the word whose end the model marked in the frame up to `spoken`.

        The mark comes in the frame in which the word ends, or one beside it; where the sound falls
        silent near the middle of that frame, that is the end. The start is where the sound began.
        """
        earliest = max(_samples(self.partial[-1].end) if self.partial else self._last_end, self._origin)
        first = -(-max(earliest, spoken - MAX_WORD, self._levels_start) // HOP) * HOP
        loud = self._readings(first, spoken + 2 * FRAME) > self._noise((spoken - NEAR, spoken), edge=True)
        expected = (spoken - FRAME // 2 - first) // HOP  # index of the reading behind the word's end
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
        """Level readings in dB that lie within [start, end)."""
        first = max(0, -(-(start - self._levels_start) // HOP))
        return np.array(self._levels[first : max(first, (end - self._levels_start) // HOP)])

    def _quiet(self, start: int, end: int) -> bool:
        """Is all audio within [start, end) silent? The future beyond `received` counts as silent."""
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
        """Level in dB under which sound counts as silence: in the last 30 s, and beside each of the spans `voices`.

        Up to 8 dB over the noise floor, less where speech barely rises above it; never more than 35 dB under the loud
        parts of the quietest span, where only breath is. What was loud elsewhere, a tone for one, does not count.
        `edge`: for where a word begins and ends. In steady noise that is nearer to the floor.
        """
        if self.received - self._noise_at >= RATE // 2:
            self._noise_at = self.received
            recent = self._levels[-30 * RATE // HOP :]
            lowest, floor, loud = np.percentile(recent, (2, 10, 95)) if recent else [FLOOR_DB] * 3
            rise = min(8, 0.4 * (loud - floor))
            self._floor = max(FLOOR_DB, floor + rise)
            self._edge = max(FLOOR_DB, floor + min(rise, 2 + 6 * (floor - lowest)))
        readings = [self._readings(max(start, self.received - 30 * RATE), end) for start, end in voices]
        loud = min((float(np.percentile(span, 95)) for span in readings if len(span)), default=FLOOR_DB)
        return max(self._edge if edge else self._floor, loud - 35)


def _samples(seconds: float) -> int:
    return round(seconds * RATE)


def _split(text: str) -> list[str]:
    """Split before each whitespace that follows a word, losing nothing."""
    pieces = [""]
    for c in text:
        if c.isspace() and pieces[-1].strip():
            pieces.append("")
        pieces[-1] += c
    return pieces


def _apart(before: str, after: str) -> bool:
    """Is a space missing between these two characters of different words?"""
    return not (before.isspace() or after.isspace() or UNSPACED.match(before) or UNSPACED.match(after))
