"""Sessions of the engine itself, for code in the API process: as voxtral_client.session, without a WebSocket.

Relies on: `OpenAIServingRealtime.transcribe_realtime` and `generate`, called as vLLM's
`RealtimeConnection._run_generation` calls them, whose source `voxtral_speed.ahead` checks.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import voxtral_speed

from voxtral_client.session import Done, Refused, SessionLost

BUSY_SECONDS = 10.0  # how long a client waits for a slot before it is told


class Unavailable(Refused):
    """No session for this client now. `busy`: because all slots are taken; otherwise the engine has failed."""

    def __init__(self, message: str, *, busy: bool = False):
        super().__init__(message)
        self.busy = busy


class Engine:
    """As voxtral_client.session.Server. `serving`: vLLM's OpenAIServingRealtime.

    `follow` is called when the caller has processed a frame, with the frame's text, and without text after a wait.
    `patience`: seconds for which all slots may be taken, until a session raises Unavailable.
    """

    def __init__(self, serving: Any, follow: Callable[[str], None] = lambda text: None, patience: float = BUSY_SECONDS):
        self.serving, self.follow, self.patience = serving, follow, patience
        self.busy_since: float | None = None

    async def model(self, name: str | None = None) -> dict:
        """Return what voxtral_client.session.Server.model returns."""
        length = self.serving.model_config.max_model_len
        return {"id": name or "", "max_model_len": length, "voxtral_speed": voxtral_speed.active("features")}

    @asynccontextmanager
    async def session(self, model: str) -> AsyncIterator["EngineSession"]:
        """Open a session. It takes a slot with its first audio."""
        session = EngineSession(self)
        try:
            yield session
        finally:
            await session.close()


class EngineSession:
    """As voxtral_client.session.Session."""

    def __init__(self, engine: Engine):
        self._engine, self._id = engine, f"realtime-{uuid.uuid4()}"
        self._audio: asyncio.Queue[np.ndarray | None] = asyncio.Queue()
        self._out: asyncio.Queue[str | Done | Exception] = asyncio.Queue()
        self._processed = ""  # text of the frame that the caller has received last
        self._task = asyncio.create_task(self._run())

    async def send(self, pcm: bytes) -> None:
        """Send PCM16 audio, 16 kHz mono, an even number of bytes."""
        self._audio.put_nowait(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768)

    async def finish(self) -> None:
        """End the audio; the last frames and Done follow."""
        self._audio.put_nowait(None)

    async def receive(self) -> str | Done:
        """Return the text of the next frame, or Done. It can be cancelled without loss.

        Raises SessionLost or Unavailable.
        """
        text, self._processed = self._processed, ""
        self._engine.follow(text)
        item = await self._out.get()
        if isinstance(item, Exception):
            raise item
        if isinstance(item, str):
            self._processed = item
        return item

    async def close(self) -> None:
        """End the session, whatever its state: its slot is free."""
        self._task.cancel()
        with suppress(Exception):  # the engine is dead
            await self._engine.serving.engine_client.abort(self._id)  # `generate` does not if it has hardly begun
        await asyncio.gather(self._task, return_exceptions=True)

    async def _stream(self) -> AsyncIterator[np.ndarray]:
        while (samples := await self._audio.get()) is not None:
            yield samples

    async def _run(self) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        serving, tokens = self._engine.serving, asyncio.Queue()
        params = SamplingParams.from_optional(
            temperature=0.0,
            max_tokens=serving.model_cls.realtime_max_tokens,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
        )
        prompt = frames = 0
        prompts = serving.transcribe_realtime(self._stream(), tokens)
        try:
            async for output in serving.engine_client.generate(
                prompt=prompts, sampling_params=params, request_id=self._id
            ):
                if output.outputs:
                    prompt = prompt or len(output.prompt_token_ids or ())
                    frames += len(output.outputs[0].token_ids)
                    tokens.put_nowait(list(output.outputs[0].token_ids))
                    self._out.put_nowait(output.outputs[0].text)
                    self._engine.busy_since = None
            self._out.put_nowait(Done(prompt, frames))
        except Exception as error:
            self._out.put_nowait(self._lost(error))
        finally:
            # vLLM does not close them where it refuses a frame, or is handing one over. The tasks that feed them would
            # wait for ever, and Python would report these when it collects garbage.
            while prompts.ag_running:  # by a task of vLLM's, which is cancelled
                await asyncio.sleep(0)
            await prompts.aclose()

    def _lost(self, error: Exception) -> Exception:
        """Return what `receive` raises for an error of the engine."""
        engine, now, text = self._engine, asyncio.get_running_loop().time(), str(error)
        if engine.serving.engine_client.errored:
            return Unavailable("the engine has failed: the server ends")
        if "currently busy" not in text:
            return SessionLost(f"server error: {text or type(error).__name__}")
        engine.busy_since = engine.busy_since or now
        if now - engine.busy_since < engine.patience:
            return SessionLost(text, busy=True)
        return Unavailable("all sessions of the server are taken: try again", busy=True)
