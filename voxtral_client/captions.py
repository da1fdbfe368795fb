"""Live captions of a microphone with the realtime server: text on stdout, everything else on stderr."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path

from rich.text import Text

from . import UserError
from .cli import Interrupts, Parser, add_cue_options, add_server_options, run, seconds, server_from
from .microphone import Microphone, choose, devices, silence_libraries
from .outputs import writer_for
from .protocol import RATE
from .recording import Recording
from .screen import Screen
from .subtitles import FORMATS
from .timeline import Word
from .transcriber import Transcriber

PATIENCE_SECONDS = 3600.0  # a talk goes on while the server is away
PARAGRAPH_SECONDS = 2.0  # a pause that begins a new line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 where they make no sense."""
    parser = Parser(__doc__)
    parser.add_argument("-l", "--list-devices", action="store_true", help="show the input devices and exit")
    parser.add_argument("-d", "--device", metavar="NUMBER|NAME", help="number or part of the name (default: system's)")
    parser.add_argument("--channels", type=int, metavar="N", help="channels to record and mix down (default: 1)")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="captions in a new file, written live; its ending says the format",
    )
    parser.add_argument(
        "-f", "--format", choices=FORMATS, help="format of stdout (default: plain text), or of --output's file"
    )
    parser.add_argument("--record", metavar="FILE", help="keep what is heard in a new file: .wav or .flac")
    parser.add_argument("--max-duration", type=seconds, metavar="SECONDS", help="stop after so long")
    parser.add_argument("--quiet", action="store_true", help="no status line")
    add_cue_options(parser)
    add_server_options(parser)
    parser.set_defaults(give_up_after=PATIENCE_SECONDS)
    options = parser.parse_args(argv)
    if options.channels is not None and options.channels < 1:
        parser.error(f"--channels {options.channels}: must be at least 1")
    if options.output == "-":
        options.output, options.format = None, options.format or "txt"
    for path, endings in ((None if options.format else options.output, FORMATS), (options.record, ("wav", "flac"))):
        if path and Path(path).suffix.lower().lstrip(".") not in endings:
            parser.error(f"{path}: cannot tell the format; end the name in {', '.join('.' + name for name in endings)}")
    return options


def hms(duration: float) -> str:
    """Return seconds as H:MM:SS."""
    return f"{duration // 3600:.0f}:{duration // 60 % 60:02.0f}:{duration // 1 % 60:02.0f}"


