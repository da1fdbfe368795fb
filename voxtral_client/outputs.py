"""Output of transcripts: stdout, and files beside the audio or in a folder, marked until they are complete."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import UserError
from .subtitles import FORMATS, LIMITS, Limits, Writer
from .timeline import Word


def writer_for(path: str | Path, format: str | None = None, new: bool = False, limits: Limits = LIMITS) -> Writer:
    """Open `path` ("-" for stdout) for writing in `format`, by default that of its ending. `limits`: of subtitles.

    Raises UserError (unknown ending, or `new` and the file exists) or OSError.
    """
    writer = FORMATS[format or format_of(path)]
    if str(path) == "-":
        return writer(sys.stdout.buffer, standard=True, limits=limits)
    try:
        return writer(open(path, "xb" if new else "wb", buffering=0), limits=limits)
    except FileExistsError:
        raise UserError(f"{path}: exists already; move it away or give another name") from None


class Transcript:
    """The transcript of one recording, in all its output files. An error ends the file concerned only."""

    def __init__(self, files: dict[Path, str], standard: str | None, limits: Limits):
        """`files`: each with its format; `standard`: format for standard output."""
        self._marks = [unfinished(path) for path in files]
        self._writers: dict[Path, Writer] = {}
        self._standard = writer_for("-", standard, limits=limits) if standard else None
        self.error: str | None = None  # the first error with a file, one line
        for path, form in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished(path).touch()
                self._writers[path] = writer_for(path, form, limits=limits)
            except OSError as error:
                self._failed(path, error)

    def write(self, word: Word) -> None:
        """Add a final word. Raises OSError for standard output only."""
        self._each(lambda writer: writer.write(word))

    def close(self, complete: bool, **summary: object) -> None:
        """Finish the files; they stay marked as unfinished unless all is `complete`. Raises OSError as `write` does.

        `summary`: fields for the JSON formats.
        """
        self._each(lambda writer: writer.close(complete=complete, **summary))
        if complete and not self.error:
            for mark in self._marks:
                mark.unlink(missing_ok=True)

    def _each(self, action: Callable[[Writer], None]) -> None:
        if self._standard:
            action(self._standard)
        for path, writer in list(self._writers.items()):
            try:
                action(writer)
            except OSError as error:
                self._failed(path, error)
                self._writers.pop(path).abandon()

    def _failed(self, path: Path, error: OSError) -> None:
        self.error = self.error or f"{readable(path)}: cannot be written ({error.strerror})"


class Outputs:
    """Where the transcripts of audio files go, by `--output` and `--format`, with subtitles within `limits`.

    Neither: text on stdout. Formats alone: beside the audio. A folder: into it, with the audio's name.
    While a file is being written, a file with its name + ".unfinished" is beside it.
    Raises UserError where the options contradict each other.
    """

    def __init__(self, output: str | None, formats: list[str] | None, limits: Limits):
        self._output, self._formats, self._limits = output, formats or [], limits
        self._one_file = output not in (None, "-") and not (Path(output).is_dir() or output.endswith(("/", os.sep)))
        self.to_screen = output is None and not formats  # plain text on stdout
        if len(self._formats) > 1 and (self._one_file or output == "-"):
            raise UserError(f"{output}: one output for {len(self._formats)} formats; write a folder with / at its end")
        self._forms = self._formats or [format_of(output) if self._one_file else "txt"]

    def check(self, names: list[str]) -> None:
        """Raise UserError where two of the audio files `names` would be written to one file, or one over another."""
        taken: dict[Path, str] = {}
        audio = {os.path.realpath(name) for name in names}
        for name in names:
            for path in self.files(name):
                if taken.setdefault(path, name) != name:
                    raise UserError(f"{path}: the transcript of both {taken[path]} and {name}; name a folder for each")
                if os.path.realpath(path) in audio:
                    raise UserError(f"{path}: is an audio file; choose another file for {name} with --output")

    def files(self, name: str) -> dict[Path, str]:
        """Return the files for the transcript of audio file `name` with their formats; none if it goes to stdout."""
        if self._output == "-" or self.to_screen:
            return {}
        if self._one_file:
            return {Path(self._output): self._forms[0]}
        stem = Path("stdin" if name == "-" else name)
        folder = stem.parent if self._output is None else Path(self._output)
        return {folder / f"{stem.stem}.{form}": form for form in self._forms}

    def complete(self, name: str) -> bool:
        """Does the transcript of `name` exist already, and is it complete?"""
        paths = self.files(name)
        return bool(paths) and all(map(os.path.exists, paths)) and not any(map(os.path.exists, map(unfinished, paths)))

    def open(self, name: str) -> Transcript:
        """Open the transcript of `name`; it has no files where plain text goes to the screen."""
        return Transcript(self.files(name), self._forms[0] if self._output == "-" else None, self._limits)

    def fail(self, name: str, error: str) -> None:
        """Report in the JSON lines on stdout that audio file `name` cannot be read. Files are not changed."""
        if self._output == "-" and self._formats == ["jsonl"]:
            self.open(name).close(False, audio=readable(name), sessions=0, seconds=0.0, error=error)


def readable(name: object) -> str:
    """Return a file's name as text, also where it is not valid UTF-8."""
    return os.fsencode(str(name)).decode(errors="replace")


def unfinished(path: Path) -> Path:
    """Return the name of the file that marks `path` as not finished."""
    return path.with_name(path.name + ".unfinished")


def format_of(path: str | Path) -> str:
    """Return the format that a file's ending names. Raises UserError for an unknown one."""
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in FORMATS:
        endings = ", ".join("." + name for name in FORMATS)
        raise UserError(f"{path}: cannot tell the format; end the name in {endings}, or in / for a folder")
    return ending
