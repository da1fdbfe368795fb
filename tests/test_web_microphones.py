"""The captions page and its microphones: changed, unplugged, during an outage."""

import asyncio
import time

import pytest
from browser import browsing
from pages import address, devices, spied, start
from playwright.async_api import Page, expect
from proxy import Proxy
from scripted import ScriptedServer

pytestmark = pytest.mark.slow


# None has been asked for in a second, however slow the machine is.
QUIET = """async () => {
  for (let tenths = 0; tenths < 10; tenths = opening ? 0 : tenths + 1)
    await new Promise((resolve) => setTimeout(resolve, 100));
}"""


async def settle_down(page: Page) -> list[str]:
    """Return the microphones that are open once everything asked for has been opened or given up."""
    await page.evaluate(QUIET)
    return await page.evaluate("live().map(track => track.getSettings().deviceId)")


def test_microphone_changed_quickly():
    """However quickly: one microphone is open, the one chosen last, and one recorder runs."""

    async def run() -> None:
        async with ScriptedServer() as server, spied(server) as page:
            await start(page)
            await expect(page.locator("#device option")).to_have_count(3)
            _, first, second = await devices(page)
            await page.evaluate("slow = 500")
            for device in (first, second, first, second):
                await page.locator("#device").select_option(device)
            assert await settle_down(page) == [second]
            await page.evaluate("recorded.clear()")
            await page.wait_for_function("() => recorded.size")
            await page.wait_for_timeout(1000)
            assert await page.evaluate("recorded.size") == 1

    asyncio.run(run())


@pytest.mark.parametrize("when", ["first", "changed"])
def test_stop_while_a_microphone_opens(when):
    """Neither a microphone nor a recorder is left, and Start works again."""

    async def run() -> None:
        async with ScriptedServer() as server, spied(server) as page:
            if when == "first":
                await page.evaluate("slow = 1000")
                await start(page)
            else:
                await start(page)
                await expect(page.locator("#device option")).to_have_count(3)
                await page.evaluate("slow = 1000")
                await page.locator("#device").select_option((await devices(page))[2])
            await page.get_by_role("button", name="Stop", exact=True).click()
            await expect(page.locator("#start")).to_have_text("Start")
            assert await settle_down(page) == []
            await page.evaluate("recorded.clear(); slow = 0")
            await page.wait_for_timeout(500)
            assert await page.evaluate("recorded.size") == 0
            await start(page)
            await expect(page.locator("#start")).to_have_text("Stop")
            assert len(await settle_down(page)) == 1

    asyncio.run(run())


# Microphones that are unplugged: `away` is the id of one.
UNPLUG = """
  window.away = "";
  const list = media.enumerateDevices.bind(media), open = media.getUserMedia.bind(media);
  media.enumerateDevices = async () => (await list()).filter(({ deviceId }) => deviceId !== away);
  media.getUserMedia = async (wish) => {
    if (away && wish.audio.deviceId?.exact === away) throw new DOMException("", "OverconstrainedError");
    return open(wish);
  };
  window.plug = (id) => {
    away = id;
    const [track] = streams.at(-1).getTracks();
    if (id) [track.onended].forEach((call) => { track.stop(); call(); });
    media.dispatchEvent(new Event("devicechange"));
  };
"""


def test_unplugged_microphone():
    """The page waits for the chosen one, or says which it takes. What was not recorded counts in the times."""

    async def clocks(page: Page) -> tuple[float, float]:
        hours, minutes, seconds = map(int, (await page.locator("#clock").inner_text()).split(":"))
        return 3600 * hours + 60 * minutes + seconds, time.monotonic()

    async def run() -> None:
        async with (
            ScriptedServer() as server,
            spied(server, "{const media = navigator.mediaDevices;" + UNPLUG + "}") as page,
        ):
            await start(page)
            await expect(page.locator("#device option")).to_have_count(3)
            second = (await devices(page))[2]
            await page.locator("#device").select_option(second)
            assert await settle_down(page) == [second]
            before = await clocks(page)
            await page.evaluate("plug", second)
            await expect(page.locator("#message")).to_contain_text("was unplugged")
            await page.wait_for_timeout(4000)
            assert await page.locator("#device").input_value() == second
            assert await settle_down(page) == []
            await page.evaluate("plug('')")
            await expect(page.locator("#message")).to_contain_text("Recording from")
            assert await settle_down(page) == [second]
            after = await clocks(page)
            assert abs((after[0] - before[0]) - (after[1] - before[1])) < 2.5
            await page.locator("#device").select_option("")
            await settle_down(page)
            await page.evaluate("plug", "the default one")
            await expect(page.locator("#message")).to_contain_text("Recording from")
            assert len(await settle_down(page)) == 1

    asyncio.run(run())


def test_microphone_changed_during_an_outage():
    """The server is gone: nothing of the page has to be fetched from it any more."""

    async def run() -> None:
        async with ScriptedServer() as server, Proxy(server.port) as proxy, browsing() as page:
            await page.goto(address(proxy))
            await start(page)
            await expect(page.locator("#state")).to_have_text("listening")
            proxy.refusing = True
            proxy.cut()
            await expect(page.locator("#state")).to_have_text("waiting")
            level = page.locator("#level")
            for device in (await devices(page))[1:3]:
                await page.locator("#device").select_option(device)
                await page.wait_for_timeout(500)
                await expect(page.locator("#message")).to_contain_text("trying again")
                await expect(level).not_to_have_attribute("aria-valuenow", "-60")
            proxy.refusing = False
            await expect(page.locator("#state")).to_have_text("listening")

    asyncio.run(run())
