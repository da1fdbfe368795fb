"""Transcripts as files: text, SubRip, WebVTT, JSON, JSON lines; each valid at any moment while it grows.

SubRip has no standard; WebVTT's is https://www.w3.org/TR/webvtt1/. Limits of a cue follow common
broadcast guidelines: two lines of 42 characters, 1 to 7 seconds.
"""

import json
import os
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from .timeline import Word

LINES, COLUMNS = 2, 42
SHORTEST, LONGEST = 1.0, 7.0  # seconds
PAUSE = 0.6  # seconds of silence that end a cue
SENTENCE_ENDS = tuple(".!?…。！？")


class Cues:
    """Groups words into cues. A cue is a list of words."""

    def __init__(self) -> None:
        self.open: list[Word] = []  # the cue that still grows

    def add(self, word: Word) -> tuple[list[Word], float] | None:
        """Add a word; return the cue that it ended, with the time in seconds at which that must be gone."""
        if not self.open or not self._ends_before(word):
            self.open.append(word)
            return None
        cue, self.open = self.open, [word]
        return cue, word.start

    def _ends_before(self, word: Word) -> bool:
        start, end, text = self.open[0].start, self.open[-1].end, text_of(self.open)
        if word.end - start > LONGEST or len(wrap(text + word.text)) > LINES:
            return True
        if word.start - start < SHORTEST:
            return False
        return word.start - end >= PAUSE or text.endswith(SENTENCE_ENDS)


def text_of(words: list[Word]) -> str:
    """Return the words' text without the space before the first."""
    return "".join(word.text for word in words).strip()


def wrap(text: str) -> list[str]:
    """Break text into lines of at most COLUMNS characters."""
    return textwrap.wrap(text, COLUMNS, break_on_hyphens=False)


def span(cue: list[Word], gone: float = float("inf")) -> tuple[float, float]:
    """Return start and end of a cue in seconds: long enough to be read, over before `gone`."""
    return cue[0].start, min(max(cue[-1].end, cue[0].start + SHORTEST), gone)


def clock(seconds: float, mark: str) -> str:
    """Return seconds as HH:MM:SS, `mark` and milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{mark}{milliseconds % 1000:03}"


class Writer:
    """Base of all formats: a file whose end is written anew for each word, so that it is always whole."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._live = file.seekable()
        self._fixed = 0  # bytes that stay

    def write(self, word: Word) -> None:
        """Add a settled word."""
        raise NotImplementedError

    def close(self, **summary: object) -> None:
        """Finish the file. `summary` goes into formats that have a place for it."""
        self._finish(summary)
        if self._file is not sys.stdout.buffer:
            self._file.close()

    def _finish(self, summary: dict) -> None:
        """Write what ends the file."""

    def _put(self, fixed: str, end: str = "") -> None:
        """Append `fixed` for good, and `end` until the next call."""
        data = fixed.encode()
        if self._live:
            self._file.seek(self._fixed)
            self._file.write(data + end.encode())
            self._file.truncate()
        else:
            self._file.write(data)
        self._file.flush()
        self._fixed += len(data)


class Text(Writer):
    """The plain transcript."""

    _any = False

    def write(self, word: Word) -> None:
        self._put(word.text if self._any else word.text.lstrip())
        self._any = True

    def _finish(self, summary: dict) -> None:
        self._put("\n" if self._any else "")


class SubRip(Writer):
    """SRT. It has no escapes: what players take for markup is replaced by look-alikes."""

    HEAD, MARK = "", ","

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self._cues, self._number = Cues(), 1
        self._put(self.HEAD)

    def write(self, word: Word) -> None:
        fixed = ""
        if ended := self._cues.add(word):
            fixed = self._cue(*ended)
            self._number += 1
        self._put(fixed, self._cue(self._cues.open))

    def _finish(self, summary: dict) -> None:
        self._put(self._cue(self._cues.open) if self._cues.open else "")

    def _cue(self, cue: list[Word], gone: float = float("inf")) -> str:
        start, end = span(cue, gone)
        lines = "\n".join(self._escape(line) for line in wrap(text_of(cue)))
        return f"{self._number}\n{clock(start, self.MARK)} --> {clock(end, self.MARK)}\n{lines}\n\n"

    def _escape(self, line: str) -> str:
        return line.replace("-->", "→").translate(str.maketrans("<>{}", "‹›()"))


