"""The captions page in Chromium, as the tests use it."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from browser import browsing
from playwright.async_api import Page, expect
from scripted import ScriptedServer
from speech import talk, write

from voxtral_client.protocol import RATE


def phrases(folder: Path) -> tuple[Path, list[str]]:
    """Write a talk of two phrases: (path of a WAV file, words)."""
    samples, spoken = talk(5.5, seed=25)
    path = write(folder / "talk.wav", np.concatenate([samples, np.zeros(RATE, np.float32)]))
    return path, [text for text, _, _ in spoken]


def address(server, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.port}/captions/"


async def start(page: Page) -> None:
    await page.locator("#start:enabled").click()


async def captions(page: Page, count: int) -> list[str]:
    """Wait until `count` words are final, stop, and return all words."""
    final = page.locator("#final")
    await expect(final).to_contain_text(re.compile(rf"(\S+\s+){{{count - 1}}}\S"))
    await page.get_by_role("button", name="Stop", exact=True).click()
    await expect(page.locator("#start")).to_have_text("Start")
    await expect(page.locator("#partial")).to_be_empty()
    return (await final.inner_text()).split()


# What the page has open: streams of microphones, and recorders that send sound.
SPY = """{
  const media = navigator.mediaDevices, real = media.getUserMedia.bind(media);
  window.streams = [];
  window.recorded = new Set();
  window.opening = 0;
  media.getUserMedia = async (wish) => {
    opening++;
    try {
      if (window.slow) await new Promise((resolve) => setTimeout(resolve, slow));
      streams.push(await real(wish));
      return streams.at(-1);
    } finally {
      opening--;
    }
  };
  window.live = () => streams.flatMap((stream) => stream.getTracks()).filter((track) => track.readyState === "live");
  const Node = AudioWorkletNode;
  let number = 0;
  window.AudioWorkletNode = class extends Node {
    constructor(...options) {
      super(...options);
      const mine = number++;
      this.port.addEventListener("message", () => recorded.add(mine));
    }
  };
}"""


@asynccontextmanager
async def spied(server: ScriptedServer, script: str = "", wav: Path | None = None) -> AsyncIterator[Page]:
    """The page of a scripted server, ready, with SPY in it."""
    async with browsing(wav) as page:
        await page.add_init_script(SPY + script)
        await page.goto(server.page)
        await expect(page.locator("#state")).to_have_text("ready")
        yield page


async def devices(page: Page) -> list[str]:
    return await page.evaluate("[...document.querySelector('#device').options].map(option => option.value)")
