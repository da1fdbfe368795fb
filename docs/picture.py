#!/usr/bin/env python3
"""Make docs/terminal.svg: the terminal while stream_microphone.py transcribes the sample, from a real run.

    docs/picture.py --url ws://localhost:8000/v1/realtime

Requires the packages of the microphone's tests (scripts/check) and a server with the embedded checkpoint.
"""

import argparse
import io
import re
import sys
import time
from pathlib import Path

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from captioner import COLUMNS, Captioner  # noqa: E402
from pulse import pulseaudio, until  # noqa: E402

SAMPLE = ROOT / "tests" / "tiny_checkpoint" / "sample.wav"
NAMES = {"brown": "yellow", "brightblack": "bright_black"}  # pyte's name: rich's name


def shown(captioner: Captioner) -> Text:
    """Return the terminal's text with its colors."""
    text = Text(no_wrap=True)
    for number, line in enumerate(captioner.terminal.display):
        row = captioner.terminal.buffer[number]
        for column in range(COLUMNS if line.strip() else 0):
            cell = row[column]
            color = None if cell.fg == "default" else Color.parse(NAMES.get(cell.fg, cell.fg))
            text.append(cell.data, Style(color=color))
        text.append("\n")
    return text


def main() -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="ws://localhost:8000/v1/realtime")
    options = parser.parse_args()
    with pulseaudio() as pulse:
        pulse.plug("Microphone")
        captioner = Captioner(pulse, "--url", options.url, "--device", "Microphone", terminal=True)
        until(lambda: pulse.recording(captioner.process.pid))
        pulse.play(SAMPLE).wait()
        playing = pulse.play(SAMPLE)
        time.sleep(6)
        until(lambda: re.search(r"-[12]\d dB", captioner.seen()))  # in the middle of a word
        text = shown(captioner)
        captioner.interrupt()
        playing.kill()
        playing.wait()
        captioner.end()
    text.rstrip()
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(text)
    console.save_svg(str(ROOT / "docs" / "terminal.svg"), title="python stream_microphone.py --device Microphone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
