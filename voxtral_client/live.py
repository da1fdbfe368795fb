"""Live captions of a microphone with the realtime server: text on stdout, everything else on stderr."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from rich.text import Text

from .cli import Interrupts, Parser, add_cue_options, add_server_options, count, many, positive, run, server_from
from .microphone import Microphone, choose, devices, silence_libraries
from .outputs import Output, Transcript, format_of, standard_output
from .recording import Recording
from .screen import Screen, ScreenWriter
from .subtitles import FORMATS, Limits
from .timeline import Word
from .transcriber import Transcriber

GIVE_UP_SECONDS = 3600.0  # a talk continues while the server is away
PARAGRAPH_SECONDS = 2.0  # a longer pause begins a new line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 for wrong usage."""
    parser = Parser(__doc__)
    parser.add_argument("-l", "--list-devices", action="store_true", help="show the input devices and exit")
    parser.add_argument("-d", "--device", metavar="NUMBER|NAME", help="number or part of the name (default: system's)")
    parser.add_argument("--channels", type=count, metavar="N", help="channels to record and mix down (default: 1)")
    parser.add_argument("-o", "--output", metavar="FILE", help="new file for captions; its ending gives the format")
    parser.add_argument(
        "-f", "--format", choices=FORMATS, help="format of stdout (default: plain text), or of --output's file"
    )
    parser.add_argument("--record", metavar="FILE", help="record the audio into a new file: .wav or .flac")
    parser.add_argument("--max-duration", type=positive, metavar="SECONDS", help="stop after this time")
    parser.add_argument("--quiet", action="store_true", help="no status line")
    add_cue_options(parser)
    add_server_options(parser, GIVE_UP_SECONDS)
    options = parser.parse_args(argv)
    if options.output == "-":
        options.output, options.format = None, options.format or "txt"
    for path, endings in ((None if options.format else options.output, FORMATS), (options.record, ("wav", "flac"))):
        if path and Path(path).suffix.lower().lstrip(".") not in endings:
            parser.error(f"{path}: cannot tell the format; end the name in {', '.join('.' + name for name in endings)}")
    return options


def hms(duration: float) -> str:
    """Return seconds as H:MM:SS."""
    return f"{duration // 3600:.0f}:{duration // 60 % 60:02.0f}:{duration // 1 % 60:02.0f}"


