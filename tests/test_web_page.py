"""The captions page with real servers: speech in, captions out, keys; and what it offers besides."""

import asyncio
import base64
import itertools
import json
import re
import shutil
import ssl
from pathlib import Path

import numpy as np
import pytest
import srt
from browser import ELSEWHERE, browsing, says
from firefox import firefox
from pages import address, captions, phrases, spied, start
from playwright.async_api import Page, expect
from proxy import Proxy
from pulse import Pulse, pulseaudio
from scripted import Scripted, ScriptedServer, scripted
from speech import talk
from webkit import webkit

from voxtral_client.audio import to_pcm16
from voxtral_client.protocol import RATE
from voxtral_client.session import Server, SessionLost

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return phrases(tmp_path_factory.mktemp("speech"))


# The browser's setting that blocks cookies blocks these too.
NO_STORAGE = """for (const name of ["localStorage", "sessionStorage"]) {
  Object.defineProperty(window, name, { get() { throw new DOMException("", "SecurityError"); } });
}"""

CERTIFICATE = "**/captions/ca.pem"


async def names_of_controls(page: Page) -> dict[str, list[str]]:
    """Return what a screen reader calls the things that have these roles."""
    session = await page.context.new_cdp_session(page)
    nodes = (await session.send("Accessibility.getFullAXTree"))["nodes"]
    found: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"] and node["role"]["value"] in ("button", "combobox", "textbox", "meter", "log", "group"):
            found.setdefault(node["role"]["value"], []).append(node["name"]["value"])
    return found


CONTRAST = """selector => {
  const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const of = (element, name) => getComputedStyle(element)[name];
  const pair = [of(document.querySelector(selector), "color"), of(document.body, "backgroundColor")].map(light).sort();
  return (pair[1] + 0.05) / (pair[0] + 0.05);
}"""  # WCAG 2: contrast ratio


def test_captions_on_localhost_by_keyboard(server, speech):
    """Start with the keyboard, read, copy, download; nothing is without a name for a screen reader."""
    path, spoken = speech

    async def run() -> None:
        async with browsing(path, permissions=["microphone", "clipboard-read", "clipboard-write"]) as page:
            await page.goto(address(server).removesuffix("/"))  # vLLM redirects
            await expect(page.locator("#state")).to_have_text("ready")
            await expect(page.locator("#model")).to_have_text("tiny")
            await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            await expect(page.locator("#state")).to_have_text("listening")
            await expect(page.locator("#partial")).to_contain_text(spoken[0])
            await expect(page.locator("#level")).to_have_attribute("aria-valuenow", re.compile(r"-[123]?\d"))
            assert await captions(page, len(spoken)) == spoken
            assert await page.evaluate("navigator.mediaDevices.enumerateDevices().then(all => all.length)") > 1
            assert await page.locator("#device option").count() > 1

            await page.get_by_role("button", name="Copy").click()
            await expect(page.locator("#copy")).to_have_text("Copied")
            assert (await page.evaluate("navigator.clipboard.readText()")).split() == spoken
            files = {}
            for name in ("Download as text", "Download as subtitles (SRT)"):
                async with page.expect_download() as download:
                    await page.get_by_role("button", name=name).click()
                file = await download.value
                files[Path(file.suggested_filename).suffix] = Path(await file.path()).read_text()
            assert files[".txt"].split() == spoken
            cues = list(srt.parse(files[".srt"]))
            assert " ".join(cue.content for cue in cues).split() == spoken
            assert all(cue.start < cue.end for cue in cues)
            assert all(a.end <= b.start for a, b in itertools.pairwise(cues))
            assert 4 < cues[-1].end.total_seconds() < 20

            names = await names_of_controls(page)
            assert len(names["button"]) >= 8
            assert len(names["combobox"]) == len(names["meter"]) == len(names["log"]) == 1
            assert all(name.strip() for role in names.values() for name in role), names
            assert await page.locator("#final").get_attribute("lang") == ""  # in any language, not in the page's
            live = "[...document.querySelectorAll('[aria-live]')].map(e => e.id + e.getAttribute('aria-live'))"
            assert await page.evaluate(live) == ["finalpolite"]
            assert await page.locator("[aria-live] #partial").count() == 0
            for scheme in ("light", "dark"):
                await page.emulate_media(color_scheme=scheme)
                assert await page.evaluate(CONTRAST, "#final") > 7
                assert await page.evaluate(CONTRAST, "#partial") > 4.5
            for width, height in ((320, 256), (360, 700), (1280, 700)):  # the first: 1280 x 1024 with a zoom of 400 %
                await page.set_viewport_size({"width": width, "height": height})
                assert await page.evaluate("document.documentElement.scrollWidth") <= width
                assert await page.evaluate("document.querySelector('main').clientHeight") >= 140
            size = "parseFloat(getComputedStyle(document.querySelector('#final')).fontSize)"
            before = await page.evaluate(size)
            await page.get_by_role("button", name="Larger text").click()
            assert await page.evaluate(size) > before >= 30

            await page.get_by_role("button", name="Full screen").click()
            await expect(page.locator("#start")).to_be_visible()
            await page.locator("#start").press("Enter")
            await page.get_by_role("button", name="Stop", exact=True).press("Enter")
            await expect(page.locator("#start")).to_have_text("Start")
            assert await page.evaluate("document.fullscreenElement !== null")

    asyncio.run(run())


