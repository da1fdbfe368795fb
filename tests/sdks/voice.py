"""What voice agents are built with, pipecat and LiveKit: `voice.py PORT FOLDER` speaks FOLDER's phrases to all at once.

Behind the second phrase it prints `restart` and waits for a line: the server is another one then. Prints the
transcripts as JSON. Microphones never stop: between the phrases there is silence.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from livekit import rtc
from livekit.agents import stt, utils
from livekit.plugins import mistralai, openai, silero
from loguru import logger
from mistralai.client import Mistral
from pipecat.frames.frames import (
    EndFrame,
    InputAudioRawFrame,
    TranscriptionFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.mistral.stt import MistralSTTService
from pipecat.services.openai.stt import OpenAIRealtimeSTTService
from pipecat.services.stt_service import STTService
from pipecat.workers.runner import WorkerRunner

port, folder = sys.argv[1:]
HTTP = f"http://127.0.0.1:{port}"
PATIENCE = 90  # seconds for a transcript, or for a connection


class Speaker:
    """Speaks to one client, at its rate. The client appends to `texts`."""

    def __init__(self, rate: int):
        self.rate = rate
        self.phrases = [path.read_bytes() for path in sorted(Path(folder, str(rate)).iterdir())]
        self.chunk = rate // 10 * 2  # 100 ms
        self.texts: list[str] = []
        self.connected = asyncio.Event()

    async def hear(self, pcm: bytes) -> None:
        raise NotImplementedError

    async def says(self, speech: bool) -> None:
        """For clients that are told by a detector of their own."""

    async def play(self, pcm: bytes) -> None:
        for at in range(0, len(pcm), self.chunk):
            await self.hear(pcm[at : at + self.chunk])
            await asyncio.sleep(0.1)

    async def silence(self, *, until: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not until():
                await self.play(bytes(self.chunk))

    async def talk(self, at_the_restart: Awaitable) -> list[str]:
        for number, phrase in enumerate(self.phrases):
            if number == 2:
                self.connected.clear()
                await at_the_restart
            await self.silence(until=self.connected.is_set)
            await self.says(True)
            await self.play(phrase + bytes(2 * self.chunk))
            await self.says(False)
            await self.silence(until=lambda texts=number + 1: len(self.texts) >= texts)
        return self.texts


class Pipecat(Speaker, FrameProcessor):
    """The end of a pipeline with one service. The pipeline's detector of speech is what `says` pushes."""

    def __init__(self, service: STTService, rate: int):
        FrameProcessor.__init__(self)
        Speaker.__init__(self, rate)
        self.worker = PipelineWorker(
            Pipeline([service, self]), params=PipelineParams(audio_in_sample_rate=rate), cancel_on_idle_timeout=False
        )
        service.add_event_handler("on_connected", self._on_connected)

    async def _on_connected(self, _service: STTService) -> None:
        self.connected.set()

    async def process_frame(self, frame, direction) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, TranscriptionFrame):
            self.texts.append(frame.text)
        await self.push_frame(frame, direction)

    async def hear(self, pcm: bytes) -> None:
        await self.worker.queue_frame(InputAudioRawFrame(audio=pcm, sample_rate=self.rate, num_channels=1))

    async def says(self, speech: bool) -> None:
        await self.worker.queue_frame(VADUserStartedSpeakingFrame() if speech else VADUserStoppedSpeakingFrame())

    async def talk(self, at_the_restart: Awaitable) -> list[str]:
        runner = WorkerRunner(handle_sigint=False)
        await runner.add_workers(self.worker)
        running = asyncio.create_task(runner.run())
        try:
            return await super().talk(at_the_restart)
        finally:
            await self.worker.queue_frame(EndFrame())
            await running


class LiveKit(Speaker):
    """A stream of one plugin. It keeps what is said while the server is away."""

    def __init__(self, plugin: stt.STT):
        super().__init__(16_000)
        self._stream = plugin.stream()
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self._stream:
            if event.type == stt.SpeechEventType.FINAL_TRANSCRIPT:
                self.texts.append(event.alternatives[0].text)

    async def hear(self, pcm: bytes) -> None:
        self.connected.set()
        self._stream.push_frame(rtc.AudioFrame(pcm, self.rate, 1, len(pcm) // 2))
        if self._listening.done():
            await self._listening

    async def talk(self, at_the_restart: Awaitable) -> list[str]:
        try:
            return await super().talk(at_the_restart)
        finally:
            await self._stream.aclose()
            self._listening.cancel()


async def main() -> None:
    turns = {"type": "server_vad", "silence_duration_ms": 700}
    vendor = Mistral(api_key="x", server_url=HTTP)
    async with utils.http_context.open():
        clients = {
            # At the service's own rate: pipecat's resampler loses sound where a block comes 0.2 s after the last.
            "pipecat openai": Pipecat(
                OpenAIRealtimeSTTService(api_key="x", base_url=f"ws://127.0.0.1:{port}/v1/realtime"), 24_000
            ),
            "pipecat mistral": Pipecat(MistralSTTService(api_key="x", base_url=HTTP), 16_000),
            "livekit openai": LiveKit(
                openai.STT(base_url=f"{HTTP}/v1", api_key="x", model="tiny", use_realtime=True, turn_detection=turns)
            ),
            "livekit mistral": LiveKit(
                mistralai.STT(client=vendor, model="voxtral-mini-transcribe-realtime-2602", vad=silero.VAD.load())
            ),
        }
        waiting, restarted = asyncio.Semaphore(0), asyncio.Event()

        async def at_the_restart() -> None:
            waiting.release()
            await restarted.wait()

        tasks = {name: asyncio.create_task(client.talk(at_the_restart())) for name, client in clients.items()}
        for task in tasks.values():  # one that fails early does not wait
            task.add_done_callback(lambda _: waiting.release())
        for _ in tasks:
            await waiting.acquire()
        print("restart", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        restarted.set()
        await asyncio.wait(tasks.values())
        for name, task in tasks.items():
            tasks[name] = {"texts": clients[name].texts, "error": repr(task.exception())}
    print(json.dumps(tasks))


logger.remove()
logger.add(sys.stderr, level="WARNING")
asyncio.run(main())
