"""Where transcripts go: standard output, and files beside the audio or in a folder, marked until they are complete."""

import os
import sys
from pathlib import Path

from . import UserError
from .subtitles import FORMATS, Writer
from .timeline import Word


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
        """Add a final word. Raises OSError for standard output only."""
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
