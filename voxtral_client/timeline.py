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
from dataclasses import dataclass, replace

from .levels import HOP, Levels
from .protocol import FRAME, RATE

MARGIN = 4 * FRAME  # the model begins to write a word 0.01 to 0.2 s after its end, then one piece a frame
LEAD = 6 * FRAME  # silence before the audio of a session after blanks: models are said to get stuck in sudden speech
MAX_PARTIAL = 30 * RATE  # audio without a pause that is not committed yet: more is committed between two words
WORDLESS_SECONDS = 1.5  # sound without a word that may be a cough; more is committed only if a second session agrees
MAX_RUN = 6 * FRAME  # text without spaces becomes a new word after this much audio
# Chinese and Japanese are written without spaces; Korean, whose characters are as wide, is not.
UNSPACED = re.compile(
    "[\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Word:
    """A word, or a run of text in scripts without spaces.

    `text` begins with the space before the word, so that the transcript is the concatenation of all texts.
    `start`, `end`: seconds of the input. `session`: number of the session that transcribed it, from 1. `partial`: a new
    session might have changed it.
    """

    text: str
    start: float
    end: float
    session: int
    partial: bool = False


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
        self._space = ""  # of the next word, which comes without it
        self._pcm, self._pcm_start, self._levels = bytearray(), 0, Levels()
        self._last_end = 0  # end of the last final word
        self.lead = 0  # samples of silence to send before the session's audio
        self._origin = self._frames = self._begun = 0  # `_begun`: where the last word was begun
        self._shown = 0  # end of the audio whose words are known: until a new session answers, those of the last one
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
        return self._origin - self.lead + self._frames * FRAME

    @property
    def session_length(self) -> int:
        """Number of samples that the current session has transcribed."""
        return self._frames * FRAME

    def add_audio(self, pcm: bytes) -> None:
        """Append PCM16 bytes, 16 kHz mono (an even number)."""
        self._pcm += pcm
        self._levels.add(pcm)

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
        lost = max(self.committed, min(self._shown, start)), start
        self._commit(start, sum(_samples(word.end) <= start for word in self.partial))
        return lost if lost[1] > lost[0] else None

    # --- sessions ---

    def begin(self) -> int:
        """Ask a new session; return the position from which to send audio, in samples, behind `lead` of silence."""
        self.lead = LEAD if self._blanks else 0
        self._origin, self._frames, self._last_text = self.committed, 0, self.committed
        return self._origin

    def add_delta(self, text: str) -> None:
        """Add the text of the next frame, mostly empty; move the commit point where the audio allows it.

        The first one of a session discards the partial words: from now on it is this session that transcribes them.
        """
        if not self._frames:
            self.session = next(self._numbers)
            self.partial.clear()
            self._space = ""
        self._frames += 1
        self._shown = now = self.transcribed
        if text:
            self._add(text, blank_before=now - self._last_text > FRAME)
            self._last_text = now
        point = min(now - MARGIN, self.received)
        if point <= self.committed or self._last_text > point:
            pass  # a word may still be coming
        elif self._levels.pause(point) and self.wordless_sound() <= WORDLESS_SECONDS:
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
                level, point = self._levels.quietest(max(end - 4 * HOP, self.committed + HOP), end + 8 * HOP)
                if best is None or level <= best[0]:
                    best = level, point, ends.index(end) + 1
        if best is None and now - MARGIN > self.committed + FRAME:
            level, point = self._levels.quietest(max(now - 2 * RATE, self.committed + FRAME), now - MARGIN)
            best = level, point, sum(end <= point for end in ends)
        if best is not None:
            self._commit(best[1], best[2])

    def commit_wordless(self, seconds: float) -> None:
        """Commit all words, pause or not, where no word ended in the last `seconds`: none is unfinished."""
        last = _samples(self.partial[-1].end) if self.partial else self._last_end
        point = min(self.transcribed - MARGIN, self.received)
        if self._last_text <= point > self.committed and self.transcribed - last >= seconds * RATE:
            self._commit(point, len(self.partial))

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
        return self._levels.sound(self._answered, self.transcribed)

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
            self._final += [replace(word, partial=False) for word in self.partial[:words]]
            last = self.partial[words - 1]
            self._last_char, self._last_end = last.text[-1], _samples(last.end)
            del self.partial[:words]
        self.committed = point
        if self._blanks and point >= self._blanks[1]:
            self._blanks = None
        del self._pcm[: 2 * max(0, point - self._pcm_start)]
        self._pcm_start = max(self._pcm_start, point)
        self._levels.discard(point)

    def _add(self, text: str, blank_before: bool) -> None:
        """Append the text of the last transcribed frame to the partial words."""
        mark = self.transcribed - FRAME
        if self._last_text == self._origin:
            text = spaced(self._last_char, text)  # the first word of a later session may lack its space
        elif self._space and not text[0].isspace():  # the tokenizer writes " 2024" as " ", "2", "0", ...
            text, mark = self._space + text, mark if blank_before else mark - FRAME
        self._space = text[len(text.rstrip()) :]
        for piece in re.findall(r"\s*\S+", text):
            last = self.partial[-1] if self.partial else None
            sounds = piece[0].isalnum()
            run = sounds and UNSPACED.match(piece)
            long = blank_before or self.transcribed - self._begun >= MAX_RUN
            mute = last and not blank_before and not any(map(str.isalnum, last.text))  # a dash takes what follows
            if not last or (piece[0].isspace() and not mute) or (run and long):
                start, end = self._locate(mark)
                self.partial.append(Word(piece, start / RATE, end / RATE, self.session, partial=True))
                self._begun = self.transcribed
                continue
            end = last.end
            if (run or (sounds and blank_before)) and self._levels.sound(_samples(end), mark):
                end = self._locate(mark)[1] / RATE  # it was not over
            self.partial[-1] = replace(last, text=last.text + piece, end=end)

    def _locate(self, mark: int) -> tuple[int, int]:
        """Return start and end, in samples, of the sound after the last word that ends in the frame up to `mark`."""
        last_end = _samples(self.partial[-1].end) if self.partial else self._last_end
        return self._levels.word(max(last_end, self._origin), mark)


def _samples(seconds: float) -> int:
    return round(seconds * RATE)


def spaced(before: str, text: str) -> str:
    """Return the text of a session's first word, with a space if one is missing after the text `before`."""
    if not before or before[-1].isspace() or text[0].isspace() or UNSPACED.match(before[-1]) or UNSPACED.match(text):
        return text
    return " " + text
