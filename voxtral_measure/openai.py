"""Sessions of OpenAI's realtime transcription, for the benchmark: `--url ws://HOST:8000/v1/realtime?intent=transcription`.

No message comes for a frame. The server's `voxtral.progress`, once a second, says how far it is.
"""

import asyncio

from voxtral_client.protocol import FRAME, RATE
from voxtral_client.session import ANSWER_SECONDS, Done, Refused, Session, SessionLost, printable

INTENT = "intent=transcription"


class OpenAISession(Session):
    """As Session, but `receive` returns the number of frames that are transcribed, as an int."""

    _sent, _finished = 0, False

    async def start(self, model: str) -> None:
        """Choose model and format. Raises Refused or SessionLost."""
        form = {"format": {"type": "audio/pcm", "rate": RATE}, "transcription": {"model": model}}
        audio = {"input": form | {"turn_detection": {"type": "server_vad"}}}
        await self._send("session.update", session={"type": "transcription", "progress": True, "audio": audio})
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while (await self._receive()).get("type") != "session.updated":
                    pass
        except TimeoutError:
            raise SessionLost(f"the server sent no session.updated within {ANSWER_SECONDS:.0f} s") from None

    async def send(self, pcm: bytes) -> None:
        """As Session's."""
        self._sent += len(pcm) // 2
        await super().send(pcm)

    async def finish(self) -> None:
        """End the audio. Raises SessionLost."""
        self._finished = True
        await self._send("input_audio_buffer.commit")

    async def receive(self) -> int | Done:
        """Return the number of frames that are transcribed, or Done. Raises Refused or SessionLost."""
        while True:
            event = await self._receive()
            kind = str(event.get("type"))
            if kind == "voxtral.progress":
                return event["transcribed_ms"] * RATE // 1000 // FRAME
            if kind.endswith(".completed") and self._finished and event["audio_end_ms"] >= 1000 * self._sent // RATE:
                return Done(0, 0)
            if kind == "error":
                code, message = event["error"]["code"], f"server error: {printable(event['error']['message'])}"
                if code.startswith("server_"):
                    raise SessionLost(message, busy=code == "server_busy")
                raise Refused(message)