def test_connection_cut_in_mid_speech(server, speech):
    """First there is no server for a while, then a session is closed: no word lost, none doubled."""
    path, spoken = speech

    async def run() -> None:
        async with Proxy(server.port, [(10_000, ""), (8, "close")]) as proxy, browsing(path) as page:
            await page.goto(address(proxy))
            await start(page)
            await expect(page.locator("#partial")).to_contain_text(spoken[1])
            proxy.refusing = True
            proxy.cut()
            await expect(page.locator("#message")).to_contain_text("No server answers; trying again")
            await expect(page.locator("#state")).to_have_text("waiting")
            proxy.refusing = False
            assert await captions(page, len(spoken)) == spoken
            assert proxy.struck == ["close"]
            assert proxy.sessions >= 3
            await expect(page.locator("#message")).to_be_empty()
            await says(page, "1011 keepalive ping timeout")

    asyncio.run(run())


def test_firefox_with_a_real_sound_device(server, speech, tmp_path):
    """The microphone is one of 44.1 kHz stereo, which browsers must convert."""
    path, spoken = speech

    async def run(pulse: Pulse) -> None:
        async with firefox(tmp_path, pulse.environment) as page:
            await page.open(address(server))
            await page.becomes("#state", "ready")
            await page.evaluate("document.querySelector('#start').click()")
            await page.becomes("#state", "listening")
            for _ in range(3):  # Firefox loses sound of a device on a busy machine
                await asyncio.to_thread(pulse.play(path).wait)
                if (await page.settles("#final")).endswith(" ".join(spoken)):
                    break
            else:
                pytest.fail("no talk of three is complete")
            await page.evaluate("document.querySelector('#start').click()")
            await page.becomes("#state", "ready")

    with pulseaudio() as pulse:
        pulse.plug()
        pulse.control("set-default-source", "mic")
        asyncio.run(run(pulse))


def test_key_over_https(locked, speech):
    """No key, a wrong one, the right one."""
    path, spoken = speech

    async def run() -> None:
        async with browsing(path, ignore_https_errors=True) as page:
            await page.goto(locked.page)
            await expect(page.locator("#message")).to_have_text("The server wants a key (HTTP 401).")
            await expect(page.get_by_label("Key of the server")).to_be_focused()
            assert await page.locator("#start").is_disabled()
            for key, answer in (("wrong", "Wrong API key"), ("mötley", "not ASCII")):
                await page.keyboard.type(key)
                await page.keyboard.press("Enter")
                await expect(page.locator("#message")).to_contain_text(answer)
                await page.get_by_label("Key of the server").clear()
            await page.get_by_label("Key of the server").fill("sesame")
            await page.keyboard.press("Enter")
            await expect(page.locator("#state")).to_have_text("ready")
            assert "sesame" not in json.dumps(await page.evaluate("[localStorage, location.href, document.cookie]"))
            await page.reload()
            await start(page)
            assert await captions(page, len(spoken)) == spoken

    asyncio.run(run())
    log = locked.log.read_text()
    assert "sesame" not in log
    assert b"sesame".hex() not in log


def test_slot_of_an_idle_session_goes_to_who_waits(locked, speech):
    """A client that has fallen silent holds the only slot; the page waits, and loses nothing."""
    path, spoken = speech
    trust = ssl.create_default_context(cafile=locked.certificate)

    async def forgotten(started: asyncio.Event) -> None:
        async with Server(locked.url, "sesame", trust).session("tiny") as session:
            await session.send(bytes(2 * RATE))
            await session.receive()
            started.set()
            with pytest.raises(SessionLost, match=r"4408 idle: no message for 0\.05 minutes"):
                while True:
                    await session.receive()

    async def run() -> None:
        async with browsing(path, ignore_https_errors=True) as page:
            await page.add_init_script("sessionStorage.setItem('key', 'sesame')")
            await page.goto(locked.page)
            await expect(page.locator("#state")).to_have_text("ready")
            started = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(forgotten(started))
                await started.wait()
                await start(page)
            assert await captions(page, len(spoken)) == spoken

    asyncio.run(run())