class WebVTT(SubRip):
    """WebVTT."""

    HEAD, MARK = "WEBVTT\n\n", "."

    def _escape(self, line: str) -> str:
        return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Json(Writer):
    """JSON: {"words": [{"text", "start", "end", "session"}, ...], ...summary}."""

    _separator = ""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self._put('{"words": [', "]}\n")

    def write(self, word: Word) -> None:
        entry = asdict(word) | {"text": word.text.strip(), "start": round(word.start, 3), "end": round(word.end, 3)}
        self._put(f"{self._separator}\n  {json.dumps(entry, ensure_ascii=False)}", "\n]}\n")
        self._separator = ","

    def _finish(self, summary: dict) -> None:
        fields = "".join(f',\n"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in summary.items())
        self._put(f"\n]{fields}}}\n")


class JsonLines(Writer):
    """JSON lines: {"text", "start", "end", "session"} for each word as it settles, and {"complete", ...summary} last.

    The words' `text` begins with the space that stands before them: joined they are the transcript, in any script.
    """

    def write(self, word: Word) -> None:
        self._line(asdict(word) | {"start": round(word.start, 3), "end": round(word.end, 3)})

    def _finish(self, summary: dict) -> None:
        self._line(summary)

    def _line(self, entry: dict) -> None:
        self._put(json.dumps(entry, ensure_ascii=False) + "\n")


FORMATS: dict[str, type[Writer]] = {"txt": Text, "srt": SubRip, "vtt": WebVTT, "json": Json, "jsonl": JsonLines}


def writer_for(path: str | Path, format: str | None = None) -> Writer:
    """Open `path` ("-" for stdout) for writing in `format`, by default that of its ending.

    Raises ValueError (unknown ending) or OSError, whose text is for the user.
    """
    form = format or format_of(path)
    if form is None:
        raise ValueError(unknown_ending(path))
    return FORMATS[form](sys.stdout.buffer if str(path) == "-" else open(path, "wb"))


class Outputs:
    """Where the transcripts of files go, as `--output` and `--format` say. Raises ValueError for nonsense.

    Neither: text on stdout. Formats alone: beside the audio. A folder: into it, by the audio's name.
    While a file is being written, a file of its name + ".unfinished" lies beside it.
    """

    def __init__(self, output: str | None, formats: list[str] | None):
        self._output, self._formats = output, formats or []
        self.one_file = output not in (None, "-") and not (Path(output).is_dir() or output.endswith(("/", os.sep)))
        if len(self._formats) > 1 and (self.one_file or output == "-"):
            raise ValueError(f"{output}: one place for {len(self._formats)} formats; write a folder with / at its end")
        if self.one_file and not self._formats and format_of(output) is None:
            raise ValueError(unknown_ending(output))

        self.to_screen = output is None and not self._formats  # plain text on stdout

    def check(self, names: list[str]) -> None:
        """Raise ValueError where two of the audio files `names` would be written to the same file."""
        taken: dict[Path, str] = {}
        for name in names:
            for path in self.paths(name):
                if taken.setdefault(path, name) != name:
                    raise ValueError(f"{path}: the transcript of both {taken[path]} and {name}; name a folder for each")

    def paths(self, name: str) -> list[Path]:
        """Return the files for the transcript of audio file `name`; none if it goes to stdout."""
        if self._output == "-" or self.to_screen:
            return []
        if self.one_file:
            return [Path(self._output)]
        stem = Path("stdin" if name == "-" else name)
        folder = stem.parent if self._output is None else Path(self._output)
        return [folder / f"{stem.stem}.{form}" for form in self._formats or ["txt"]]

    def complete(self, name: str) -> bool:
        """Is the transcript of `name` there already, and whole?"""
        paths = self.paths(name)
        return bool(paths) and all(path.exists() and not unfinished(path).exists() for path in paths)

    def open(self, name: str) -> list[Writer]:
        """Open the writers for `name`; none if its plain text goes to stdout. Raises OSError."""
        if self._output == "-":
            return [writer_for("-", (self._formats or ["txt"])[0])]
        forms = self._formats if self.one_file else []
        writers = []
        for path in self.paths(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished(path).touch()
            writers.append(writer_for(path, forms[0] if forms else None))
        return writers

    def close(self, name: str, writers: list[Writer], whole: bool, **summary: object) -> None:
        """Finish the files of `name`; they stay marked as unfinished unless `whole`."""
        for writer in writers:
            writer.close(**summary)
        for path in self.paths(name) if whole else []:
            unfinished(path).unlink(missing_ok=True)

    def fail(self, name: str, error: str) -> None:
        """Say in the stream of JSON lines on stdout that audio file `name` cannot be read. Files are left alone."""
        if self._output == "-" and self._formats == ["jsonl"]:
            self.close(name, self.open(name), False, audio=name, complete=False, error=error)


def unfinished(path: Path) -> Path:
    """Return the name of the mark that a file is still being written, or never was finished."""
    return path.with_name(path.name + ".unfinished")


def format_of(path: str | Path) -> str | None:
    """Return the format that a file name ends in, if it is one of ours."""
    ending = Path(path).suffix.lstrip(".").lower()
    return ending if ending in FORMATS else None


def unknown_ending(path: str | Path) -> str:
    """Return what to tell a user whose file name says no format."""
    endings = ", ".join("." + name for name in FORMATS)
    return f"{path}: cannot tell the format; end the name in {endings}, or in / for a folder"
