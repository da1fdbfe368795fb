"""Servers of asyncio beside a test that is not: each in a thread with an event loop of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def threaded(manager: contextlib.AbstractAsyncContextManager[Any]) -> Iterator[Any]:
    """Enter an asynchronous context manager in a new thread, whose loop runs until it has been left there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(manager.__aenter__(), loop).result(60)
    finally:
        asyncio.run_coroutine_threadsafe(manager.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
