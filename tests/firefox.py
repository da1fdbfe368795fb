"""Firefox with PulseAudio's microphone, driven by WebDriver BiDi."""

import asyncio
import itertools
import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import websockets
from servers import free_port


class Firefox:
    """A page in Firefox, by WebDriver BiDi (https://w3c.github.io/webdriver-bidi/), which Firefox speaks itself."""

    def __init__(self, socket: websockets.ClientConnection):
        self._socket, self._commands, self.faults = socket, itertools.count(1), []

    async def command(self, method: str, **params: object) -> dict:
        """Return a command's result; what the page throws meanwhile goes to `faults`."""
        number = next(self._commands)
        await self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (answer := json.loads(await self._socket.recv())).get("id") != number:
            if answer["params"]["level"] == "error":
                self.faults.append(answer["params"]["text"])
        assert answer["type"] == "success", answer
        return answer["result"]

    async def open(self, url: str) -> None:
        await self.command("session.new", capabilities={})
        await self.command("session.subscribe", events=["log.entryAdded"])
        self._context = (await self.command("browsingContext.getTree"))["contexts"][0]["context"]
        await self.command("browsingContext.navigate", context=self._context, url=url, wait="complete")

    async def evaluate(self, expression: str) -> object:
        """Return the value of a JavaScript expression, evaluated as if after a click."""
        options = {"target": {"context": self._context}, "awaitPromise": True, "userActivation": True}
        return (await self.command("script.evaluate", expression=expression, **options))["result"].get("value")

    async def text(self, selector: str) -> str:
        return await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText.trim()")

    async def becomes(self, selector: str, text: str) -> None:
        """Wait until the element shows this text."""
        end = time.monotonic() + 60
        while (shown := await self.text(selector)) != text:
            assert time.monotonic() < end, f"{selector} shows {shown!r}"
            await asyncio.sleep(0.1)

    async def settles(self, selector: str) -> str:
        """Wait until the element shows some text, and no other for 8 s; return it."""
        shown, since, end = "", time.monotonic(), time.monotonic() + 60
        while not shown or time.monotonic() - since < 8:
            assert time.monotonic() < end, f"{selector} shows {shown!r}"
            await asyncio.sleep(0.1)
            if (now := await self.text(selector)) != shown:
                shown, since = now, time.monotonic()
        return shown


@asynccontextmanager
async def firefox(folder: Path, environment: dict[str, str]) -> AsyncIterator[Firefox]:
    """Start Firefox with an empty profile in `folder`; it uses microphones without asking."""
    profile = folder / "profile"
    profile.mkdir()
    (profile / "user.js").write_text('user_pref("media.navigator.permission.disabled", true);\n')
    port = free_port()
    command = ["firefox-esr", "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", str(port)]
    with (folder / "firefox.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(60):
            page = Firefox(await _connected(f"ws://127.0.0.1:{port}/session"))
        yield page
        assert not page.faults
    finally:
        process.terminate()
        process.wait(20)


async def _connected(url: str) -> websockets.ClientConnection:
    while True:
        try:
            return await websockets.connect(url, max_size=None, proxy=None)
        except OSError:
            await asyncio.sleep(0.2)
