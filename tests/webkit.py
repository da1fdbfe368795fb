"""WebKitGTK with its mock microphone, driven by WebDriver."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import free_port

# The microphone is WebKit's own mock: no sound of ours can be played to it.
BROWSER = {
    "binary": next(iter(map(str, Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))), ""),
    "args": [
        "--automation",
        "--enable-mock-capture-devices=true",
        "--enable-media-stream=true",
        "--enable-write-console-messages-to-stdout=true",
    ],
}


class WebKit:
    """A page in WebKitGTK's MiniBrowser, by WebDriver (https://www.w3.org/TR/webdriver2/)."""

    def __init__(self, port: int):
        self._base = f"http://127.0.0.1:{port}/session"
        capabilities = {"alwaysMatch": {"webkitgtk:browserOptions": BROWSER, "acceptInsecureCerts": True}}
        self._base += f"/{self._post('', capabilities=capabilities)['sessionId']}"

    def _post(self, path: str, **params: object) -> object:
        request = urllib.request.Request(self._base + path, json.dumps(params).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def open(self, url: str) -> None:
        self._post("/url", url=url)

    def evaluate(self, expression: str) -> object:
        """Return the value of a JavaScript expression."""
        return self._post("/execute/sync", script=f"return {expression}", args=[])

    def click(self, selector: str) -> None:
        element = self._post("/element", using="css selector", value=selector)
        self._post(f"/element/{next(iter(element.values()))}/click")

    def shows(self, selector: str, text: str) -> None:
        """Wait until the element's text contains this text."""
        end, shown = time.monotonic() + 60, ""
        while text not in shown:
            assert time.monotonic() < end, f"{selector} shows {shown!r}"
            time.sleep(0.1)
            shown = self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


@contextmanager
def webkit(log: Path) -> Iterator[WebKit]:
    """Start WebKit's driver with a virtual screen."""
    port = free_port()
    command = ["xvfb-run", "--auto-servernum", "WebKitWebDriver", f"--port={port}"]
    with log.open("w") as file:
        environment = os.environ | {"WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield WebKit(port)
    finally:
        os.killpg(process.pid, 15)
        process.wait()
