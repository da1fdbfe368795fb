"""OpenAI's realtime transcription: `/v1/realtime?intent=transcription`. It only translates; the work is in core.py."""

import re
import time
import uuid

from starlette.websockets import WebSocket

from .core import LEAST_SILENCE_MS, Connection, Invalid, Item, Stretch, milliseconds, value

FORMATS = {"audio/pcm": "pcm_s16le", "audio/pcmu": "pcm_mulaw", "audio/pcma": "pcm_alaw"}
OLD_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
RATE = 24_000  # of audio/pcm; G.711 has 8000
TURNS = {"threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 500}  # OpenAI's defaults
TRANSCRIPTION = "conversation.item.input_audio_transcription"


class OpenAI(Connection):
    """One socket of a client of OpenAI's protocol."""

    NAMES = re.compile(r"whisper-1|gpt-[\w.-]*(transcribe|whisper|realtime)[\w.-]*")

    def __init__(self, socket: WebSocket):
        super().__init__(socket)
        self._id = f"sess_{uuid.uuid4().hex[:20]}"
        self._previous: str | None = None  # the last item that was committed
        self._set_turns(turns_of({}))
        self._set_format({})

    def send(self, kind: str, **fields: object) -> None:
        super().send(kind, event_id=f"event_{uuid.uuid4().hex[:20]}", **fields)

    # --- the client's messages ---

    def handle(self, event: dict) -> None:
        match event.get("type"):
            case "input_audio_buffer.append":
                self.append(event.get("audio"))
            case "input_audio_buffer.commit":
                stretch = self.commit()
                if stretch is None:
                    message = "there is no audio since the last item: append some first"
                    raise Invalid(message, "input_audio_buffer_commit_empty")
                if self.silence is None:  # otherwise items that the server ends may come before
                    self._committed(stretch.item)
            case "input_audio_buffer.clear":
                self.clear()
                self.send("input_audio_buffer.cleared")
            case "session.update":
                session = value(event, "session", dict, {})
                progress = value(session, "progress", bool, self.progress)
                self._update(value(value(session, "audio", dict, {}), "input", dict, {}), progress)
            case "transcription_session.update":  # the protocol's older form
                session = value(event, "session", dict, {})
                given = {"transcription": session.get("input_audio_transcription")}
                if kind := value(session, "input_audio_format", str):
                    given["format"] = {"type": OLD_FORMATS.get(kind, kind)}
                self._update(session | given, self.progress)
            case kind:
                raise Invalid(f"the server knows no event {kind!r:.80}", "unknown_event", "type")

    def _update(self, given: dict, progress: bool) -> None:
        """Put a session's settings into force: all of them, or none. Raises Invalid."""
        self.check_model(value(given, "transcription", dict, {}).get("model"))
        turns = turns_of(value(given, "turn_detection", dict)) if "turn_detection" in given else self._turns
        if form := value(given, "format", dict):
            self._set_format(form)
        self._set_turns(turns)
        self.progress = progress
        self.send("session.updated", session=self.session())

    def _set_turns(self, turns: dict | None) -> None:
        self._turns, self.silence = turns, turns and turns["silence_duration_ms"] / 1000

    def _set_format(self, form: dict) -> None:
        kind = value(form, "type", str, "audio/pcm")
        rate = value(form, "rate", int, RATE) if kind == "audio/pcm" else 8000
        self.set_format(FORMATS.get(kind, kind), rate, "format")
        self._format = {"type": kind} | ({"rate": rate} if kind == "audio/pcm" else {})

    def session(self) -> dict:
        """Return what is in force. What the model cannot do is null."""
        audio = {
            "format": self._format,
            "transcription": {"model": self.model, "language": None, "prompt": None},
            "noise_reduction": None,
            "turn_detection": self._turns,
        }
        known = {"id": self._id, "object": "realtime.transcription_session", "type": "transcription"}
        return known | {"expires_at": int(time.time()) + 86_400, "progress": self.progress, "audio": {"input": audio}}

    # --- the server's messages ---

    def on_error(self, error: Invalid, event: dict) -> None:
        kind = "server_error" if error.code.startswith("server_") else "invalid_request_error"
        if kind == "server_error" and not self.progress:
            return  # LiveKit's plugin gives up for good at an `error`, but connects again after a close
        fields = {"type": kind, "code": error.code, "message": str(error), "param": error.param}
        known = event.get("event_id")
        self.send("error", error=fields | {"event_id": known if isinstance(known, str) else None})

    def on_start(self, item: Item, start: float) -> None:
        if self._turns:
            at = milliseconds(max(item.start, start - self._turns["prefix_padding_ms"] / 1000))
            self.send("input_audio_buffer.speech_started", audio_start_ms=at, item_id=item.id)

    def on_text(self, item: Item, text: str, first: bool) -> None:
        text = text.lstrip() if first else text
        self.send(f"{TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=text)

    def on_end(self, item: Item, stretch: Stretch, last: bool) -> None:
        if not item.announced:
            if item.heard and self._turns:
                end = milliseconds(item.end)
                self.send("input_audio_buffer.speech_stopped", audio_end_ms=end, item_id=item.id)
            self._committed(item)
        usage = {"type": "duration", "seconds": round(item.end - item.start, 3)}
        about = {"item_id": item.id, "content_index": 0, "transcript": item.text, "usage": usage, "logprobs": None}
        self.send(f"{TRANSCRIPTION}.completed", **about, **item.fields)

    def on_progress(self, audio_end: float, transcribed: float) -> None:
        times = {"audio_end_ms": milliseconds(audio_end), "transcribed_ms": milliseconds(transcribed)}
        self.send("voxtral.progress", **times)

    def _committed(self, item: Item) -> None:
        item.announced = True
        self.send("input_audio_buffer.committed", item_id=item.id, previous_item_id=self._previous)
        self._previous = item.id


def turns_of(given: dict | None) -> dict | None:
    """Return the `turn_detection` that is in force for what a client asks for. Raises Invalid."""
    if given is None:
        return None
    turns = {name: value(given, name, (int, float), usual) for name, usual in TURNS.items()}
    turns["silence_duration_ms"] = max(turns["silence_duration_ms"], LEAST_SILENCE_MS)
    return {"type": "server_vad"} | turns
