"""Whom the server of the captions page lets in, and what it serves: files, keys, origins, uploads."""

import asyncio
import base64
import os
import ssl
import subprocess
import sys
import urllib.request

import openai
import pytest
import websockets
from browser import browsing
from pages import address, phrases, start
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import expect
from proxy import Proxy
from scripted import ScriptedServer
from servers import CHECKPOINT, FRIEND, ROOT

from voxtral_client.protocol import RATE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return phrases(tmp_path_factory.mktemp("speech"))


def test_client_that_paused_goes_on(locked, speech):
    """Standard input that falls silent for longer than a session may: the words come out as if it had not."""
    path, spoken = speech
    pcm = path.read_bytes()[44:]
    options = ["--url", locked.url, "--api-key", "sesame", "--cafile", locked.certificate, "--raw", str(RATE)]
    command = [sys.executable, ROOT / "test_file_transcribe.py", "-", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        client.stdin.write(pcm[: len(pcm) // 4 * 2])
        client.stdin.flush()
        errors = b""
        while b"4408" not in errors:
            errors += (more := os.read(client.stderr.fileno(), 4096))
            assert more, errors.decode()
        output, _ = client.communicate(pcm[len(pcm) // 4 * 2 :], timeout=120)
    assert output.decode().split() == spoken


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


USE = """async ([base, audio]) => {
  const models = await fetch(base + "models", { headers: { Authorization: "Bearer sesame" } });
  const form = new FormData();
  form.append("file", new Blob([Uint8Array.from(atob(audio), c => c.charCodeAt(0))]), "talk.wav");
  form.append("response_format", "text");
  const request = { method: "POST", body: form, headers: { Authorization: "Bearer sesame" } };
  const upload = await fetch(base + "audio/transcriptions", request);
  const locked = await fetch(base + "models");
  return [(await models.json()).data[0].id, (await upload.text()).trim().split(" "), locked.status];
}"""


def test_page_of_another_site(locked, speech):
    """In ALLOWED_ORIGINS, it may use everything, and is told what is wrong; others may read nothing."""
    path, spoken = speech
    base, audio = locked.page.replace("captions/", "v1/"), base64.b64encode(path.read_bytes()).decode()

    async def run(origin: str) -> list:
        async with browsing(ignore_https_errors=True, permissions=["local-network-access"]) as page:
            await page.route(f"{origin}/", lambda route: route.fulfill(body="<p>", content_type="text/html"))
            await page.goto(f"{origin}/")
            return await page.evaluate(USE, [base, audio])

    assert asyncio.run(run(FRIEND)) == ["tiny", spoken, 401]
    with pytest.raises(PlaywrightError, match="Failed to fetch"):
        asyncio.run(run("https://stranger.example"))


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
    used = {path.name for path in (ROOT / "web").iterdir()}
    assert all(get(name)[0] == 200 for name in used)


@pytest.mark.parametrize("setting", ["SESSION_IDLE_MINUTES=ten", "MAX_UPLOAD_MB=0", "UPLOAD_SESSIONS=half"])
def test_refuses_nonsense_before_the_start(setting):
    command = ["env", f"MODEL={CHECKPOINT}", "HOST=127.0.0.1", setting, "./serve.sh"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert setting in result.stderr


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
