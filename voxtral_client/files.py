"""Transcribe audio files with the realtime server: text on stdout or into files, everything else on stderr."""

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

from rich.progress_bar import ProgressBar
from rich.table import Table

from . import UserError
from .audio import AudioError
from .cli import Interrupts, Parser, add_cue_options, add_server_options, fault, run, server_from
from .media import AudioFile, AudioSource, StandardInput, is_audio
from .outputs import Outputs, Transcript, readable
from .pool import Piece, Pool, Stopped, cut, uncut
from .protocol import RATE
from .screen import Screen
from .subtitles import FORMATS
from .timeline import Word
from .transcriber import Transcriber

SUFFIXES = set(
    ".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .w64 .rf64 .mp4 .m4a .m4b .m4v .mkv .mka .webm .mov "
    ".aac .wma .ac3 .3gp .avi .mpg".split()
)
PARALLEL = 64  # sessions at once at most, if nothing is said


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 where they make no sense."""
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="audio file, folder, or - for standard input")
    parser.add_argument("--audio_path", action="append", default=[], metavar="PATH", help="the same as PATH")
    parser.add_argument("--raw", type=int, metavar="RATE", help="standard input is raw PCM16 mono at RATE")
    parser.add_argument("--track", metavar="N|LANGUAGE", help="audio track (default: the one that the file says)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there: a file, a folder, or - for stdout")
    parser.add_argument(
        "-f",
        "--format",
        action="append",
        choices=[*FORMATS, "all"],
        help="beside the audio, or where --output says; may be repeated; all: each (default: by --output's ending)",
    )
    parser.add_argument("--skip-existing", action="store_true", help="leave files alone whose output is complete")
    parser.add_argument(
        "--parallel", type=int, metavar="N", help=f"sessions at once (default: as many as free, {PARALLEL} at most)"
    )
    parser.add_argument("--realtime", action="store_true", help="send no faster than a microphone would")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_cue_options(parser)
    add_server_options(parser)
    options = parser.parse_args(argv)
    options.paths += options.audio_path
    if options.format and "all" in options.format:
        options.format = list(FORMATS)
    if not options.paths:
        parser.error("which file? give at least one PATH")
    if options.raw is not None and (options.paths != ["-"] or options.raw <= 0):
        parser.error("--raw RATE goes with - alone")
    if options.parallel is not None and options.parallel < 1:
        parser.error("--parallel must be 1 or more")
    if options.skip_existing and not options.format and options.output in (None, "-"):
        parser.error("--skip-existing needs files to look for: give --format or --output")
    try:
        options.outputs = Outputs(options.output, options.format)
    except UserError as error:
        parser.error(str(error))
    return options


def find(paths: list[str]) -> Iterator[str]:
    """Yield the files that `paths` name, those of folders sorted by name. Raises AudioError for an empty folder."""
    for path in paths:
        if path == "-" or not os.path.isdir(path):
            yield path
            continue
        # By the name only so far that a broken one is told; else the content says what it is.
        inside = sorted(
            p for p in files_in(path) if Path(p).suffix.lower() in SUFFIXES or os.path.isdir(p) or is_audio(Path(p))
        )
        if not inside:
            raise AudioError(f"{path}: no audio files in this folder")
        yield from inside


def files_in(folder: str) -> list[str]:
    """Return all files below a folder but the hidden ones (AppleDouble's ._x too). Links are followed, once.

    A folder that cannot be read is named as if it were a file, so that it is told.
    """
    found: list[str] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        found.append(error.filename)

    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and os.path.realpath(place) not in seen]
        if os.path.realpath(place) not in seen:
            found += [os.path.join(place, name) for name in names if not name.startswith(".")]
        seen.add(os.path.realpath(place))
    return [path for path in found if os.path.isfile(path) or os.path.isdir(path)]


def progress(done: float, total: float | None, started: float) -> Table:
    """Return the progress line: bar, position, speed in multiples of real time, time left."""
    line = Table.grid(padding=(0, 1))
    speed = done / max(time.monotonic() - started, 1e-3)
    if total is None:
        line.add_row(f"{done:.0f} s {speed:.1f} × real time")
    else:
        left = f", {(total - done) / speed:.0f} s left" if 0 < done < total else ""
        text = f"{done:.0f}/{total:.0f} s {speed:.1f} × real time{left}"
        line.add_row(ProgressBar(total, min(done, total), width=30), text)
    return line


async def transcribe(options: argparse.Namespace) -> int:
    """Transcribe all files and return the exit code."""
    server, outputs = server_from(options), options.outputs
    names = list(find(options.paths))
    if options.skip_existing:
        skipped = {name for name in names if outputs.complete(name)}
        names = [name for name in names if name not in skipped]
        print(f"{len(skipped)} already transcribed", file=sys.stderr)
    outputs.check(names)
    failures, sources = 0, []
    for name in names:
        try:
            source = StandardInput(options.raw, options.track) if name == "-" else AudioFile(name, options.track)
            sources.append((source, source.seconds))
        except Exception as problem:
            error = str(problem) if isinstance(problem, AudioError) else f"{name}: {fault(problem)}"
            failures += 1
            outputs.fail(name, error)
            print(f"error: {error}", file=sys.stderr)
    if not sources:
        return 1 if failures else 0
    sources, durations = zip(*sources, strict=True)
    total = None if None in durations else sum(durations)
    one_by_one = options.realtime or any(source.endless for source in sources)
    size = 1 if one_by_one else options.parallel or PARALLEL

    with Screen(options.quiet) as screen:
        said = ""

        def notify(state: str, message: str) -> None:
            nonlocal said
            if message and message != said:
                screen.say(message)
            said = message or said

        numbers = itertools.count(1)

        def make(impatient: bool) -> Transcriber:
            settings = {"model": options.model, "give_up_after": options.give_up_after, "notify": notify}
            return Transcriber(server, numbers=numbers, impatient=impatient, **settings)

        await make(False).open()  # says at once what is wrong
        interrupts = Interrupts(screen.say)
        pool = Pool(make, size, interrupts.stop, options.realtime, screen.say)
        started = time.monotonic()

        async def redraw() -> None:
            while True:
                screen.show(pool.partial, progress(pool.transcribed, total, started))
                await asyncio.sleep(0.2)

        drawing = asyncio.create_task(redraw())
        transcripts = Transcripts(sources, outputs, screen)
        try:
            async with aclosing(pool.run(pieces(sources, pool))) as items:
                await transcripts.write(items)
        finally:
            transcripts.close()
            drawing.cancel()
        took = time.monotonic() - started
        failures += len(transcripts.failed)
        if left := len(sources) - transcripts.begun:
            screen.say(f"{left} {'file was' if left == 1 else 'files were'} not begun")
            failures += 0 if interrupts.stop.is_set() else left
        if pool.received:
            files = f"{len(sources)} files, " if len(sources) > 1 else ""
            screen.say(
                f"{files}{pool.received:.1f} s of audio in {took:.1f} s: {pool.received / took:.1f} × real time; "
                f"{pool.sessions} sessions, {pool.prompt_tokens} prompt tokens, "
                f"{pool.completion_tokens} completion tokens" + (f"; {failures} failed" if failures else "")
            )
    if interrupts.stop.is_set() and (transcripts.stopped or left):
        return 130
    return 1 if failures else 0


def pieces(sources: list[AudioSource], pool: Pool) -> Iterator[Piece]:
    """Yield the pieces of all files, each read when it is asked for."""
    for number, source in enumerate(sources):
        yield from cut(number, source, lambda: pool.width) if pool.size > 1 else uncut(number, source)


class Transcripts:
    """Writes each file's words as they come. Trouble with a file is a line, and the next file goes on."""

    def __init__(self, sources: list[AudioSource], outputs: Outputs, screen: Screen):
        self._sources, self._outputs, self._screen = sources, outputs, screen
        self.failed: dict[int, str] = {}  # number of a file, what went wrong
        self.stopped: set[int] = set()  # numbers of files that Ctrl+C cut short
        self.begun = 0
        self._file: Transcript | None = None
        self._said: set[str] = set()

    async def write(self, items: AsyncIterator) -> None:
        """Write what the pool yields. Raises OSError where standard output does not take it."""
        async for piece, item in items:
            if self.begun != piece.file + 1:
                self.close()
                self._open(piece)
            if isinstance(item, Word):
                self._file.write(item)
                if self._outputs.to_screen:
                    self._screen.write(item.text if self._any_text else item.text.lstrip())
                self._any_text = True
                continue
            if isinstance(item, Stopped):
                self.stopped.add(piece.file)
            elif item is not None:
                self._fail(str(item))
            self._count(piece)
            if piece.last:
                self._ended = True
                self.close()

    def close(self) -> None:
        """Finish the file that is being written; it is complete if its last piece came, and all went well."""
        if self._file is None:
            return
        file, self._file, number = self._file, None, self.begun - 1
        if not self._ended and number not in self.failed:
            self.stopped.add(number)
        if self._outputs.to_screen and self._any_text:
            self._screen.write("\n")
        if file.error:
            self._fail(file.error)
        took = time.monotonic() - self._started
        summary = {"audio": readable(self._sources[number].name), "sessions": self._sessions, "usage": self._usage}
        summary |= {"seconds": round(self._seconds, 3), "took": round(took, 3), "speed": round(self._seconds / took, 2)}
        if error := self.failed.get(number) or ("stopped before its end" if number in self.stopped else ""):
            summary["error"] = error
        file.close(not error, **summary)
        if file.error and not error:
            self._fail(file.error)

    def _open(self, piece: Piece) -> None:
        self.begun = piece.file + 1
        self._file = self._outputs.open(self._sources[piece.file].name)
        self._started, self._ended, self._any_text = piece.begun, False, False
        self._sessions, self._seconds, self._usage = 0, 0.0, {"prompt_tokens": 0, "completion_tokens": 0}

    def _count(self, piece: Piece) -> None:
        transcriber = piece.transcriber
        self._seconds = (piece.offset + transcriber.timeline.received) / RATE
        self._sessions += transcriber.sessions
        for key in self._usage:
            self._usage[key] += getattr(transcriber, key)

    def _fail(self, error: str) -> None:
        self.failed.setdefault(self.begun - 1, error)
        if error not in self._said:
            self._screen.say(f"error: {error}")
        self._said.add(error)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run(transcribe(parse(argv)))
