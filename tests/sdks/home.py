"""Home Assistant's end of wyoming-openai: `home.py PORT FOLDER` prints the transcripts of its two ways as JSON."""

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path

from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient

port, folder = sys.argv[1:]
RATE = 16_000
MODELS = {"file": "tiny", "realtime": "gpt-live-transcribe"}
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    proxy = probe.getsockname()[1]
OPTIONS = ["--uri", f"tcp://127.0.0.1:{proxy}", "--languages", "en", "--stt-openai-url", f"http://127.0.0.1:{port}/v1"]
OPTIONS += ["--stt-openai-key", "x", "--stt-models", MODELS["file"], "--stt-realtime-models", MODELS["realtime"]]


async def command(model: str) -> str:
    """Say all phrases as one voice command, as Assist sends it."""
    while True:
        try:
            client = AsyncTcpClient("127.0.0.1", proxy)
            await client.connect()
            break
        except OSError:  # it has not started yet
            await asyncio.sleep(0.2)
    await client.write_event(Transcribe(name=model, language="en").event())
    await client.write_event(AudioStart(rate=RATE, width=2, channels=1).event())
    for path in sorted(Path(folder, str(RATE)).iterdir()):
        pcm = path.read_bytes()
        for at in range(0, len(pcm), 3200):
            await client.write_event(AudioChunk(rate=RATE, width=2, channels=1, audio=pcm[at : at + 3200]).event())
    await client.write_event(AudioStop().event())
    while event := await client.read_event():
        if Transcript.is_type(event.type):
            return Transcript.from_event(event).text
    raise EOFError("the proxy closed the connection")


async def main() -> None:
    async with asyncio.timeout(90):
        texts = await asyncio.gather(*map(command, MODELS.values()))
    print(json.dumps(dict(zip(MODELS, texts, strict=True))))


with subprocess.Popen([sys.executable, "-m", "wyoming_openai", *OPTIONS], stdout=sys.stderr) as process:
    try:
        asyncio.run(main())
    finally:
        process.terminate()
