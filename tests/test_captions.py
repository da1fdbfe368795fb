"""The captions page in Chromium and Firefox, hearing speech, against real servers; and the keys they bring."""

import asyncio
import base64
import itertools
import json
import re
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import srt
import websockets
from browser import ELSEWHERE, browsing
from conftest import CHECKPOINT, FRIEND, IDLE_SECONDS, ROOT
from firefox import firefox
from playwright.async_api import Page, expect
from proxy import Proxy
from pulse import Pulse, pulseaudio
from scripted import Ear, Scripted, ScriptedServer, tones
from speech import talk, write
from test_timeline import Model, audio_of

from voxtral_client.audio import to_pcm16
from voxtral_client.protocol import FRAME, RATE
from voxtral_client.session import Server, SessionLost
from voxtral_client.timeline import Timeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A talk of two phrases: (path of a WAV file, words)."""
    samples, spoken = talk(5.5, seed=25)
    path = write(tmp_path_factory.mktemp("speech") / "talk.wav", np.concatenate([samples, np.zeros(RATE, np.float32)]))
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
            live = "[...document.querySelectorAll('[aria-live]')].map(e => e.id + e.getAttribute('aria-live'))"
            assert await page.evaluate(live) == ["finalpolite"]
            assert await page.locator("[aria-live] #partial").count() == 0
            for scheme in ("light", "dark"):
                await page.emulate_media(color_scheme=scheme)
                assert await page.evaluate(CONTRAST, "#final") > 7
                assert await page.evaluate(CONTRAST, "#partial") > 4.5
            for width in (360, 1280):
                await page.set_viewport_size({"width": width, "height": 700})
                assert await page.evaluate("document.documentElement.scrollWidth") <= width
            size = "parseFloat(getComputedStyle(document.querySelector('#final')).fontSize)"
            before = await page.evaluate(size)
            await page.get_by_role("button", name="Larger text").click()
            assert await page.evaluate(size) > before >= 30

    asyncio.run(run())


def test_connection_cut_in_mid_speech(server, speech):
    """First there is no server for a while, then a session is closed: no word lost, none doubled."""
    path, spoken = speech

    async def run() -> None:
        async with Proxy(server.port, [(10_000, ""), (30, "close")]) as proxy, browsing(path) as page:
            await page.goto(address(proxy))
            await page.evaluate(
                "new MutationObserver(() => (window.said ??= []).push(document.querySelector('#message').textContent))"
                ".observe(document.querySelector('#message'), {childList: true})"
            )
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
            assert await page.evaluate("said.some(text => text.includes('1011 keepalive ping timeout'))")

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
            await asyncio.to_thread(pulse.play(path).wait)
            await page.becomes("#final", " ".join(spoken))
            await page.evaluate("document.querySelector('#start').click()")
            await page.becomes("#state", "ready")

    with pulseaudio() as pulse:
        pulse.plug()
        pulse.control("set-default-source", "mic")
        asyncio.run(run(pulse))


# An older Firefox opens no microphone in a context whose rate is not the device's.
AS_OLD_FIREFOX = """const Real = AudioContext; window.AudioContext = class extends Real {
  constructor(options) { super(options); this.foreign = options !== undefined; window.rate = this.sampleRate; }
  createMediaStreamSource(stream) {
    if (this.foreign) throw new DOMException("rates differ", "NotSupportedError");
    return super.createMediaStreamSource(stream);
  }
}"""


def test_key_over_https(locked, speech):
    """No key, a wrong one, the right one; and the worklet resamples, as it must in an older Firefox."""
    path, spoken = speech

    async def run() -> None:
        async with browsing(path, ignore_https_errors=True) as page:
            await page.add_init_script(AS_OLD_FIREFOX)
            await page.goto(locked.page)
            await expect(page.locator("#message")).to_have_text("This server wants a key.")
            await expect(page.get_by_label("Key of the server")).to_be_focused()
            assert await page.locator("#start").is_disabled()
            for key, answer in (("wrong", "does not accept"), ("mötley", "beyond ASCII")):
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
            assert await page.evaluate("rate") > RATE

    asyncio.run(run())
    log = locked.log.read_text()
    assert "sesame" not in log
    assert b"sesame".hex() not in log


def test_slot_of_an_idle_session_goes_to_who_waits(locked, speech):
    """A client that has fallen silent holds the only slot; the page says so, waits, and loses nothing."""
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
                await expect(page.locator("#message")).to_contain_text("All sessions of the server are taken")
            assert await captions(page, len(spoken)) == spoken

    asyncio.run(run())


def test_client_that_paused_goes_on(locked, speech):
    """Standard input that falls silent for longer than a session may: the words come out as if it had not."""
    path, spoken = speech
    pcm = path.read_bytes()[44:]
    options = ["--url", locked.url, "--api-key", "sesame", "--cafile", locked.certificate, "--raw", str(RATE)]
    command = [sys.executable, ROOT / "test_file_transcribe.py", "-", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        client.stdin.write(pcm[: len(pcm) // 4 * 2])
        client.stdin.flush()
        time.sleep(IDLE_SECONDS + 2)
        output, errors = client.communicate(pcm[len(pcm) // 4 * 2 :], timeout=120)
    assert output.decode().split() == spoken, errors.decode()
    assert b"4408" in errors


def test_pages_of_other_sites_are_refused(server):
    """A page that came through the proxy is, by its port, from another site than the server itself."""
    connect = """url => new Promise(resolve => {
      const socket = new WebSocket(url);
      socket.onopen = () => resolve("open");
      socket.onclose = ({ code }) => resolve(code);
    })"""

    async def run() -> None:
        async with Proxy(server.port) as proxy, browsing() as page:
            await page.goto(address(proxy).replace("captions/", "health"))
            assert await asyncio.wait_for(page.evaluate(connect, server.url), 30) == 1006
            assert await asyncio.wait_for(page.evaluate(connect, proxy.url), 30) == "open"

    asyncio.run(run())


def test_plain_http_from_another_machine_is_explained(server):
    async def run() -> None:
        async with browsing() as page:
            await page.goto(address(server, ELSEWHERE))
            await expect(page.locator("#message")).to_contain_text("https://")
            assert await page.locator("#start").is_disabled()

    asyncio.run(run())


def handshake(url: str, **options: object) -> int | str | None:
    """Return the HTTP status of a refused connection, or the subprotocol of one that opened."""

    async def run() -> int | str | None:
        try:
            async with websockets.connect(url, **options) as socket:
                return socket.subprotocol
        except websockets.InvalidStatus as error:
            return error.response.status_code

    return asyncio.run(run())


def test_keys_and_origins(locked, server):
    """What the WebSocket answers to keys and origins; no Origin means that it is no browser."""
    trust = ssl.create_default_context(cafile=locked.certificate)
    key = f"key.{b'sesame'.hex()}"
    assert handshake(locked.url, ssl=trust, subprotocols=["voxtral", key]) == "voxtral"
    assert handshake(locked.url, ssl=trust, subprotocols=["voxtral", "key.00"]) == 401
    assert handshake(locked.url, ssl=trust, subprotocols=["voxtral"]) == 401
    for nonsense in ("key.zz", "key.0"):
        assert handshake(server.url, subprotocols=["voxtral", nonsense]) == 401
    header = {"Authorization": "Bearer sesame"}
    assert handshake(locked.url, ssl=trust, additional_headers=header) is None
    assert handshake(locked.url, ssl=trust, additional_headers=header, origin=FRIEND) is None
    here = f"127.0.0.1:{server.port}"
    assert handshake(server.url, origin=f"http://{here}") is None
    for origin in (
        "http://127.0.0.1",
        f"http://{here}.evil.example",
        f"http://localhost:{server.port}",
        "null",
        FRIEND,
    ):
        assert handshake(server.url, origin=origin) == 403, origin


def test_files_over_http(locked, speech):
    """With TLS and a key, through the only slot there is; a wrong key is told as OpenAI's clients know it."""
    path, spoken = speech
    trust = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=locked.certificate))
    with openai.OpenAI(base_url=f"{locked.page}../v1", api_key="sesame", http_client=trust, max_retries=0) as client:
        answer = client.audio.transcriptions.create(file=path, model="tiny")
        assert (answer.text.split(), answer.model_extra["complete"]) == (spoken, True)
        with pytest.raises(openai.AuthenticationError) as caught:
            client.with_options(api_key="wrong").audio.transcriptions.create(file=path, model="tiny")
        assert caught.value.code == "invalid_api_key"
    assert "sesame" not in locked.log.read_text()


