"""Formats of transcripts: text, SubRip, WebVTT, TSV, JSON, JSON lines. A file is valid at any moment while it grows.

SubRip has no standard; WebVTT's is https://www.w3.org/TR/webvtt1/. Limits of a cue follow common broadcast
guidelines: two lines of 42 characters (16 in Chinese, Japanese and Korean), 1 to 7 seconds.
"""

import json
import re
import sys
import unicodedata
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import BinaryIO

from .timeline import UNSPACED, Word

SHORTEST, LONGEST = 1.0, 7.0  # seconds
PAUSE = 0.6  # seconds of silence that end a cue
WIDE = 2.5  # columns of a wide character: it is as wide as two, and read more slowly
# What ends a sentence in the model's 13 languages, with the quotes and brackets that close after it.
SENTENCE_END = re.compile(r"""[.!?…。．！？｡।॥؟۔]["'”’“‘»«›‹)\]」』）】]*$""")
# What stays together in a line: a character of a script without spaces with its punctuation, or what spaces separate.
PARTS = re.compile(
    rf"\s*(?:[「『（【《〈“‘(]*{UNSPACED.pattern}[、。，．！？：；…ー々っッゃゅょャュョ」』）】》〉”’)]*|(?:(?!{UNSPACED.pattern})\S)+)"
)


@dataclass(frozen=True)
class Limits:
    """Largest size of a cue."""

    lines: int = 2
    columns: int = 42  # characters in a line; a wide one counts WIDE

    def wrap(self, text: str) -> list[str]:
        """Break text into lines: at spaces, between characters of scripts without spaces, and where nothing fits."""
        lines = [""]
        for part in PARTS.findall(" ".join(text.split())):
            if width(lines[-1] + part) > self.columns and lines[-1]:
                lines.append("")
                part = part.lstrip()
            for c in part:
                if width(lines[-1] + c) > self.columns and lines[-1]:
                    lines.append("")
                lines[-1] += c
        return lines


LIMITS = Limits()


class Cues:
    """Groups words into cues within `limits`. A cue is a list of words."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.open: list[Word] = []  # the cue that still grows

    def add(self, word: Word) -> tuple[list[Word], float] | None:
        """Add a word; return the cue that it ended, if any, and the time in seconds at which that cue must be over."""
        if not self.open or not self._ends_before(word):
            self.open.append(word)
            return None
        cue, self.open = self.open, [word]
        return cue, word.start

    def _ends_before(self, word: Word) -> bool:
        start, end, text = self.open[0].start, self.open[-1].end, text_of(self.open)
        if word.end - start > LONGEST or len(self.limits.wrap(text + word.text)) > self.limits.lines:
            return True
        if word.start - start < SHORTEST:
            return False
        return word.start - end >= PAUSE or bool(SENTENCE_END.search(text))


def width(text: str) -> float:
    """Return the number of columns that a line takes."""
    return sum(WIDE if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def text_of(words: list[Word]) -> str:
    """Return the words' text without the space before the first."""
    return "".join(word.text for word in words).strip()


def span(cue: list[Word], over: float = float("inf")) -> tuple[float, float]:
    """Return start and end of a cue in seconds: at least SHORTEST long, but over at `over` seconds."""
    return cue[0].start, min(max(cue[-1].end, cue[0].start + SHORTEST), over)


def fields(word: Word) -> dict:
    """Return a word for JSON: `partial` only where it is true."""
    times = {"start": round(word.start, 3), "end": round(word.end, 3)}
    return {key: value for key, value in (asdict(word) | times).items() if value is not False}


