"""Transcripts as files: text, SubRip, WebVTT, JSON, JSON lines; each valid at any moment while it grows.

SubRip has no standard; WebVTT's is https://www.w3.org/TR/webvtt1/. Limits of a cue follow common
broadcast guidelines: two lines of 42 characters, 1 to 7 seconds.
"""

import json
import os
import sys
import textwrap
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from . import UserError
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
    """Base of all formats: a file whose end is written anew for each word, so that it is always whole.

    Standard output is only ever appended to.
    """

    def __init__(self, file: BinaryIO, standard: bool = False):
        """`file`: unbuffered, so that an error is known at once; `standard`: it is standard output."""
        self._file, self._standard = file, standard
        self._fixed, self._end = 0, b""  # bytes that stay, and what stands behind them

    def write(self, word: Word) -> None:
        """Add a settled word. Raises OSError; the file is then as it was before."""
        raise NotImplementedError

    def close(self, **summary: object) -> None:
        """Finish the file. `summary` goes into formats that have a place for it. Raises OSError."""
        try:
            self._finish(summary)
        finally:
            if not self._standard:
                self._file.close()

    def abandon(self) -> None:
        """Leave the file as it is."""
        self._file.close()

    def _finish(self, summary: dict) -> None:
        """Write what ends the file."""

    def _put(self, fixed: str, end: str = "") -> None:
        """Append `fixed` for good, and `end` until the next call."""
        data, tail = self._encoded(fixed), self._encoded(end)
        if self._standard:
            self._file.write(data)
            self._file.flush()
            return
        try:
            self._replace_end(data + tail)
        except OSError:
            with suppress(OSError):  # the disk is full, but for what stood there before there is room
                self._replace_end(self._end)
            raise
        self._fixed, self._end = self._fixed + len(data), tail

    def _replace_end(self, data: bytes) -> None:
        self._file.seek(self._fixed)
        while data:
            data = data[self._file.write(data) :]
        self._file.truncate()

    def _encoded(self, text: str) -> bytes:
        return text.encode(errors="replace")


class Text(Writer):
    """The plain transcript, on standard output as that shows it."""

    _any = False

    def _encoded(self, text: str) -> bytes:
        return text.encode(sys.stdout.encoding if self._standard else "utf-8", "replace")

    def write(self, word: Word) -> None:
        self._put(word.text if self._any else word.text.lstrip())
        self._any = True

    def _finish(self, summary: dict) -> None:
        self._put("\n" if self._any else "")


class SubRip(Writer):
    """SRT. It has no escapes: what players take for markup is replaced by look-alikes."""

    HEAD, MARK = "", ","

    def __init__(self, file: BinaryIO, standard: bool = False):
        super().__init__(file, standard)
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

    def __init__(self, file: BinaryIO, standard: bool = False):
        super().__init__(file, standard)
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


def writer_for(path: str | Path, format: str | None = None, new: bool = False) -> Writer:
    """Open `path` ("-" for stdout) for writing in `format`, by default that of its ending.

    Raises UserError (unknown ending, or `new` and there already) or OSError.
    """
    form = format or format_of(path)
    if form is None:
        raise UserError(unknown_ending(path))
    if str(path) == "-":
        return FORMATS[form](sys.stdout.buffer, standard=True)
    try:
        return FORMATS[form](open(path, "xb" if new else "wb", buffering=0))
    except FileExistsError:
        raise UserError(f"{path}: exists already; move it away or give another name") from None