def test_page_needs_no_key_and_leads_nowhere_else(locked):
    trust = ssl.create_default_context(cafile=locked.certificate)

    def get(path: str) -> tuple[int, str | None]:
        request = urllib.request.Request(locked.page + path, headers={"Accept-Encoding": "gzip"})
        try:
            with urllib.request.urlopen(request, context=trust) as reply:
                return reply.status, reply.headers["Content-Encoding"]
        except urllib.error.HTTPError as error:
            return error.code, None

    assert get("") == (200, "gzip")  # the user's own --middleware works beside ours
    assert get("../captions/%2e%2e/serve.sh")[0] == get("nothing")[0] == 404
    used = {path.name for path in (ROOT / "captions").iterdir()}
    assert all(get(name)[0] == 200 for name in used)


@pytest.mark.parametrize("setting", ["SESSION_IDLE_MINUTES=ten", "MAX_UPLOAD_MB=0", "UPLOAD_SESSIONS=half"])
def test_refuses_nonsense_before_the_start(setting):
    command = ["env", f"MODEL={CHECKPOINT}", "HOST=127.0.0.1", setting, "./serve.sh"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert setting in result.stderr


def test_long_talk_rolls_over(server):
    """As fast as the server takes it: more than one session, every word once, times that fit."""
    samples, spoken = talk(44, seed=5)
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
      return { words, faults, sessions: transcriber.sessions };
    }"""

    async def run() -> dict:
        async with browsing() as page:
            await page.goto(address(server))
            audio = base64.b64encode(to_pcm16(samples)).decode()
            return await page.evaluate(script, [address(server), audio])

    result = asyncio.run(run())
    assert result["sessions"] >= 2
    assert result["faults"] == []
    assert "".join(word["text"] for word in result["words"]).split() == [text for text, _, _ in spoken]
    for word, (_, start, end) in zip(result["words"], spoken, strict=True):
        assert abs(word["start"] - start) < 0.3, (word, start)
        assert abs(word["end"] - end) < 0.3, (word, end)


def test_timelines_agree(server):
    """The same audio, deltas and cuts into timeline.py and timeline.js: the same words, times and commit points."""
    noise = np.random.default_rng(7)
    lengths = [(int(noise.integers(8, 45)), int(noise.integers(1, 100))) for _ in range(60)] + [(30, 1)] * 60
    samples, words = audio_of(lengths)
    timeline, pcm, calls, seen = Timeline(), to_pcm16(samples), [], []

    def call(name: str, argument: object = None) -> object:
        calls.append([name, base64.b64encode(argument).decode() if name == "add_audio" else argument])
        result = getattr(timeline, name)(*[] if argument is None else [argument])
        seen.append(
            [timeline.committed, timeline.transcribed, round(timeline.wordless_sound(), 6), len(timeline.partial)]
        )
        return result

    sent = 0
    while sent < len(pcm):
        model = Model(words, call("begin"))
        cut = noise.integers(100, 700)
        while sent < len(pcm) and model.frames < cut:
            if timeline.received < timeline.transcribed + 7 * FRAME:
                call("add_audio", pcm[sent : sent + 3200])
                sent += 3200
            else:
                call("add_delta", model.delta())
        if noise.random() < 0.3:
            call(str(noise.choice(["commit_between_words", "suspect_blanks"])))
        elif noise.random() < 0.3:
            call("drop_oldest", 20 * RATE)
    call("finish")
    script = """async ([base, calls]) => {
      const { Timeline } = await import(base + "timeline.js");
      const timeline = new Timeline(), seen = [];
      for (const [name, argument] of calls) {
        const samples = () => new Int16Array(Uint8Array.from(atob(argument), c => c.charCodeAt(0)).buffer);
        timeline[name.replace(/_(.)/g, (_, c) => c.toUpperCase())](name === "add_audio" ? samples() : argument);
        const wordlessSound = Math.round(timeline.wordlessSound() * 1e6) / 1e6;
        seen.push([timeline.committed, timeline.transcribed, wordlessSound, timeline.partial.length]);
      }
      return { seen, words: timeline.take() };
    }"""

    async def run() -> dict:
        async with browsing() as page:
            await page.goto(address(server))
            return await page.evaluate(script, [address(server), calls])

    result = asyncio.run(run())
    for number, (ours, theirs) in enumerate(zip(seen, result["seen"], strict=True)):
        assert ours == theirs, (number, calls[number][0])
    words = timeline.take()
    assert len(words) > 60
    assert [[w.text, w.start, w.end, w.session] for w in words] == [list(w.values()) for w in result["words"]]


# --- what a scripted server shows in seconds ---

# What the page has open: streams of microphones, and recorders that send sound.
SPY = """{
  const media = navigator.mediaDevices, real = media.getUserMedia.bind(media);
  window.streams = [];
  window.recorded = new Set();
  media.getUserMedia = async (wish) => {
    if (window.slow) await new Promise((resolve) => setTimeout(resolve, slow));
    const stream = await real(wish);
    streams.push(stream);
    return stream;
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


async def settle_down(page: Page) -> list[str]:
    """Return the microphones that are open once everything asked for has been opened or given up."""
    await page.wait_for_timeout(1500)
    return await page.evaluate("live().map(track => track.getSettings().deviceId)")


def test_microphone_changed_quickly():
    """However quickly: one microphone is open, the one chosen last, and one recorder runs."""

    async def run() -> None:
        async with ScriptedServer() as server, spied(server) as page:
            await start(page)
            await expect(page.locator("#state")).to_have_text("connecting")
            await expect(page.locator("#device option")).to_have_count(3)
            _, first, second = await devices(page)
            await page.evaluate("slow = 500")
            for device in (first, second, first, second):
                await page.locator("#device").select_option(device)
            assert await settle_down(page) == [second]
            await page.evaluate("recorded.clear()")
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


def test_refused_websocket_is_told_from_a_server_that_is_away():
    """The guard's 403, behind a proxy that changes Host: a browser shows 1006 for everything."""

    async def run() -> None:
        async with ScriptedServer(refusal=403) as server, browsing() as page:
            await page.goto(server.page)
            await start(page)
            await expect(page.locator("#message")).to_contain_text("lets this page open no WebSocket")
            server.refusal = None
            await expect(page.locator("#state")).to_have_text("listening")

    asyncio.run(run())


# What Chromium does to timers of a page that nobody has looked at for five minutes.
IN_THE_BACKGROUND = """
  const real = setTimeout;
  window.setTimeout = (call, ms, ...more) => real(call, Math.max(ms, window.visible ? 0 : 60000), ...more);
"""


def test_page_in_the_background_goes_on(tmp_path):
    """Its timers wait for a minute; sound does not. The first session breaks."""
    sound = np.concatenate([tones(8), np.zeros(3 * RATE, np.float32)])

    async def run() -> None:
        texts = [f" word{number}" for number in range(8)]
        server = ScriptedServer(lambda: Scripted(speak=Ear(texts)), cuts=[25, 10])
        async with server, spied(server, IN_THE_BACKGROUND, write(tmp_path / "tones.wav", sound)) as page:
            await start(page)
            await expect(page.locator("#final")).to_contain_text(" ".join(text.strip() for text in texts[:7]))
            assert len(server.sessions) == 3
            await page.evaluate("visible = true")

    asyncio.run(run())


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


def test_subtitles_behind_24_hours():
    script = """async (base) => {
      const { srt } = await import(base + "subtitles.js");
      const word = { text: " late", start: 26 * 3600 + 61.5, end: 26 * 3600 + 62.25 };
      return srt([{ text: " early", start: 0.0004, end: 1.9996 }, word]);
    }"""

    async def run() -> str:
        async with ScriptedServer() as server, browsing() as page:
            await page.goto(server.page)
            return await page.evaluate(script, server.page)

    first, second = asyncio.run(run()).strip().split("\n\n")
    assert first.split("\n")[1] == "00:00:00,000 --> 00:00:02,000"
    assert second.split("\n")[1] == "26:01:01,500 --> 26:01:02,500"


def test_content_security_policy():
    """Nothing that found its way into the page runs, sends a form or loads from elsewhere."""
    attack = """() => new Promise((resolve) => {
      const seen = [];
      document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
      const script = document.createElement("script");
      script.textContent = "window.attacked = true";
      const image = new Image();
      image.src = "https://elsewhere.example/?key";
      const style = document.createElement("style");
      const base = document.createElement("base");
      base.href = "https://elsewhere.example/";
      document.head.append(script, style, base);
      fetch("https://elsewhere.example/").catch(() => {});
      setTimeout(() => resolve([...new Set(seen)].sort()), 500);
    })"""

    async def run() -> None:
        async with ScriptedServer() as server, browsing() as page:
            faults = []
            page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            await page.goto(server.page)
            await start(page)
            await expect(page.locator("#state")).to_have_text("listening")
            assert faults == []  # the page itself keeps to it
            stopped = await page.evaluate(attack)
            assert stopped == ["base-uri", "connect-src", "img-src", "script-src-elem", "style-src-elem"]
            assert await page.evaluate("window.attacked") is None

    asyncio.run(run())
