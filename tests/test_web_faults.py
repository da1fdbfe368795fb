"""The captions page when connections break, freeze or are refused: no word lost, none doubled."""

import asyncio
import re

import numpy as np
import pytest
from browser import browsing, says
from pages import address, spied, start
from playwright.async_api import Page, expect
from proxy import Proxy
from scripted import Ear, Scripted, ScriptedServer, tones
from speech import write

from voxtral_client.protocol import RATE

pytestmark = pytest.mark.slow


def test_refused_websocket_is_told_from_a_server_that_is_away():
    """The guard's 403, behind a proxy that changes Host: a browser shows 1006 for everything."""

    async def run() -> None:
        async with ScriptedServer(refusal=403) as server, browsing() as page:
            await page.goto(server.page)
            await start(page)
            await expect(page.locator("#message")).to_contain_text("lets this page open no WebSocket")
            server.faults = [{"after": 0, "error": "full", "code": "server_busy", "always": True}]
            server.refusal = None
            await expect(page.locator("#message")).to_contain_text("All sessions of the server are taken")
            server.faults = []
            await expect(page.locator("#state")).to_have_text("listening")

    asyncio.run(run())


# What Chromium does to timers of a page that nobody has looked at for five minutes.
IN_THE_BACKGROUND = """
  const real = setTimeout;
  window.setTimeout = (call, ms, ...more) => real(call, Math.max(ms, window.visible ? 0 : 60000), ...more);
"""


ENGLISH = [f" word{number}" for number in range(8)]


JAPANESE = ["今日は", "とても", "いい", "天気", "ですね", "公園へ", "行き", "ましょう"]


@pytest.mark.parametrize("texts", [ENGLISH, JAPANESE], ids=["English", "Japanese"])
def test_page_in_the_background_goes_on(tmp_path, texts):
    """Its timers wait for a minute; sound does not. Two connections break; the words keep their spaces, if any."""
    sound = np.concatenate([tones(8), np.zeros(3 * RATE, np.float32)])

    async def run() -> None:
        server = ScriptedServer(lambda: Scripted(speak=Ear(texts)), cuts=[25, 10])
        async with server, spied(server, IN_THE_BACKGROUND, write(tmp_path / "tones.wav", sound)) as page:
            await start(page)
            await expect(page.locator("#final")).to_contain_text("".join(texts[:7]).strip())
            assert len(server.sessions) == 3
            await page.evaluate("visible = true")

    asyncio.run(run())


def test_connection_that_freezes(tmp_path):
    """Half-open: nothing passes any more, and nothing says so. The page finds out, and loses no word."""
    sound = np.concatenate([tones(8), np.zeros(RATE, np.float32)])

    async def run() -> None:
        async with (
            ScriptedServer(lambda: Scripted(speak=Ear(ENGLISH))) as server,
            Proxy(server.port, [(12, "stall")]) as proxy,
            browsing(write(tmp_path / "tones.wav", sound)) as page,
        ):
            await page.goto(address(proxy))
            await start(page)
            await says(page, "No answer for 20 s; trying again")
            await expect(page.locator("#final")).to_contain_text("".join(ENGLISH[:7]).strip())
            assert proxy.sessions == 2

    asyncio.run(run())


def test_each_outage_reports_its_own_loss():
    """The page keeps five minutes; here a clock that runs ahead brings more in seconds."""
    # A microphone that speaks a hundred times as fast: each block comes a hundred times.
    fast = """
      const Node2 = AudioWorkletNode;
      window.AudioWorkletNode = class extends Node2 {
        constructor(...options) {
          super(...options);
          const real = this.port;
          Object.defineProperty(this, "port", { value: {
            postMessage: (message) => real.postMessage(message),
            set onmessage(call) {
              real.onmessage = call && ((event) => {
                for (let i = window.times ?? 1; i > 0; i--) {
                  const { samples, level } = event.data;
                  call({ data: { samples: samples.slice(), level } });
                }
              });
            },
          } });
        }
      };
    """

    async def lose(page: Page, server: ScriptedServer, beyond: float) -> float:
        """Let the server be away until so much is lost; return what the page says is lost, in seconds."""
        server.refusal = 503
        server.cut()
        await expect(page.locator("#state")).to_have_text("waiting")
        before = await page.locator("#clock").inner_text()
        await page.evaluate("times = 150")
        while seconds(await page.locator("#clock").inner_text()) - seconds(before) < 300 + beyond:
            await page.wait_for_timeout(50)
        await page.evaluate("times = 1")
        while not (told := re.search(r"(\d+) s of sound are lost", await page.locator("#message").inner_text())):
            await page.wait_for_timeout(50)  # other messages come and go
        server.refusal = None
        await expect(page.locator("#state")).to_have_text("listening")
        return float(told[1])

    def seconds(clock: str) -> int:
        hours, minutes, rest = map(int, clock.split(":"))
        return 3600 * hours + 60 * minutes + rest

    async def run() -> None:
        async with ScriptedServer() as server, spied(server, fast) as page:
            await start(page)
            await expect(page.locator("#state")).to_have_text("listening")
            first = await lose(page, server, 100)
            await expect(page.locator("#lag")).to_have_text(re.compile(r"^[0-3]\.\d s$"))
            second = await lose(page, server, 10)
            assert first >= 95
            assert second < first

    asyncio.run(run())
