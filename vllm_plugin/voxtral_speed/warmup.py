"""The server runs short sessions before it is ready, so that the first captions are not late.

vLLM: kernels are compiled and buffers grow at their first use. In the first sessions after a start, single frames took
0.5 to 1.2 s on an H100.
Relies on: `OpenAIServingRealtime.transcribe_realtime` and `generate`, called as the realtime endpoint calls them.
Unnecessary with: a warm-up of realtime models in vLLM (no issue known).

vLLM calls `Warmup.init_state` when the engine is ready and the port does not answer yet, through the entry point
`voxtral_warmup` of `vllm.endpoint_plugins`. VLLM_PLUGINS must name the entry point.
"""

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
from voxtral_int4 import is_voxtral_realtime

from . import active, expect, logger

RATE, FRAME = 16_000, 1280  # samples
SECONDS = 1.6  # of each session: the first chunk and 20 frames
AT_ONCE = 16  # most sessions: larger steps use nothing new


def apply_to_server() -> None:
    """Raises Unexpected."""
    from vllm.entrypoints.speech_to_text.realtime.connection import RealtimeConnection

    expect(RealtimeConnection._run_generation, "5cf55d3a1b26")


class Warmup:
    """An endpoint plugin without a route. Interface: vllm/plugins/endpoint_plugins/interface.py."""

    name = "voxtral_warmup"
    required_tasks = ("realtime",)

    def attach_router(self, app: object) -> None:
        """Add no route."""

    async def init_state(self, engine_client: object, state: object, args: object) -> None:
        """Run one session, then several at once that do not all begin together. Never raises."""
        serving = getattr(state, "openai_serving_realtime", None)
        if not active("warmup") or serving is None or not is_voxtral_realtime(serving.model_config):
            return
        begun = time.monotonic()
        at_once = max(1, min(AT_ONCE, args.max_num_seqs or AT_ONCE))
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
    """Transcribe noise, as RealtimeConnection._run_generation in vLLM does."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    tokens: asyncio.Queue[list[int]] = asyncio.Queue()
    params = SamplingParams.from_optional(
        temperature=0.0,
        max_tokens=serving.model_cls.realtime_max_tokens,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )
    # Every second session begins later, so that its first chunk is in one step with frames of others.
    await asyncio.sleep(0.05 * (number % 2) * number)
    prompts = serving.transcribe_realtime(noise(number), tokens)
    async for output in serving.engine_client.generate(
        prompt=prompts, sampling_params=params, request_id=f"warmup-{number}-{time.monotonic_ns()}"
    ):
        if output.outputs:
            tokens.put_nowait(list(output.outputs[0].token_ids))


async def noise(seed: int) -> AsyncIterator[np.ndarray]:
    """Yield SECONDS of quiet noise at 16 kHz, one float32 array (FRAME,) in [-1, 1] for each frame."""
    generator = np.random.default_rng(seed)
    for _ in range(round(SECONDS * RATE / FRAME)):
        yield generator.normal(0, 1e-3, FRAME).astype(np.float32)