class Transcript:
    """The transcript of one recording, in all the places where it goes. Trouble with a file ends that file."""

    def __init__(self, paths: list[Path], forms: list[str], standard: str | None):
        """`standard`: format for standard output. Raises OSError where a file cannot be made."""
        self._marks = [unfinished(path) for path in paths]
        self._writers: dict[Path, Writer] = {}
        self._standard = writer_for("-", standard) if standard else None
        self.error: str | None = None  # what went wrong with a file, one line
        for number, path in enumerate(paths):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._marks[number].touch()
                self._writers[path] = writer_for(path, forms[number])
            except OSError as error:
                self._failed(path, error)

    def write(self, word: Word) -> None:
        """Add a settled word. Raises OSError for standard output only."""
        if self._standard:
            self._standard.write(word)
        for path, writer in list(self._writers.items()):
            try:
                writer.write(word)
            except OSError as error:
                del self._writers[path]
                self._failed(path, error)
                writer.abandon()

    def close(self, complete: bool, **summary: object) -> None:
        """Finish the files; they stay marked as unfinished unless all is `complete`. Raises OSError as `write` does."""
        summary = {"complete": complete} | summary
        if self._standard:
            self._standard.close(**summary)
        for path, writer in self._writers.items():
            try:
                writer.close(**summary)
            except OSError as error:
                self._failed(path, error)
        if complete and not self.error:
            for mark in self._marks:
                mark.unlink(missing_ok=True)

    def _failed(self, path: Path, error: OSError) -> None:
        self.error = self.error or f"{readable(path)}: cannot be written ({error.strerror})"


class Outputs:
    """Where the transcripts of files go, as `--output` and `--format` say. Raises UserError for nonsense.

    Neither: text on stdout. Formats alone: beside the audio. A folder: into it, by the audio's name.
    While a file is being written, a file of its name + ".unfinished" lies beside it.
    """

    def __init__(self, output: str | None, formats: list[str] | None):
        self._output, self._formats = output, formats or []
        self.one_file = output not in (None, "-") and not (Path(output).is_dir() or output.endswith(("/", os.sep)))
        if len(self._formats) > 1 and (self.one_file or output == "-"):
            raise UserError(f"{output}: one place for {len(self._formats)} formats; write a folder with / at its end")
        if self.one_file and not self._formats and format_of(output) is None:
            raise UserError(unknown_ending(output))

        self.to_screen = output is None and not self._formats  # plain text on stdout

    def check(self, names: list[str]) -> None:
        """Raise UserError where two of the audio files `names` would be written to one file, or one over another."""
        taken: dict[Path, str] = {}
        audio = {os.path.realpath(name) for name in names}
        for name in names:
            for path in self.paths(name):
                if taken.setdefault(path, name) != name:
                    raise UserError(f"{path}: the transcript of both {taken[path]} and {name}; name a folder for each")
                if os.path.realpath(path) in audio:
                    raise UserError(f"{path}: is audio itself; write the transcript of {name} elsewhere, with --output")

    def paths(self, name: str) -> list[Path]:
        """Return the files for the transcript of audio file `name`; none if it goes to stdout."""
        if self._output == "-" or self.to_screen:
            return []
        if self.one_file:
            return [Path(self._output)]
        stem = Path("stdin" if name == "-" else name)
        folder = stem.parent if self._output is None else Path(self._output)
        return [folder / f"{stem.stem}.{form}" for form in self._forms]

    @property
    def _forms(self) -> list[str]:
        return self._formats or [format_of(self._output) if self.one_file else "txt"]

    def complete(self, name: str) -> bool:
        """Is the transcript of `name` there already, and whole?"""
        paths = self.paths(name)
        return bool(paths) and all(map(os.path.exists, paths)) and not any(map(os.path.exists, map(unfinished, paths)))

    def open(self, name: str) -> Transcript:
        """Open the transcript of `name`; it has no files where plain text goes to the screen."""
        return Transcript(self.paths(name), self._forms, self._forms[0] if self._output == "-" else None)

    def fail(self, name: str, error: str) -> None:
        """Say in the stream of JSON lines on stdout that audio file `name` cannot be read. Files are left alone."""
        if self._output == "-" and self._formats == ["jsonl"]:
            self.open(name).close(False, audio=readable(name), sessions=0, seconds=0.0, error=error)


def readable(name: object) -> str:
    """Return a file's name as text, also where it is no UTF-8."""
    return os.fsencode(str(name)).decode(errors="replace")


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
