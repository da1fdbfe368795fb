"""The server runs short sessions before it is ready, so that the first captions are not late.

vLLM: kernels are compiled and buffers grow at their first use. In the first sessions after a start, single frames took
0.5 to 1.2 s on an H100.
Relies on: `voxtral_realtime.engine`, which calls vLLM as its realtime endpoint does.
Unnecessary with: a warm-up of realtime models in vLLM (no issue known).
"""

import asyncio
import time
from argparse import Namespace
from typing import Any

import numpy as np
from voxtral_int4 import is_voxtral_realtime

from voxtral_client.protocol import RATE
from voxtral_client.session import Done, SessionLost

from . import active, logger

SECONDS = 1.6  # of each session: the first chunk and 20 frames
AT_ONCE = 16  # most sessions: larger steps use nothing new


async def warm_up(serving: Any, args: Namespace) -> None:
    """Run one session, then several at once that do not all begin together. Never raises.

    `serving`: vLLM's OpenAIServingRealtime. `args`: vLLM's options.
    """
    if not active("warmup") or not is_voxtral_realtime(serving.model_config):
        return
    begun = time.monotonic()
    at_once = max(1, min(AT_ONCE, args.max_num_seqs or AT_ONCE) // (args.api_server_count or 1))
    try:
        await session(serving, 0)
        async with asyncio.TaskGroup() as tasks:
            for number in range(at_once):
                tasks.create_task(session(serving, number))
    except Exception as error:  # the server works without the warm-up
        logger.warning("the warm-up failed: %s", error)
        return
    logger.info("Warmed up by %d sessions in %.1f s", 1 + at_once, time.monotonic() - begun)


async def session(serving, number: int) -> None:
    """Transcribe quiet noise; not while other processes use all slots. Raises SessionLost or Unavailable."""
    from voxtral_realtime.engine import Engine

    # Every second session begins later, so that its first chunk is in one step with frames of others.
    await asyncio.sleep(0.05 * (number % 2) * number)
    noise = np.random.default_rng(number).normal(0, 33, round(SECONDS * RATE)).astype("<i2")
    async with Engine(serving).session("") as engine:
        await engine.send(noise.tobytes())
        await engine.finish()
        try:
            while not isinstance(await engine.receive(), Done):
                pass
        except SessionLost as error:
            if not error.busy:
                raise
