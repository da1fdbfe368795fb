"""Frames go to the engine when their audio arrives, without waiting for the token of the previous frame.

vLLM: the prompt of a frame is the token that the engine computed from the previous frame. The API process waits for
this token, puts it into the next frame's request, and sends it back. During that time the engine has no work for this
session.
Cost: one round trip through the API process for each frame, and the API process handles all sessions in turn: half of
the time of a step with 64 unpaced sessions.
Here: up to AHEAD frames of a session are in the engine. vLLM merges an output with the next one if the API process has
not read it yet. One delta would then be two frames, so the outputs of a session are queued instead.
Relies on: the engine knows the token (`_update_request_as_session` replaces it by the same token from the request);
vLLM's queues of frames in the scheduler (`streaming_queue`) and in the API process (`input_chunk_queue`). The API
process sends frames in advance only if all engines say that this patch is on. The text does not change.
Unnecessary with: realtime models whose tokens are fed back in the engine (no issue known).
"""

import asyncio
from collections import deque

from .frames import Frames

AHEAD = 4  # most frames of a session in the engine: enough to keep it busy, and few to discard when the session ends
ANY = 0  # placeholder for the token that the engine knows


CHECKED = {
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session": "82a6f2d15293",
    "vllm.v1.engine.async_llm:AsyncLLM._add_streaming_input_request": "0c7d0fd89495",
    "vllm.v1.engine.output_processor:RequestOutputCollector": "312eb6353707",
    "vllm.model_executor.models.voxtral_realtime:VoxtralRealtimeGeneration.buffer_realtime_audio": "0f8dfd4d0b88",
    "vllm.model_executor.models.voxtral_realtime:VoxtralRealtimeBuffer.get_input_stream": "ea57901a276f",
    "vllm.entrypoints.speech_to_text.realtime.connection:RealtimeConnection._run_generation": "5cf55d3a1b26",
}


def apply_to_engine() -> None:
    """Put the token of the previous frame into each frame."""
    from vllm.v1.core.sched.scheduler import Scheduler

    update_session = Scheduler._update_request_as_session

    def update_with_own_token(self, session, update):
        if type(session.mm_features) is Frames and len(update.prompt_token_ids or ()) == 1:
            update.prompt_token_ids = (
                session._all_token_ids[session.num_computed_tokens :][:1] or update.prompt_token_ids
            )
        update_session(self, session, update)

    Scheduler._update_request_as_session = update_with_own_token


def apply_to_server() -> None:
    """Let each session send up to AHEAD frames before their tokens arrive."""
    from vllm.model_executor.models.voxtral_realtime import VoxtralRealtimeGeneration
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

    buffer_audio = VoxtralRealtimeGeneration.buffer_realtime_audio.__func__

    async def buffer_ahead(cls, audio_stream, input_stream, model_config):
        async for prompt in buffer_audio(cls, audio_stream, Credit(input_stream), model_config):
            yield prompt

    class InOrder(RequestOutputCollector):
        def put(self, output):
            if self.output is None:
                super().put(output)
            else:
                self.later.append(output)

        async def get(self):
            try:
                return await super().get()
            finally:
                self._next()

        def get_nowait(self):
            try:
                return super().get_nowait()
            finally:
                self._next()

        def _next(self):
            if self.output is None and self.later:
                super().put(self.later.popleft())

    add_streaming = AsyncLLM._add_streaming_input_request

    async def add_in_order(self, request_id, frames, *args, **kwargs):
        collector = await add_streaming(self, request_id, frames, *args, **kwargs)
        collector.__class__, collector.later = InOrder, deque()
        # As in voxtral_realtime.engine, for vLLM's own connections: it does not close `frames` where it refuses one.
        collector._input_stream_task.add_done_callback(lambda task: task.get_loop().create_task(frames.aclose()))
        return collector

    AsyncLLM._add_streaming_input_request = add_in_order
    VoxtralRealtimeGeneration.buffer_realtime_audio = classmethod(buffer_ahead)


class Credit:
    """Replaces the queue of a session's tokens: it returns a placeholder when the next frame may be sent.

    The second frame waits for the first token, because vLLM's connection then counts the tokens of the prompt.
    """

    def __init__(self, tokens: asyncio.Queue[list[int]]):
        self._tokens, self._free = tokens, None

    async def get(self) -> list[int]:
        """Return [ANY]. Wait while AHEAD frames are in the engine."""
        if self._free:
            self._free -= 1
        else:
            await self._tokens.get()
            self._free = AHEAD - 1 if self._free is None else 0
        return [ANY]
