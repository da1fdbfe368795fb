"""Mistral's realtime transcription: `/v1/audio/transcriptions/realtime`. It only translates; the work is in core.py."""

import re
import uuid

from starlette.websockets import WebSocket

from voxtral_client.timeline import Word

from .core import LEAST_SILENCE_MS, Connection, Invalid, Item, Stretch, timed, value

SILENCE_MS = 500
CODES = {"model_not_found": 404, "server_busy": 503, "server_error": 500}  # of HTTP; all others are 400


class Mistral(Connection):
    """One socket of a client of Mistral's protocol."""

    NAMES = re.compile(r"voxtral-[\w.-]+")  # they mean the served model

    def __init__(self, socket: WebSocket):
        from vllm.tokenizers import cached_tokenizer_from_config

        super().__init__(socket)
        tokenizer = cached_tokenizer_from_config(self._serving.model_config)
        self._delay = tokenizer.instruct.audio_encoder.audio_config.transcription_delay_ms
        self._id = uuid.uuid4().hex
        self._turn: Item | None = None  # a turn that has begun
        self._done = Item(0.0)  # what the next transcription.done will have
        self._last: Stretch | None = None  # the socket is closed behind it

    def handle(self, event: dict) -> None:
        match event.get("type"):
            case "input_audio.append":
                self.append(event.get("audio"))
            case "input_audio.flush":
                self.commit(empty=True)
            case "input_audio.end":
                self._last = self.commit(empty=True)
            case "session.update":
                self._update(value(event, "session", dict, {}))
            case kind:
                raise Invalid(f"the server knows no event {kind!r:.80}", "unknown_event", "type")

    def _update(self, given: dict) -> None:
        """Put a session's settings into force: all of them, or none. Raises Invalid."""
        silence = self.silence
        if "turn_detection" in given:
            turns = value(given, "turn_detection", dict)
            milliseconds = value(turns or {}, "min_silence_ms", int, SILENCE_MS)
            silence = None if turns is None else max(milliseconds, LEAST_SILENCE_MS) / 1000
        if form := value(given, "audio_format", dict):
            encoding = value(form, "encoding", str, self.intake.encoding)
            self.set_format(encoding, value(form, "sample_rate", int, self.intake.rate), "audio_format")
        self.silence = silence
        self.send("session.updated", session=self.session())

    def session(self) -> dict:
        """Return what is in force. What the model cannot do is null."""
        turns = None if self.silence is None else {"min_silence_ms": round(1000 * self.silence)}
        return {
            "request_id": self._id,
            "model": self.model,
            "audio_format": {"encoding": self.intake.encoding, "sample_rate": self.intake.rate},
            "target_streaming_delay_ms": self._delay,
            "turn_detection": turns,
        } | dict.fromkeys(("language", "diarize", "context_bias", "speaker_references"))

    def on_error(self, error: Invalid, event: dict) -> None:
        self.send("error", error={"message": str(error), "code": CODES.get(error.code, 400)})

    def on_start(self, item: Item, start: float) -> None:
        if self.silence is not None:
            self._turn = item
            self.send("turn.start", time_s=round(start, 3))

    def on_text(self, item: Item, text: str, first: bool) -> None:
        text = text if self._done.heard else text.lstrip()
        self._done.heard = True
        self.send("transcription.text.delta", text=text)

    def on_word(self, word: Word) -> None:
        self.send("transcription.segment", **timed(word, "text"))

    def on_end(self, item: Item, stretch: Stretch, last: bool) -> None:
        if self._turn is item:
            paused = last or item.end - item.words[-1].end >= LEAST_SILENCE_MS / 2000
            self.send("turn.end", time_s=round(item.end, 3), end_reason="threshold" if paused else "timeout")
        self._done.words += item.words
        if not last:
            return
        done, self._done = self._done, Item(item.end)
        done.end = item.end
        known = [timed(word, "text") | {"type": "transcription_segment"} for word in done.words]
        prompt, completion = stretch.transcriber.prompt_tokens, stretch.transcriber.completion_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        usage["prompt_audio_seconds"] = round(done.end - done.start)
        about = {"model": self.model, "text": done.text, "language": None, "segments": known, "usage": usage}
        self.send("transcription.done", **about, **done.fields)
        if stretch is self._last:
            self.close(1000)
