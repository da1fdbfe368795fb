#!/usr/bin/env python3
"""Make the pictures of the documents from a real run: docs/terminal.svg and docs/captions.png.

    .venv/bin/python tests/pictures.py --server localhost:8000

Requires the tests' packages (scripts/check) and a server with the embedded checkpoint.
"""

import argparse
import asyncio
import io
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from browser import browsing, expect
from captioner import COLUMNS, Captioner
from pulse import pulseaudio
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tests" / "tiny_checkpoint" / "sample.wav"
NAMES = {"brown": "yellow", "brightblack": "bright_black"}  # pyte's name: rich's name


def terminal(url: str) -> None:
    """Run stream_microphone.py, and take the picture while it transcribes the sample for the second time."""
    with pulseaudio() as pulse:
        pulse.plug("Microphone")
        captioner = Captioner(pulse, "--url", url, "-d", "Microphone", terminal=True)
        captioner.wait_for_recording(pulse)
        pulse.play(SAMPLE).wait()
        playing = pulse.play(SAMPLE)
        time.sleep(6)
        while not (re.search(r"-[12]\d dB", (text := shown(captioner)).plain) and len(partial(text).split()) > 1):
            time.sleep(0.02)  # until the picture has the middle of a word, and partial words
        captioner.interrupt()
        playing.kill()
        playing.wait()
        captioner.end()
    text.rstrip()
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(text)
    console.save_svg(str(ROOT / "docs" / "terminal.svg"), title=".venv/bin/python stream_microphone.py -d Microphone")


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


def partial(text: Text) -> str:
    """Return the dim words: those above the status line."""
    status = text.plain.index("listening") if "listening" in text.plain else 0
    dim = Color.parse("bright_black")
    return "".join(
        text.plain[span.start : span.end] for span in text.spans if span.style.color == dim and span.end < status
    )


async def page(url: str) -> None:
    """Play the sample to the captions page in Chromium twice, and take the picture during the second time."""
    samples, rate = soundfile.read(SAMPLE)
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        soundfile.write(wav.name, np.concatenate([samples, np.zeros(3 * rate), samples]), rate)
        async with browsing(Path(wav.name), viewport={"width": 1280, "height": 640}, color_scheme="dark") as page:
            await page.goto(url)
            await page.locator("#start:enabled").click()
            final, partial = page.locator("#final p"), page.locator("#partial")
            await expect(final).to_have_count(2)
            await expect(partial).to_be_empty()
            while len((await partial.text_content()).split()) < 3:
                await asyncio.sleep(0.02)
            await page.locator("#start").blur()
            await page.screenshot(path=ROOT / "docs" / "captions.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:8000", metavar="HOST:PORT")
    server = parser.parse_args().server
    terminal(f"ws://{server}/v1/realtime")
    asyncio.run(page(f"http://{server}/captions/"))
