#!/usr/bin/env python3
"""Make docs/captions.png: the captions page in Chromium while it transcribes the sample, from a real run.

    docs/screenshot.py --url http://localhost:8000/captions/

Requires the tests' packages (scripts/check) and a server with the embedded checkpoint.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from browser import browsing, expect  # noqa: E402

SAMPLE = ROOT / "tests" / "tiny_checkpoint" / "sample.wav"


async def run(url: str) -> None:
    """Play the sample to the page twice, and take the picture during the second time."""
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


def main() -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000/captions/")
    asyncio.run(run(parser.parse_args().url))
    return 0


if __name__ == "__main__":
    sys.exit(main())