class Live:
    """One run: from the microphone through the server to the screen and the files.

    Raises AudioError where there is no such device, Refused where the options name no server.
    """

    def __init__(self, options: argparse.Namespace, screen: Screen):
        self.options, self.screen = options, screen
        self.complete = False  # Ctrl+C or --max-duration ended it, the last words came, and no audio is missing
        server = server_from(options)
        self.microphone = Microphone(options.device, options.channels, screen.say)
        settings = {"model": options.model, "give_up_after": options.give_up_after, "notify": self.notify}
        self.transcriber = Transcriber(server, live=True, **settings)
        self.state, self.reported, self.started = "CONNECTING", 0, time.monotonic()
        self.told: set[str] = set()  # errors with files
        self.text = ScreenWriter(screen, PARAGRAPH_SECONDS)

    def notify(self, state: str, message: str) -> None:
        """Report a change of state to the user, once."""
        missing = self.transcriber.missing[self.reported :]
        if state == "AUDIO_LOST":
            if len(missing) == 1:
                self.screen.say("the server has been away for too long: from now on the oldest audio is lost")
            return
        if message and (state == "CONNECTING" or self.state != "WAITING"):
            self.screen.say(message)
        elif state == "LISTENING" and self.state == "WAITING":
            lost = f"; lost: audio from {hms(missing[0][0])} to {hms(missing[-1][1])}" if missing else ""
            self.screen.say(f"connected again{lost}")
            self.reported += len(missing)
        self.state = state

    def live(self) -> tuple[str, Text]:
        """Return the partial text and the status line: state, level from -60 dB to 0, elapsed time, lag, device."""
        partial = "".join(word.text for word in self.transcriber.partial)
        microphone, elapsed = self.microphone, time.monotonic() - self.started
        state = self.state if microphone.connected else "NO DEVICE"
        color = {"LISTENING": "green", "CONNECTING": "yellow"}.get(state, "red")
        filled = max(0, min(12, round((microphone.level + 60) / 5)))
        meter = ("━" * filled, "green" if microphone.level < -3 else "red"), ("━" * (12 - filled), "bright_black")
        line = Text.assemble((f"● {state.lower():10}", color), *meter, f" {microphone.level:4.0f} dB  ", no_wrap=True)
        line.append(f"{hms(elapsed)}  lag {self.transcriber.lag:.1f} s  {microphone.device.name}", "dim")
        return partial.lstrip() if self.text.fresh else partial, line

    def tell(self, error: str | None, then: str) -> None:
        """Report that a file cannot be written, once."""
        if error and error not in self.told:
            self.told.add(error)
            self.screen.say(f"{error}; {then}")

    def close(self) -> None:
        """Finish the output files. Raises OSError for standard output."""
        if self.recording:
            self.recording.close()
        if self.transcriber.received or not self.options.output:  # an empty file would prevent the next run
            missing: list[list[float]] = []
            for start, end in sorted(self.transcriber.missing + self.microphone.missing):
                if missing and start <= missing[-1][1] + 0.01:
                    start, _ = missing.pop()
                missing.append([round(start, 3), round(end, 3)])
            self.transcript.close(self.complete, missing=missing)

    def write(self, word: Word) -> None:
        """Write a final word."""
        self.transcript.write(word)
        self.tell(self.transcript.error, "trying again with each word")

    async def audio(self, stop: asyncio.Event) -> AsyncIterator[bytes]:
        """Yield the microphone's audio (PCM16 bytes, 16 kHz mono), and record it."""
        async with aclosing(self.microphone.chunks(stop)) as chunks:
            async for pcm in chunks:
                if self.recording:
                    self.recording.write(pcm)
                    self.tell(self.recording.error, "continuing without it")
                yield pcm

    def open_files(self) -> None:
        """Open the output files. Raises UserError; then none is left behind."""
        options, path = self.options, self.options.output
        limits = Limits(options.max_line_count, options.max_line_width)
        files = [Output(Path(path), options.format or format_of(path), limits)] if path else []
        plain = files or not options.format
        self.transcript = Transcript(self.text if plain else standard_output(options.format, limits), files)
        self.recording = Recording(options.record) if options.record else None

    async def run(self) -> int:
        """Caption until Ctrl+C or --max-duration, and return the exit code."""
        await self.transcriber.open()
        self.open_files()
        interrupts = Interrupts(self.screen.say)
        if self.options.max_duration:
            asyncio.get_running_loop().call_later(self.options.max_duration, interrupts.stop.set)
        transcriber, microphone, self.started = self.transcriber, self.microphone, time.monotonic()
        async with self.screen.redrawn(self.live):
            try:
                async with aclosing(transcriber.words(self.audio(interrupts.stop))) as words:
                    async for word in words:
                        self.write(word)
                self.complete = not (transcriber.missing or microphone.missing or microphone.dropped)
            finally:
                for word in transcriber.partial:  # no session will replace it any more
                    self.write(word)
                self.close()
        dropped = f", {microphone.dropped} blocks of audio lost" if microphone.dropped else ""
        self.screen.say(f"{hms(transcriber.received)} heard, {many(transcriber.sessions, 'sessions')}{dropped}")
        errors = [file.error for file in (self.transcript, self.recording) if file and file.error]
        for error in errors:
            self.screen.say(f"error: {error}")
        return 1 if errors else 0


async def caption(options: argparse.Namespace) -> int:
    """List the devices or caption, and return the exit code."""
    if options.list_devices:
        found = devices()
        usual = choose(None, found)
        for device in found:
            mark = "*" if device == usual else " "
            print(f"{mark}{device.number:3} {device.name} ({device.host})")
        return 0
    with Screen(options.quiet) as screen:
        return await Live(options, screen).run()


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    options = parse(argv)
    silence_libraries()
    return run(caption(options))
