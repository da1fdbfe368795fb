"""Chromium with a spoken WAV file as its microphone, driven by playwright."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from playwright.async_api import Page, async_playwright, expect

# The browser treats every name but localhost as another machine. This name resolves to 127.0.0.1.
ELSEWHERE = "captions.test"

expect.set_options(timeout=30_000)  # a machine may be slow; no test is about speed


# All that the page said: a message may be gone before anybody looks.
LISTEN = """
  window.said = [];
  document.addEventListener("DOMContentLoaded", () => {
    const message = document.querySelector("#message");
    if (message) new MutationObserver(() => said.push(message.textContent)).observe(message, {childList: true});
  });
"""


@asynccontextmanager
async def browsing(wav: Path | None = None, **context: object) -> AsyncIterator[Page]:
    """Yield an empty page in a new browser. `context`: options of playwright's new_context.

    `wav`: the microphone's signal, played once from when the page opens the microphone, then silence. Raises
    AssertionError if the page had an error.
    """
    options = ["--no-sandbox", f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1"]
    options += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    if wav:
        options.append(f"--use-file-for-fake-audio-capture={wav}%noloop")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=options)
        try:
            page = await (await browser.new_context(**context)).new_page()
            page.faults = []
            page.on("pageerror", lambda error: page.faults.append(error))
            page.set_default_timeout(30_000)
            await page.add_init_script(LISTEN)
            yield page
            assert not page.faults
        finally:
            await browser.close()


async def says(page: Page, text: str) -> None:
    """Wait until the page says or has said `text`."""
    await page.wait_for_function("text => said.some(message => message.includes(text))", arg=text)
