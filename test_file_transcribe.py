#!/usr/bin/env python3
"""Transcribe an audio file with the realtime server: text on stdout, everything else on stderr."""

import argparse
import asyncio
import sys
import time
from contextlib import aclosing

from rich.progress_bar import ProgressBar
from rich.table import Table

from voxtral_client.audio import RATE, AudioFile, stream
from voxtral_client.cli import Interrupts, add_server_options, run, server_from
from voxtral_client.screen import Screen
from voxtral_client.transcriber import Transcriber


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audio_path", required=True, metavar="FILE", help="WAV, FLAC, OGG, MP3, ...")
    parser.add_argument("--realtime", action="store_true", help="send no faster than a microphone would")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_server_options(parser)
    return parser.parse_args(argv)


def progress(done: float, total: float, started: float) -> Table:
    """Return the progress line: bar, position, speed in multiples of real time."""
    line = Table.grid(padding=(0, 1))
    speed = done / max(time.monotonic() - started, 1e-3)
    line.add_row(ProgressBar(total, min(done, total), width=30), f"{done:.0f}/{total:.0f} s {speed:.1f} × real time")
    return line


async def transcribe(options: argparse.Namespace) -> int:
    """Transcribe one file and return the exit code."""
    file, server = AudioFile(options.audio_path), server_from(options)
    with Screen(options.quiet) as screen:

        def notify(state: str, message: str) -> None:
            if state in ("WAITING", "LOST") or (state == "CONNECTING" and transcriber.timeline.session and message):
                screen.say(message)

        transcriber = Transcriber(server, model=options.model, give_up_after=options.give_up_after, notify=notify)
        timeline, started = transcriber.timeline, time.monotonic()
        await transcriber.open()
        interrupts = Interrupts(screen.say)

        async def redraw() -> None:
            while True:
                tail = "".join(word.text for word in timeline.tail)
                screen.show(tail, progress(timeline.understood / RATE, file.seconds, started))
                await asyncio.sleep(0.2)

        drawing = asyncio.create_task(redraw())
        text = ""
        chunks = stream(file.blocks(), options.realtime, interrupts.stop)
        try:
            async with aclosing(transcriber.words(chunks)) as words:
                async for word in words:
                    screen.write(word.text if text else word.text.lstrip())
                    text += word.text
        finally:
            drawing.cancel()
            rest = "".join(word.text for word in timeline.tail)  # no session will replace it any more
            screen.write((rest if text else rest.lstrip()) + ("\n" if text + rest else ""))
        seconds, took = timeline.heard / RATE, time.monotonic() - started
        screen.say(
            f"{seconds:.1f} s of audio in {took:.1f} s: {seconds / took:.1f} × real time; "
            f"{timeline.session} sessions, {transcriber.prompt_tokens} prompt tokens, "
            f"{transcriber.completion_tokens} completion tokens"
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run(transcribe(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