@pytest.mark.parametrize("blocked", [False, True])
def test_key_of_a_link(blocked):
    """It leaves the address, and stays in the tab, if the browser lets the page keep anything."""

    async def run() -> None:
        async with ScriptedServer(key="sesa+me") as server, browsing() as page:
            if blocked:
                await page.add_init_script(NO_STORAGE)
            state = page.locator("#state")
            await page.goto(server.page)
            await expect(state).to_have_text("locked")
            for link in ("#key=wrong", "#key=sesa%2Bme"):
                await page.evaluate("link => { location.hash = link; }", link)
                await expect(state).to_have_text("locked" if "wrong" in link else "ready")
                assert page.url == server.page
            await page.goto("about:blank")
            await page.goto(f"{server.page}?now#key=sesa+me")
            await expect(state).to_have_text("ready")
            assert page.url == f"{server.page}?now"
            await page.reload()
            await expect(state).to_have_text("locked" if blocked else "ready")
            await page.get_by_role("button", name="Larger text").click()

    asyncio.run(run())


def test_screen_reader_knows_the_message_before_its_first_text():
    async def run() -> None:
        async with ScriptedServer() as server, browsing() as page:
            await page.goto(server.page)
            await expect(page.locator("#state")).to_have_text("ready")
            await expect(page.locator("#message")).to_be_empty()
            await expect(page.get_by_role("status")).to_have_count(1)  # none, if it were not rendered

    asyncio.run(run())


@pytest.mark.parametrize("certified", [False, True])
def test_plain_http_from_another_machine_is_explained(certified):
    """With the server's certificate to download, if it has one, and the way on, key included."""

    async def run() -> None:
        async with ScriptedServer() as server, browsing() as page:
            if certified:
                await page.route(CERTIFICATE, lambda route: route.fulfill(body="PEM"))
            await page.goto(f"{address(server, ELSEWHERE)}#key=sesame")
            await expect(page.locator("#message")).to_contain_text("https://")
            assert await page.locator("#start").is_disabled()
            await expect(page.locator("#certificate")).to_be_visible(visible=certified)
            await expect(page.get_by_text("scripts/make-certificate")).to_be_visible(visible=not certified)
            if certified:
                await expect(page.get_by_text("Certificate Trust Settings")).to_be_visible()
                link = page.get_by_role("link", name="this page over HTTPS")
                secure = address(server, ELSEWHERE).replace("http:", "https:")
                await expect(link).to_have_attribute("href", f"{secure}#key=sesame")

    asyncio.run(run())


def test_certificate_that_is_accepted_but_not_trusted(locked):
    """Safari opens such a page, but none of its WebSockets: no proxy is suspected."""
    shut = "window.WebSocket = class { static OPEN = 1; readyState = 0; constructor() "
    shut += "{ setTimeout(() => this.onclose({ code: 1006, reason: '' })); } close() {} };"

    async def run() -> None:
        async with browsing(ignore_https_errors=True) as page:
            await page.add_init_script(shut)
            await page.route(CERTIFICATE, lambda route: route.fulfill(body="PEM"))
            await page.goto(f"{locked.page}#key=sesame")
            await start(page)
            await expect(page.locator("#message")).to_contain_text("install its certificate on this device")
            await expect(page.locator("#certificate")).to_be_visible()
            assert "Host header" not in await page.locator("#message").inner_text()

    asyncio.run(run())


needs_webkit = pytest.mark.skipif(
    not all(map(shutil.which, ("WebKitWebDriver", "xvfb-run"))), reason="needs WebKitGTK: scripts/install-test-tools"
)


