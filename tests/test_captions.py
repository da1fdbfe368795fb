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
from pathlib import Path

import numpy as np
import openai
import pytest
import srt
import websockets
from browser import ELSEWHERE, browsing, firefox
from conftest import CHECKPOINT, ROOT, ServerProcess
from playwright.async_api import Page, expect
from proxy import Proxy
from pulse import Pulse, pulseaudio
from speech import talk, write
from test_timeline import Model, audio_of

from voxtral_client.audio import RATE, to_pcm16
from voxtral_client.session import FRAME, Lost, Server
from voxtral_client.timeline import Timeline

IDLE_SECONDS = 6
FRIEND = "https://friend.example"


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A talk of two phrases: (path of a WAV file, words)."""
    samples, spoken = talk(5.5, seed=25)
    path = write(tmp_path_factory.mktemp("speech") / "talk.wav", np.concatenate([samples, np.zeros(RATE, np.float32)]))
    return path, [text for text, _, _ in spoken]


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with TLS, a key, a single slot, sessions that may idle for 6 s, and a middleware of the user's own."""
    folder = tmp_path_factory.mktemp("locked")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run([ROOT / "scripts/make-certificate", folder], check=True, capture_output=True)
    options = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    options += ["--middleware", "starlette.middleware.gzip.GZipMiddleware"]
    settings = {"SESSION_IDLE_MINUTES": str(IDLE_SECONDS / 60), "ALLOWED_ORIGINS": FRIEND, "MAX_NUM_SEQS": "1"}
    process = ServerProcess(folder / "log", *options, VLLM_API_KEY="sesame", **settings)
    process.certificate = certificate
    process.page = f"https://127.0.0.1:{process.port}/captions/"
    yield process.start().wait()
    process.kill()


def address(server, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.port}/captions/"


async def start(page: Page) -> None:
    await page.locator("#start:enabled").click()


async def captions(page: Page, count: int) -> list[str]:
    """Wait until `count` words are settled, stop, and return all words."""
    settled = page.locator("#settled")
    await expect(settled).to_contain_text(re.compile(rf"(\S+\s+){{{count - 1}}}\S"))
    await page.get_by_role("button", name="Stop", exact=True).click()
    await expect(page.locator("#start")).to_have_text("Start")
    await expect(page.locator("#tail")).to_be_empty()
    return (await settled.inner_text()).split()


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
            await expect(page.locator("#tail")).to_contain_text(spoken[0])
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
            assert await page.evaluate(live) == ["settledpolite"]
            assert await page.locator("[aria-live] #tail").count() == 0
            for scheme in ("light", "dark"):
                await page.emulate_media(color_scheme=scheme)
                assert await page.evaluate(CONTRAST, "#settled") > 7
                assert await page.evaluate(CONTRAST, "#tail") > 4.5
            for width in (360, 1280):
                await page.set_viewport_size({"width": width, "height": 700})
                assert await page.evaluate("document.documentElement.scrollWidth") <= width
            size = "parseFloat(getComputedStyle(document.querySelector('#settled')).fontSize)"
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
            await expect(page.locator("#tail")).to_contain_text(spoken[1])
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
            await page.becomes("#settled", " ".join(spoken))
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
            with pytest.raises(Lost, match=r"4408 idle: no message for 0\.1 minutes"):
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
        time.sleep(IDLE_SECONDS + 4)
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
      const keep = { state: (name, message) => message && faults.push(message), tail: () => {}, lost: () => {} };
      const transcriber = new Transcriber(new URL("..", base), "", { ...keep, words: (more) => words.push(...more) });
      for (let at = 0; at < samples.length; at += 1280) transcriber.hear(samples.slice(at, at + 1280));
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


def test_books_agree_with_the_clients(server):
    """The same audio, deltas and cuts into timeline.py and timeline.js: the same words, times and settled points."""
    noise = np.random.default_rng(7)
    lengths = [(int(noise.integers(8, 45)), int(noise.integers(1, 100))) for _ in range(60)] + [(30, 1)] * 60
    samples, words = audio_of(lengths)
    timeline, pcm, calls, seen = Timeline(), to_pcm16(samples), [], []

    def call(name: str, argument: object = None) -> object:
        calls.append([name, base64.b64encode(argument).decode() if name == "hear" else argument])
        result = getattr(timeline, name)(*[] if argument is None else [argument])
        seen.append([timeline.settled, timeline.understood, round(timeline.unanswered(), 6), len(timeline.tail)])
        return result

    sent = 0
    while sent < len(pcm):
        model = Model(words, call("begin"))
        cut = noise.integers(100, 700)
        while sent < len(pcm) and model.frames < cut:
            if timeline.heard < timeline.understood + 7 * FRAME:
                call("hear", pcm[sent : sent + 3200])
                sent += 3200
            else:
                call("understand", model.delta())
        if noise.random() < 0.3:
            call(str(noise.choice(["settle_between_words", "suspect_rut"])))
        elif noise.random() < 0.3:
            call("drop_oldest", 20 * RATE)
    call("finish")
    script = """async ([base, calls]) => {
      const { Timeline } = await import(base + "timeline.js");
      const timeline = new Timeline(), seen = [];
      for (const [name, argument] of calls) {
        const samples = () => new Int16Array(Uint8Array.from(atob(argument), c => c.charCodeAt(0)).buffer);
        timeline[name.replace(/_(.)/g, (_, c) => c.toUpperCase())](name === "hear" ? samples() : argument);
        const unanswered = Math.round(timeline.unanswered() * 1e6) / 1e6;
        seen.push([timeline.settled, timeline.understood, unanswered, timeline.tail.length]);
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
