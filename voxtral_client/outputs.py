"""Output of transcripts: stdout, and files beside the audio or in a folder, marked until they are complete."""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from .errors import UserError
from .media import ENDINGS
from .screen import Screen, ScreenWriter
from .subtitles import FORMATS, LIMITS, Limits, Writer
from .timeline import Word


def standard_output(format: str, limits: Limits = LIMITS) -> Writer:
    """Return the writer for standard output. `limits`: of subtitles."""
    return FORMATS[format](sys.stdout.buffer, standard=True, limits=limits)


class Output:
    """One transcript file. It gets its name with its first word: until then an earlier file of that name stays.

    Until the transcript is complete, a file with its name + ".unfinished" is beside it.
    """

    def __init__(self, path: Path, format: str, limits: Limits = LIMITS, overwrite: bool = False):
        """`overwrite`: an earlier file may be replaced. The folder is made. Raises UserError."""
        self.path, self._overwrite, self._mark, self._shown = path, overwrite, unfinished(path), False
        self._memory = BytesIO()
        self._writer = FORMATS[format](self._memory, limits=limits)
        if os.path.lexists(path) and not (overwrite or os.path.isdir(path)):
            raise UserError(f"{path}: exists already; move it away or give another name")
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.exists(self._mark):
                self._mark.touch()
                self._mark.unlink()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    def write(self, word: Word) -> None:
        """Add a final word. Raises OSError; the next call then writes this word too."""
        self._writer.write(word)
        self._show()

    def close(self, complete: bool, **summary: object) -> None:
        """Finish the file, marked unless it is `complete`. JSON formats contain `summary`. Raises OSError."""
        if self._shown or complete or not os.path.lexists(self.path):
            self._show()
            self._writer.close(complete=complete, **summary)
            if complete:
                self._mark.unlink(missing_ok=True)

    def _show(self) -> None:
        """Give the transcript its name."""
        if self._shown:
            return
        if os.path.lexists(self.path) and not self._overwrite:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        new = self.path.with_name(self.path.name + ".new")
        try:
            new.write_bytes(self._memory.getvalue())
            self._mark.touch()
            os.replace(new, self.path)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise
        self._writer.move(open(self.path, "r+b", buffering=0))  # noqa: SIM115
        self._shown = True


class Transcript:
    """The transcript of one recording, on standard output and in files. An error with a file is in `error`."""

    def __init__(self, standard: Writer | ScreenWriter | None, files: list[Output]):
        self._standard, self._files = standard, files
        self._errors: dict[Path, str] = {}

    @property
    def error(self) -> str | None:
        """What is not written, one line."""
        return next(iter(self._errors.values()), None)

    def write(self, word: Word) -> None:
        """Add a final word. Raises OSError for standard output only."""
        if self._standard:
            self._standard.write(word)
        for file in self._files:
            self._attempt(file, lambda file=file: file.write(word))

    def close(self, complete: bool, **summary: object) -> None:
        """Finish the files. `summary`: fields for the JSON formats. Raises OSError as `write` does."""
        if self._standard:
            self._standard.close(complete=complete, **summary)
        for file in self._files:
            self._attempt(file, lambda file=file: file.close(complete, **summary))

    def _attempt(self, file: Output, action: Callable[[], None]) -> None:
        try:
            action()
            self._errors.pop(file.path, None)
        except OSError as error:
            self._errors[file.path] = f"{readable(file.path)}: cannot be written ({error.strerror})"


class Outputs:
    """Where the transcripts of audio files go, by `--output` and `--format`, with subtitles within `limits`.

    Neither: text on stdout. Formats alone: beside the audio. A folder: into it, with the audio's name.
    `overwrite`, `skip`: the files that exist already. Raises UserError where the options contradict each other.
    """

    def __init__(self, output: str | None, formats: list[str] | None, limits: Limits, overwrite: bool, skip: bool):
        self._output, self._formats, self._limits = output, formats or [], limits
        self._overwrite, self._skip = overwrite, skip
        self._one_file = output not in (None, "-") and not (Path(output).is_dir() or output.endswith(("/", os.sep)))
        self._to_screen = output is None and not formats  # plain text on stdout
        if len(self._formats) > 1 and (self._one_file or output == "-"):
            raise UserError(f"{output}: one output for {len(self._formats)} formats; write a folder with / at its end")
        self._forms = self._formats or [format_of(output) if self._one_file else "txt"]
        self._planned: dict[str, list[Output]] = {}
        self._owners: dict[Path, str] = {}

    def plan(self, name: str, audio: set[str]) -> bool:
        """Prepare the files for audio file `name`; return False where all are complete. `audio`: files to be read.

        Raises UserError where one cannot be written.
        """
        planned, files = [], self.files(name)
        if files and name in self._planned:
            return False
        for path, form in files.items():
            if (owner := self._owners.setdefault(path, name)) != name:
                raise UserError(
                    f"{path}: the transcript of both {owner} and {name}; rename one, or choose another folder"
                )
            if os.path.realpath(path) in audio:
                raise UserError(f"{path}: is an audio file; choose another file for {name} with --output")
            replaces = self._overwrite or os.path.exists(unfinished(path))
            if os.path.lexists(path) and not (replaces or os.path.isdir(path)):
                if not self._skip:
                    raise UserError(f"{path}: exists already; --overwrite replaces it, --skip-existing keeps it")
                continue
            planned.append(Output(path, form, self._limits, replaces))
        self._planned[name] = planned
        return bool(planned) or not files

    def files(self, name: str) -> dict[Path, str]:
        """Return the files for the transcript of audio file `name` with their formats; none if it goes to stdout."""
        if self._output == "-" or self._to_screen:
            return {}
        if self._one_file:
            return {Path(self._output): self._forms[0]}
        audio = Path("stdin" if name == "-" else name)
        stem = audio.stem if audio.suffix.lower() in ENDINGS else audio.name
        folder = audio.parent if self._output is None else Path(self._output)
        return {folder / f"{stem}.{form}": form for form in self._forms}

    def open(self, name: str, screen: Screen | None = None) -> Transcript:
        """Open the transcript of `name`: plain text goes to the screen, where there is no other output."""
        standard = ScreenWriter(screen) if self._to_screen else None
        if self._output == "-":
            standard = standard_output(self._forms[0], self._limits)
        return Transcript(standard, self._planned.get(name, []))

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
