#!/usr/bin/env python3
"""Transcribe audio files with the realtime server: text on stdout or into files, everything else on stderr."""

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

from rich.progress_bar import ProgressBar
from rich.table import Table

from voxtral_client.audio import RATE, AudioError, AudioFile, AudioSource, StandardInput
from voxtral_client.cli import Interrupts, add_server_options, run, server_from
from voxtral_client.pool import Piece, Pool, cut, whole
from voxtral_client.screen import Screen
from voxtral_client.subtitles import FORMATS, Outputs
from voxtral_client.timeline import Word
from voxtral_client.transcriber import Transcriber

SUFFIXES = set(
    ".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .w64 .rf64 "  # libsndfile
    ".mp4 .m4a .m4b .mkv .mka .webm .mov .aac .wma .ac3 .3gp .avi .ts .mpg".split()  # ffmpeg
)
PARALLEL = 16  # sessions at once at most, if nothing is said


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="audio file, folder, or - for standard input")
    parser.add_argument("--audio_path", action="append", default=[], metavar="PATH", help="the same")
    parser.add_argument("--raw", type=int, metavar="RATE", help="standard input is raw PCM16 mono at RATE")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there: a file, a folder, or - for stdout")
    parser.add_argument(
        "-f",
        "--format",
        action="append",
        choices=FORMATS,
        help="beside the audio, or where --output says; may be given several times (default: by --output's ending)",
    )
    parser.add_argument("--skip-existing", action="store_true", help="leave files alone whose output is complete")
    parser.add_argument(
        "--parallel", type=int, metavar="N", help=f"sessions at once (default: as many as free, {PARALLEL} at most)"
    )
    parser.add_argument("--realtime", action="store_true", help="send no faster than a microphone would")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_server_options(parser)
    options = parser.parse_args(argv)
    options.paths += options.audio_path
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
    except ValueError as error:
        parser.error(str(error))
    return options


def find(paths: list[str]) -> list[str]:
    """Return the files that `paths` name, those of folders sorted by name. Raises AudioError."""
    found = []
    for path in paths:
        inside = sorted(str(p) for p in Path(path).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if path != "-" and Path(path).is_dir() and not inside:
            raise AudioError(f"{path}: no audio files in this folder")
        found += inside if path != "-" and Path(path).is_dir() else [path]
    return found


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
    names = find(options.paths)
    if options.skip_existing:
        skipped = [name for name in names if outputs.complete(name)]
        names = [name for name in names if name not in skipped]
        print(f"{len(skipped)} already transcribed", file=sys.stderr)
    outputs.check(names)
    failures, sources = 0, []
    for name in names:
        try:
            sources.append(StandardInput(options.raw) if name == "-" else AudioFile(name))
        except AudioError as error:
            failures += 1
            outputs.fail(name, str(error))
            print(f"error: {error}", file=sys.stderr)
    if not sources:
        return 1 if failures else 0
    unknown = any(source.seconds is None for source in sources)
    total = None if unknown else sum(source.seconds for source in sources)
    one_by_one = options.realtime or "-" in names
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
        pool = Pool(make, size, interrupts.stop, options.realtime)
        started = time.monotonic()

        async def redraw() -> None:
            while True:
                screen.show(pool.tail, progress(pool.understood, total, started))
                await asyncio.sleep(0.2)

        drawing = asyncio.create_task(redraw())
        try:
            async with aclosing(pool.run(pieces(sources, size))) as items:
                failures += await write(items, sources, outputs, screen)
        finally:
            drawing.cancel()
        took = time.monotonic() - started
        files = f"{len(sources)} files, " if len(sources) > 1 else ""
        screen.say(
            f"{files}{pool.heard:.1f} s of audio in {took:.1f} s: {pool.heard / took:.1f} × real time; "
            f"{pool.sessions} sessions, {pool.prompt_tokens} prompt tokens, {pool.completion_tokens} completion tokens"
            + (f"; {failures} failed" if failures else "")
        )
    return 1 if failures else 0


def pieces(sources: list[AudioSource], size: int) -> Iterator[Piece]:
    """Yield the pieces of all files, each read when it is asked for."""
    for number, source in enumerate(sources):
        yield from cut(number, source) if size > 1 else whole(number, source)


async def write(items: AsyncIterator, sources: list[AudioSource], outputs: Outputs, screen: Screen) -> int:
    """Write each file's words as they come; return how many files failed."""
    failed: dict[int, str] = {}  # what went wrong, by number of the file
    writers, current, started, any_text = [], None, 0.0, False
    async for piece, item in items:
        name = sources[piece.file].name
        if current != piece.file:
            current, writers, started, any_text = piece.file, outputs.open(name), time.monotonic(), False
            sessions, usage = 0, {"prompt_tokens": 0, "completion_tokens": 0}
        if isinstance(item, Word):
            for writer in writers:
                writer.write(item)
            if outputs.to_screen:
                screen.write(item.text if any_text else item.text.lstrip())
            any_text = True
            continue
        if item is not None:
            failed.setdefault(piece.file, str(item))
            screen.say(f"error: {item}")
        sessions += piece.transcriber.sessions
        for key in usage:
            usage[key] += getattr(piece.transcriber, key)
        if piece.last:
            if outputs.to_screen and any_text:
                screen.write("\n")
            seconds = piece.offset / RATE + piece.transcriber.timeline.heard / RATE
            took = time.monotonic() - started
            summary = {"seconds": round(seconds, 3), "took": round(took, 3), "speed": round(seconds / took, 2)}
            whole_file = piece.file not in failed
            if not whole_file:
                summary["error"] = failed[piece.file]
            outputs.close(
                name, writers, whole_file, audio=name, complete=whole_file, sessions=sessions, usage=usage, **summary
            )
    return len(failed)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run(transcribe(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