@needs_webkit
def test_webkit_hears_its_own_microphone(tmp_path):
    """The third engine: key, sound, words from right to left."""
    speak = {4: " مرحبا", 6: " كيف", 44: " حالك"}.get
    with scripted(lambda: Scripted(speak=lambda _, k: speak(k % 50, "")), key="sesame") as server:
        log = tmp_path / "log"
        with webkit(log) as page:
            page.open(f"{server.page}#key=sesame")
            page.shows("#state", "ready")
            assert page.evaluate("location.href") == server.page
            page.click("#start")
            page.shows("#state", "listening")
            page.shows("#final", "مرحبا كيف")
            page.shows("#partial", "حالك")
            assert page.evaluate("getComputedStyle(document.querySelector('main')).direction") == "rtl"
            assert page.evaluate("document.querySelector('#level').getAttribute('aria-valuenow')") > "-"
            page.click("#start")
            page.shows("#state", "ready")
        sound = np.frombuffer(bytes(server.sessions[0].bytes), "<i2")
        assert np.abs(sound).max() > 1000
        assert "CONSOLE JS ERROR" not in log.read_text()


def test_long_talk(server):
    """As fast as the server takes it, for longer than one of its sessions: every word once, times that fit."""
    samples, spoken = talk(60, seed=5)
    script = """async ([base, audio]) => {
      const { Transcriber } = await import(base + "transcriber.js");
      const samples = new Int16Array(Uint8Array.from(atob(audio), c => c.charCodeAt(0)).buffer);
      const words = [], faults = [];
      const keep = { state: (name, message) => message && faults.push(message), partial: () => {}, lost: () => {} };
      const endpoint = new URL("../v1/realtime", base);
      const transcriber = new Transcriber(endpoint, "", { ...keep, words: (more) => words.push(...more) });
      for (let at = 0; at < samples.length; at += 1280) transcriber.addAudio(samples.slice(at, at + 1280));
      transcriber.end();
      await transcriber.run();
      return { words, faults };
    }"""

    async def run() -> dict:
        async with browsing() as page:
            await page.goto(address(server))
            audio = base64.b64encode(to_pcm16(samples)).decode()
            return await page.evaluate(script, [address(server), audio])

    result = asyncio.run(run())
    assert result["faults"] == []
    assert [word["text"].strip() for word in result["words"]] == [text for text, _, _ in spoken]
    for word, (_, begin, end) in zip(result["words"], spoken, strict=True):
        assert abs(word["start"] - begin) < 0.3, (word, begin)
        assert abs(word["end"] - end) < 0.3, (word, end)


def test_screen_stays_awake_while_captions_run():
    locks = """
      window.locks = [];
      const request = async (kind) => {
        const lock = { kind, released: false, release: async () => { lock.released = true; } };
        locks.push(lock);
        return lock;
      };
      Object.defineProperty(navigator, "wakeLock", { value: { request } });
    """
    awake = "locks.filter(lock => !lock.released).map(lock => lock.kind)"

    async def run() -> None:
        async with ScriptedServer() as server, spied(server, locks) as page:
            assert await page.evaluate(awake) == []
            await start(page)
            await expect(page.locator("#state")).to_have_text("listening")
            assert await page.evaluate(awake) == ["screen"]
            await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            await page.wait_for_timeout(200)
            assert await page.evaluate(awake) == ["screen"]
            # A browser releases it when the page is hidden; the page asks again when it is seen again.
            await page.evaluate("locks[0].released = true; document.dispatchEvent(new Event('visibilitychange'))")
            await page.wait_for_timeout(200)
            assert await page.evaluate(awake) == ["screen"]
            await page.get_by_role("button", name="Stop", exact=True).click()
            await expect(page.locator("#start")).to_have_text("Start")
            await page.wait_for_timeout(200)
            assert await page.evaluate(awake) == []

    asyncio.run(run())


def test_subtitles():
    """After 24 hours; lines of Chinese, whose characters take two columns."""
    script = """async (base) => {
      const { srt } = await import(base + "subtitles.js");
      const chinese = [..."我不知道这个句子应该有多长，才会被切断成两行。"].map((text) => ({ text, start: 0, end: 1 }));
      const word = { text: " late", start: 26 * 3600 + 61.5, end: 26 * 3600 + 62.25 };
      return [srt([{ text: " early", start: 0.0004, end: 1.9996 }, word]), srt(chinese)];
    }"""

    async def run() -> list[str]:
        async with ScriptedServer() as server, browsing() as page:
            await page.goto(server.page)
            return await page.evaluate(script, server.page)

    late, chinese = asyncio.run(run())
    first, second = late.strip().split("\n\n")
    assert first.split("\n")[1] == "00:00:00,000 --> 00:00:02,000"
    assert second.split("\n")[1] == "26:01:01,500 --> 26:01:02,500"
    assert chinese.splitlines()[2:4] == ["我不知道这个句子应该有多长，才会", "被切断成两行。"]