class Captions:
    """One run: from the microphone through the server to the screen and the files."""

    def __init__(self, options: argparse.Namespace, screen: Screen):
        self.options, self.screen, self.files = options, screen, []
        self.complete = False  # it ended by Ctrl+C or --max-duration, the last words came, and no audio was lost
        self.missing = False  # audio was lost
        self.plain = not options.format or bool(options.output)  # stdout gets plain text
        server = server_from(options)
        self.microphone = Microphone(options.device, options.channels, screen.say)
        settings = {"model": options.model, "give_up_after": options.give_up_after, "notify": self.notify}
        self.transcriber = Transcriber(server, live=True, **settings)
        self.state, self.losing, self.last_end, self.fresh = "CONNECTING", False, 0.0, True

    def notify(self, state: str, message: str) -> None:
        """Say what changed, once."""
        lost = self.transcriber.lost
        if state == "LOST":
            if not self.losing:
                self.screen.say("the server has been away for too long: from now on the oldest audio is lost")
            self.losing = self.missing = True
            return
        if message and (state == "CONNECTING" or self.state != "WAITING"):
            self.screen.say(message)
        elif state == "LISTENING" and self.state == "WAITING":
            missing = f"; lost: audio from {hms(lost[0][0])} to {hms(lost[-1][1])}" if lost else ""
            self.screen.say(f"connected again{missing}")
            self.losing = False
            lost.clear()
        self.state = state

    def status(self, elapsed: float) -> Text:
        """Return the status line: state, level from -60 dB to 0, elapsed time, lag, device."""
        microphone = self.microphone
        state = self.state if microphone.connected else "NO DEVICE"
        color = {"LISTENING": "green", "CONNECTING": "yellow"}.get(state, "red")
        filled = max(0, min(12, round((microphone.level + 60) / 5)))
        meter = ("━" * filled, "green" if microphone.level < -3 else "red"), ("━" * (12 - filled), "bright_black")
        line = Text.assemble((f"● {state.lower():10}", color), *meter, f" {microphone.level:4.0f} dB  ", no_wrap=True)
        return line.append(f"{hms(elapsed)}  lag {self.transcriber.lag:.1f} s  {microphone.device.name}", "dim")

    async def redraw(self) -> None:
        """Keep the partial words and the status line up to date."""
        started = time.monotonic()
        while True:
            partial = "".join(word.text for word in self.transcriber.timeline.partial)
            self.screen.show(partial.lstrip() if self.fresh else partial, self.status(time.monotonic() - started))
            await asyncio.sleep(0.2)

    def store(self, file: object, item: object = None) -> None:
        """Write to a file that was asked for, or close it; where that fails, the captions go on without it."""
        try:
            if file in self.files:
                if item is not None:
                    file.write(item)
                elif file is self.writer:
                    file.close(complete=self.complete)
                else:
                    file.close()
        except OSError as error:
            if file is self.writer and not self.options.output:
                raise  # standard output
            self.files.remove(file)
            name = self.options.record if isinstance(file, Recording) else self.options.output
            self.screen.say(f"{name}: {error.strerror or error}; going on without it")
            with suppress(OSError):
                file.close()

    def write(self, word: Word) -> None:
        """Print a final word, after a pause on a new line."""
        self.store(self.writer, word)
        if not self.plain:
            return
        if not self.fresh and word.start - self.last_end > PARAGRAPH_SECONDS:
            self.screen.write("\n")
            self.fresh = True
        self.screen.write(word.text.lstrip() if self.fresh else word.text)
        self.fresh, self.last_end = False, word.end

    async def audio(self, stop: asyncio.Event) -> AsyncIterator[bytes]:
        """Yield what the microphone hears, and record it."""
        async with aclosing(self.microphone.chunks(stop)) as chunks:
            async for pcm in chunks:
                self.store(self.recording, pcm)
                yield pcm

    def open_files(self) -> None:
        """Open the files that were asked for. Raises UserError or OSError; then none is left behind."""
        self.recording = Recording(self.options.record) if self.options.record else None
        try:
            place = self.options.output or (None if self.plain else "-")
            self.writer = writer_for(place, self.options.format, new=True) if place else None
        except (UserError, OSError):
            if self.recording:
                self.recording.close()
            raise
        self.files = [file for file in (self.recording, self.writer) if file]

    async def run(self) -> int:
        """Caption until Ctrl+C or --max-duration, and return the exit code."""
        await self.transcriber.open()
        self.open_files()
        interrupts = Interrupts(self.screen.say)
        if self.options.max_duration:
            asyncio.get_running_loop().call_later(self.options.max_duration, interrupts.stop.set)
        drawing = asyncio.create_task(self.redraw())
        timeline = self.transcriber.timeline
        try:
            async with aclosing(self.transcriber.words(self.audio(interrupts.stop))) as words:
                async for word in words:
                    self.write(word)
            self.complete = not (self.missing or self.microphone.dropped)
        finally:
            drawing.cancel()
            for word in timeline.partial:  # no session will replace it any more
                self.write(word)
            self.screen.write("" if self.fresh else "\n")
            for file in list(self.files):
                self.store(file)
            if self.options.output and not timeline.heard:
                Path(self.options.output).unlink(missing_ok=True)  # it would only be in the way
        dropped = f", {self.microphone.dropped} blocks of audio lost" if self.microphone.dropped else ""
        self.screen.say(f"{hms(timeline.heard / RATE)} heard, {self.transcriber.sessions} sessions{dropped}")
        return 0


async def caption(options: argparse.Namespace) -> int:
    """Do what the options say and return the exit code."""
    if options.list_devices:
        found = devices()
        for device in found:
            mark = "*" if device == choose(None, found) else " "
            print(f"{mark}{device.number:3} {device.name} ({device.host})")
        return 0
    with Screen(options.quiet) as screen:
        return await Captions(options, screen).run()


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    options = parse(argv)
    silence_libraries()
    return run(caption(options))
