"""Transcribe audio files with the realtime server: text on stdout or into files, everything else on stderr."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

from rich.progress_bar import ProgressBar
from rich.table import Table

from .audio import threaded
from .cli import Interrupts, Parser, add_cue_options, add_server_options, count, many, run, server_from
from .errors import AudioError, Stopped, UserError, fault
from .media import TELEPHONE, AudioFile, StandardInput, is_audio
from .outputs import Outputs, Transcript, readable
from .pool import PARALLEL, TOKENS, Piece, Pool, cut, sessions_for_files, uncut
from .protocol import RATE
from .screen import Screen
from .session import printable
from .subtitles import FORMATS, Limits
from .timeline import Word

SUFFIXES = set(TELEPHONE) | set(
    ".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .w64 .rf64 .mp4 .m4a .m4b .m4v .mkv .mka .webm .mov "
    ".aac .wma .ac3 .3gp .avi .mpg .g722 .gsm".split()
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 for wrong usage."""
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="audio file, folder, or - for standard input")
    parser.add_argument("--audio_path", action="append", default=[], metavar="PATH", help="the same as PATH")
    parser.add_argument("--raw", type=count, metavar="RATE", help="standard input is raw PCM16 mono at RATE")
    parser.add_argument("--track", metavar="N|LANGUAGE", help="audio track (default: the file's default track)")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write: a file, a folder, or - for stdout")
    parser.add_argument(
        "-f",
        "--format",
        action="append",
        choices=[*FORMATS, "all"],
        help="format of a file beside the audio, or of --output; may be repeated; all: every one (default: by ending)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="skip files whose output is complete")
    existing.add_argument("--overwrite", action="store_true", help="replace complete output (default: keep it)")
    usual = f"all but one of the server's, {PARALLEL} at most"
    parser.add_argument("--parallel", type=count, metavar="N", help=f"sessions at once (default: {usual})")
    parser.add_argument("--realtime", action="store_true", help="send no faster than a microphone would")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_cue_options(parser)
    add_server_options(parser)
    options = parser.parse_args(argv)
    options.paths += options.audio_path
    if options.format and "all" in options.format:
        options.format = list(FORMATS)
    if not options.paths:
        parser.error("no file given: name at least one PATH")
    if options.raw and options.paths != ["-"]:
        parser.error("--raw RATE goes with - alone")
    if options.skip_existing and not options.format and options.output in (None, "-"):
        parser.error("--skip-existing needs files to look for: give --format or --output")
    try:
        limits = Limits(options.max_line_count, options.max_line_width)
        options.outputs = Outputs(options.output, options.format, limits, options.overwrite, options.skip_existing)
    except UserError as error:
        parser.error(str(error))
    return options


def find(paths: list[str]) -> Iterator[str]:
    """Yield the files that `paths` name, those of folders sorted by name. Raises AudioError for an empty folder."""
    for path in paths:
        if path == "-" or not os.path.isdir(path):
            yield path
            continue
        # The ending decides too: so a broken file or link is reported. Folders in the list cannot be read.
        inside = sorted(
            p for p in files_in(path) if Path(p).suffix.lower() in SUFFIXES or os.path.isdir(p) or is_audio(Path(p))
        )
        if not inside:
            raise AudioError(f"{path}: no audio files in this folder")
        yield from inside


def files_in(folder: str) -> list[str]:
    """Return all files below a folder except hidden ones (also AppleDouble's ._x). Links are followed, once.

    A folder that cannot be read is in the list as if it were a file, so that it is reported.
    """
    found: list[str] = []
    seen: set[str] = set()
    for path, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: found.append(error.filename)):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.extend(os.path.join(path, name) for name in names if not name.startswith("."))
    return [path for path in found if os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path)]


def sources(options: argparse.Namespace) -> Iterator[tuple[str, AudioFile | None, str]]:
    """Yield the name of each file, and the file if it is to be transcribed, or why it cannot be."""
    names = list(find(options.paths))
    audio = set(map(os.path.realpath, names))
    for name in names:
        source, error = None, ""
        try:
            if options.outputs.plan(name, audio):
                source = StandardInput(options.raw, options.track) if name == "-" else AudioFile(name, options.track)
                _ = source.seconds
        except Exception as problem:
            source, error = None, str(problem) if isinstance(problem, UserError) else f"{name}: {fault(problem)}"
        yield name, source, error