def timestamp(seconds: float, mark: str) -> str:
    """Return seconds as HH:MM:SS, `mark` and milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{mark}{milliseconds % 1000:03}"


class Writer:
    """Base of all formats: a file whose end is rewritten for each word, so that it is always valid.

    Standard output is only appended to. `file` is unbuffered, so that an error is raised at once; `standard`: it is
    standard output. `limits`: of a cue, for the formats that have cues.
    """

    HEAD = END = ""  # of an empty transcript

    def __init__(self, file: BinaryIO, standard: bool = False, limits: Limits = LIMITS):
        self._file, self._standard = file, standard
        self._fixed, self._end = 0, b""  # number of bytes that stay, and the bytes after them
        self._unwritten = b""  # what should stay, but could not be written
        self._put(self.HEAD, self.END)

    def write(self, word: Word) -> None:
        """Add a final word. Raises OSError; the file is then as it was before, and the next call adds this word too."""
        raise NotImplementedError

    def close(self, **summary: object) -> None:
        """Finish the file. JSON formats contain `summary`. Raises OSError."""
        try:
            self._finish(summary)
        finally:
            if not self._standard:
                self._file.close()

    def move(self, file: BinaryIO) -> None:
        """Continue in `file`, which has the same content."""
        self._file = file

    def _finish(self, summary: dict) -> None:
        """Write what ends the file."""

    def _put(self, fixed: str, end: str = "") -> None:
        """Append `fixed` for good, and `end` until the next call."""
        data, tail = self._unwritten + self._encoded(fixed), self._encoded(end)
        if self._standard:
            self._file.write(data)
            self._file.flush()
            return
        try:
            self._replace_end(data + tail)
        except OSError:
            with suppress(OSError):  # the disk is full, but there is room for the previous end
                self._replace_end(self._end)
            self._unwritten = data
            raise
        self._fixed, self._end, self._unwritten = self._fixed + len(data), tail, b""

    def _replace_end(self, data: bytes) -> None:
        self._file.seek(self._fixed)
        while data:
            data = data[self._file.write(data) :]
        self._file.truncate()

    def _encoded(self, text: str) -> bytes:
        return text.encode(errors="replace")


class TextWriter(Writer):
    """The plain transcript, on standard output in its encoding."""

    _any = False

    def _encoded(self, text: str) -> bytes:
        return text.encode(sys.stdout.encoding if self._standard else "utf-8", "replace")

    def write(self, word: Word) -> None:
        text = word.text if self._any else word.text.lstrip()
        self._any = True
        self._put(text)

    def _finish(self, summary: dict) -> None:
        self._put("\n" if self._any else "")


class CueWriter(Writer):
    """Base of the formats that are made of cues."""

    def __init__(self, file: BinaryIO, standard: bool = False, limits: Limits = LIMITS):
        super().__init__(file, standard)
        self._cues, self._number = Cues(limits), 1  # number of the cue that still grows

    def write(self, word: Word) -> None:
        fixed = ""
        if ended := self._cues.add(word):
            fixed = self._cue(*ended)
            self._number += 1
        self._put(fixed, self._cue(self._cues.open))

    def _finish(self, summary: dict) -> None:
        self._put(self._cue(self._cues.open) if self._cues.open else "")

    def _cue(self, cue: list[Word], over: float = float("inf")) -> str:
        """Return the cue with the number `self._number`, which must be over at `over` seconds."""
        raise NotImplementedError


class SubRipWriter(CueWriter):
    """SRT. It has no escapes: similar characters replace those that players take for markup."""

    MARK = ","

    def _cue(self, cue: list[Word], over: float = float("inf")) -> str:
        start, end = span(cue, over)
        lines = "\n".join(self._escape(line) for line in self._cues.limits.wrap(text_of(cue)))
        return f"{self._number}\n{timestamp(start, self.MARK)} --> {timestamp(end, self.MARK)}\n{lines}\n\n"

    def _escape(self, line: str) -> str:
        return line.replace("-->", "→").translate(str.maketrans("<>{}", "‹›()"))


class WebVTTWriter(SubRipWriter):
    """WebVTT."""

    HEAD, MARK = "WEBVTT\n\n", "."

    def _escape(self, line: str) -> str:
        return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class TsvWriter(CueWriter):
    """Tab-separated values as Whisper writes them: start and end in milliseconds, text; a cue a line."""

    HEAD = "start\tend\ttext\n"

    def _cue(self, cue: list[Word], over: float = float("inf")) -> str:
        start, end = (round(1000 * seconds) for seconds in span(cue, over))
        return f"{start}\t{end}\t{' '.join(text_of(cue).split())}\n"


class JsonWriter(Writer):
    """JSON: {"words": [{"text", "start", "end", "session"}, ...], ...summary}; a partial word has "partial": true."""

    HEAD, END = '{"words": [', "]}\n"
    _separator = ""

    def write(self, word: Word) -> None:
        entry = json.dumps(fields(word) | {"text": word.text.strip()}, ensure_ascii=False)
        separator, self._separator = self._separator, ","
        self._put(f"{separator}\n  {entry}", "\n]}\n")

    def _finish(self, summary: dict) -> None:
        fields = "".join(f',\n"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in summary.items())
        self._put(f"\n]{fields}}}\n")


class JsonLinesWriter(Writer):
    """JSON lines: {"text", "start", "end", "session"} for each final word; {"complete", ...summary} last. Words that a
    new session might have changed have "partial": true.

    A word's `text` begins with the space before the word: joined they are the transcript, in any script.
    """

    def write(self, word: Word) -> None:
        self._line(fields(word))

    def _finish(self, summary: dict) -> None:
        self._line(summary)

    def _line(self, entry: dict) -> None:
        self._put(json.dumps(entry, ensure_ascii=False) + "\n")


FORMATS: dict[str, type[Writer]] = {
    "txt": TextWriter,
    "srt": SubRipWriter,
    "vtt": WebVTTWriter,
    "tsv": TsvWriter,
    "json": JsonWriter,
    "jsonl": JsonLinesWriter,
}
