"""OpenAI's and Mistral's own clients: `vendors.py PORT FOLDER` prints the transcripts of FOLDER's phrases as JSON."""

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from mistralai.client import Mistral
from mistralai.client.models import AudioFormat
from openai import AsyncOpenAI

port, folder = sys.argv[1:]
MODEL = "voxtral-mini-transcribe-realtime-2602"  # the vendor's name


def phrases(rate: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(folder, str(rate)).iterdir())]


async def openai(turns: dict | None) -> list[str]:
    """Commit each phrase, or let the server find them."""
    client, texts, deltas = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x"), {}, {}
    async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        audio = {
            "format": {"type": "audio/pcm", "rate": 24000},
            "transcription": {"model": "gpt-4o-transcribe", "language": "en"},
            "turn_detection": turns,
        }
        await connection.session.update(session={"type": "transcription", "audio": {"input": audio}})
        for pcm in phrases(24000):
            pcm += bytes(72000 if turns else 0)  # 1.5 s of silence
            for at in range(0, len(pcm), 4800):
                await connection.input_audio_buffer.append(audio=base64.b64encode(pcm[at : at + 4800]).decode())
            if not turns:
                await connection.input_audio_buffer.commit()
        async for event in connection:
            if event.type == "error":
                raise RuntimeError(event.error.message)
            if event.type == "conversation.item.input_audio_transcription.delta":
                deltas[event.item_id] = deltas.get(event.item_id, "") + event.delta
            if event.type == "conversation.item.input_audio_transcription.completed":
                texts[event.item_id] = event.transcript
                if len(texts) == 3:
                    assert {item: text.strip() for item, text in deltas.items()} == texts
                    return list(texts.values())


async def mistral_stream() -> list[str]:
    async def audio() -> AsyncIterator[bytes]:
        for pcm in phrases(16000):
            yield pcm

    client = Mistral(api_key="x", server_url=f"http://127.0.0.1:{port}")
    async for event in client.audio.realtime.transcribe_stream(audio(), model=MODEL):
        if event.type == "transcription.done":
            return [event.text]


async def mistral_flush() -> list[str]:
    client, texts = Mistral(api_key="x", server_url=f"http://127.0.0.1:{port}"), []
    form = AudioFormat(encoding="pcm_s16le", sample_rate=24000)
    async with await client.audio.realtime.connect(model=MODEL, audio_format=form) as connection:
        for pcm in phrases(24000):
            for at in range(0, len(pcm), 4800):
                await connection.send_audio(pcm[at : at + 4800])
            await connection.flush_audio()
        async for event in connection:
            if event.type == "error":
                raise RuntimeError(event.error.message)
            if event.type == "transcription.done":
                texts.append(event.text)
                if len(texts) == 3:
                    return texts


async def main() -> None:
    clients = {
        "openai commits": openai(None),
        "openai server_vad": openai({"type": "server_vad", "silence_duration_ms": 700}),
        "mistral stream": mistral_stream(),
        "mistral flushes": mistral_flush(),
    }
    results = await asyncio.gather(
        *(asyncio.wait_for(client, 60) for client in clients.values()), return_exceptions=True
    )
    print(json.dumps(dict(zip(clients, results, strict=True)), default=repr))


asyncio.run(main())