def progress(pool: Pool, total: float | None) -> Table:
    """Return the progress line: bar, position, speed in multiples of real time, time left."""
    line, done = Table.grid(padding=(0, 1)), pool.transcribed
    speed = done / max(time.monotonic() - pool.started, 1e-3)
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
    files, failures, complete = [], 0, 0
    async with aclosing(threaded(sources(options), 64)) as found:
        async for name, source, error in found:
            if source:
                files.append(source)
            elif error:
                failures += 1
                outputs.fail(name, error)
                print(f"error: {printable(error)}", file=sys.stderr)
            else:
                complete += 1
    if options.skip_existing:
        print(f"{complete} already transcribed", file=sys.stderr)
    if not files:
        return 1 if failures else 0
    durations = [source.seconds for source in files]
    total = None if None in durations else sum(durations)
    one_by_one = options.realtime or any(source.endless for source in files)

    with Screen(options.quiet) as screen:
        size = await sessions_for_files(server, options.model)  # reports at once what is wrong
        size = 1 if one_by_one else options.parallel or size
        interrupts = Interrupts(screen.say)
        settings = {"model": options.model, "give_up_after": options.give_up_after}
        pool = Pool(server, size, interrupts.stop, screen.say, options.realtime, **settings)
        writing = Writing(files, pool, outputs, screen)
        async with screen.redrawn(lambda: (pool.partial, progress(pool, total))):
            try:
                async with aclosing(pool.run(pieces(files, pool))) as items:
                    await writing.write(items)
            finally:
                writing.close()
        failures += len(writing.failed)
        if left := len(files) - writing.begun:
            screen.say(f"{left} {'file was' if left == 1 else 'files were'} not started")
            failures += 0 if interrupts.stop.is_set() else left
        if pool.received:
            size = f"{len(files)} files, " if len(files) > 1 else ""
            total = sum(pool.counts.values(), Counter())
            counts = ", ".join(many(total[key], key.replace("_", " ")) for key in ("sessions", *TOKENS))
            screen.say(f"{size}{pool.speed}; {counts}" + (f"; {failures} failed" if failures else ""))
    if interrupts.stop.is_set() and (writing.stopped or left):
        return 130
    return 1 if failures else 0


def pieces(sources: list[AudioFile], pool: Pool) -> Iterator[Piece]:
    """Yield the pieces of all files. Each piece is read when it is requested."""
    for number, source in enumerate(sources):
        yield from cut(number, source, lambda: pool.width) if pool.size > 1 else [uncut(number, source)]


class Writing:
    """Writes each file's words as they come. An error with one file is reported, and the next file continues."""

    def __init__(self, sources: list[AudioFile], pool: Pool, outputs: Outputs, screen: Screen):
        self._sources, self._pool, self._outputs, self._screen = sources, pool, outputs, screen
        self.failed: dict[int, str] = {}  # number of a file, its first error
        self.stopped: set[int] = set()  # numbers of files that Ctrl+C cut short
        self.begun = 0
        self._file: Transcript | None = None
        self._reported: set[str] = set()

    async def write(self, items: AsyncIterator[tuple[Piece, Word | Exception | None]]) -> None:
        """Write what the pool yields. Raises OSError for standard output."""
        async for piece, item in items:
            if self.begun != piece.file + 1:
                self.close()
                self.begun = piece.file + 1
                self._file = self._outputs.open(self._sources[piece.file].name, self._screen)
                self._started, self._seconds, self._ended = piece.begun, 0.0, False
            if isinstance(item, Word):
                self._file.write(item)
                continue
            problem = "" if isinstance(item, Stopped | None) else str(item)
            if problem:
                self.failed.setdefault(piece.file, problem)
            elif item:
                self.stopped.add(piece.file)
            self._seconds = piece.offset / RATE + piece.transcriber.received
            if piece.last:
                self._ended = True
                self.close()
            if problem:  # after the text, which has got its newline
                self._report(problem)

    def close(self) -> None:
        """Finish the file that is being written. It is complete if its last piece came, without an error."""
        if self._file is None:
            return
        file, self._file, number = self._file, None, self.begun - 1
        if not self._ended and number not in self.failed:
            self.stopped.add(number)
        if file.error:
            self._fail(file.error)
        took, count = time.monotonic() - self._started, self._pool.counts[number]
        usage = {key: count[key] for key in TOKENS}
        summary = {"audio": readable(self._sources[number].name), "sessions": count["sessions"], "usage": usage}
        summary |= {"seconds": round(self._seconds, 3), "took": round(took, 3), "speed": round(self._seconds / took, 2)}
        if error := self.failed.get(number) or ("stopped before its end" if number in self.stopped else ""):
            summary["error"] = error
        file.close(not error, **summary)
        if file.error and not error:
            self._fail(file.error)

    def _fail(self, error: str) -> None:
        self.failed.setdefault(self.begun - 1, error)
        self._report(error)

    def _report(self, error: str) -> None:
        if error not in self._reported:
            self._screen.say(f"error: {error}")
        self._reported.add(error)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run(transcribe(parse(argv)))
