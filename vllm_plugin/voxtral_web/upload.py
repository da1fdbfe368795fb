"""`POST /v1/audio/transcriptions`: OpenAI's form around this project's pool of sessions. It replaces vLLM's route.

The specification is in PROTOCOL.md, "Files over HTTP". A process of its own decodes the file (decode.py); this one
transcribes its audio. When the HTTP client disconnects or the server stops, the process is killed and the sessions end.

Environment: MAX_UPLOAD_MB; MAX_UPLOAD_HOURS; UPLOAD_SESSIONS, the most sessions that all uploads together may use
(default: half of the server's).
"""

import asyncio
import json
import math
import os
import zlib
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send
from voxtral_realtime.core import Item
from voxtral_realtime.engine import Engine

from voxtral_client import subtitles
from voxtral_client.errors import AudioError
from voxtral_client.pool import Pool, cut, uncut
from voxtral_client.protocol import RATE
from voxtral_client.timeline import Word

from .decode import Decoding
from .errors import refuse
from .limits import sessions

MAX_MEGABYTES = int(os.environ.get("MAX_UPLOAD_MB") or 512)
MAX_HOURS = float(os.environ.get("MAX_UPLOAD_HOURS") or 12)  # of audio: a file of 787 bytes can hold 100 of silence
FIELDS, FIELDS_BYTES = 32, 2**20  # all of the form but the file
AT_ONCE = 32  # uploads that are received, wait or are transcribed
BUDGET_FILES = 4  # of the largest size: the disk that all uploads together may use
WAIT_SECONDS = 60  # for a session
STALL_SECONDS = 60  # without data of an upload, and for a part of a stream that its client does not read
STOP_SECONDS = 0.5  # until it is noticed that the server stops
FORMATS = {
    "json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
    "verbose_json": "application/json",
}
GRANULARITIES = ("word", "segment")


class Failure(Exception):
    """An error for the HTTP client. `answer`: the response."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.answer = refuse(status, message, code, param)


@dataclass
class Form:
    """The checked form."""

    file: UploadFile
    format: str  # one of FORMATS
    granularities: Sequence[str]
    stream: bool
    language: str


@dataclass
class WholeFile(Item):
    """All words of a file; its `end` is the file's. `warning`: why a part is missing, or None."""

    warning: str | None = None


class Parser(MultiPartParser):
    """Takes the part `file` for a file also where it has no name, as some clients send it."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition, options = parse_options_header(part.content_disposition)
        if options.get(b"name") == b"file" and b"filename" not in options:
            part.content_disposition = disposition + b'; name="file"; filename=""'
        super().on_headers_finished()


class Uploads:
    """The ASGI application of the route. Each API process has one."""

    def __init__(self, args: Namespace, state: Any):
        """`args`: vLLM's options. `state`: the app's."""
        self._state = state
        share = int(os.environ.get("UPLOAD_SESSIONS") or 0) or sessions(args, unknown=1) // 2
        self._free = max(1, share // max(1, args.api_server_count or 1))
        self._freed = asyncio.Condition()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._stored: dict[AsyncExitStack, int] = {}  # bytes of each upload
        self._spare: Decoding | None = None  # for the next file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        async with AsyncExitStack() as stack:
            try:
                form = await self._receive(request, stack)
                items = await stack.enter_async_context(aclosing(self._watched(request, self._transcribe(form))))
                response = await respond(form, items)
            except Failure as failure:
                response = failure.answer
            except ClientDisconnect:
                response = Response(status_code=499)  # for /metrics only; the number is nginx's
            await response(scope, receive, send)

    async def _receive(self, request: Request, stack: AsyncExitStack) -> Form:
        """Return the form; its file is on disk. Raises Failure."""
        if self._places.locked():
            raise Failure(503, "too many files at once", "server_busy")
        await stack.enter_async_context(self._places)
        if int(request.headers.get("content-length") or 0) > MAX_MEGABYTES * 2**20 + FIELDS_BYTES:
            raise too_large()
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Failure(400, "the request must be multipart/form-data with a file", "invalid_form", "file")
        try:
            stream = self._bounded(request.stream(), stack)
            form = await Parser(
                request.headers, stream, max_files=1, max_fields=FIELDS, max_part_size=FIELDS_BYTES // FIELDS
            ).parse()
        except MultiPartException as error:
            raise Failure(400, f"not a form: {error.message}", "invalid_form") from None
        except OSError as error:
            raise Failure(500, f"the upload cannot be stored: {error.strerror}", "disk") from None
        stack.push_async_callback(form.close)
        return self._checked(form)

    async def _bounded(self, stream: AsyncIterator[bytes], stack: AsyncExitStack) -> AsyncIterator[bytes]:
        """Yield the request's body. Raises Failure if it is too long, the disk's budget is used up, or it stalls.

        At the end of `stack` its bytes count no more.
        """
        self._stored[stack] = 0
        stack.callback(self._stored.pop, stack)
        while True:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    chunk = await anext(stream, None)
            except TimeoutError:
                raise Failure(408, f"no data of the upload arrived for {STALL_SECONDS} s", "timeout") from None
            if chunk is None:
                return
            self._stored[stack] += len(chunk)
            if self._stored[stack] > MAX_MEGABYTES * 2**20 + FIELDS_BYTES:
                raise too_large()
            if sum(self._stored.values()) > BUDGET_FILES * (MAX_MEGABYTES * 2**20 + FIELDS_BYTES):
                raise Failure(503, "too many large files at once", "server_busy")
            yield chunk

    def _checked(self, form: FormData) -> Form:
        """Return the form's fields. Raises Failure."""
        file, model = form.get("file"), str(form.get("model") or "")
        if not isinstance(file, UploadFile):
            raise Failure(400, "the form has no file", "invalid_form", "file")
        if model and not self._state.openai_serving_models.is_base_model(model):
            known = ", ".join(path.name for path in self._state.openai_serving_models.base_model_paths)
            raise Failure(404, f"the model {model!r} does not exist; there is {known}", "model_not_found", "model")
        kind = str(form.get("response_format") or "json")
        if kind not in FORMATS:
            message = f"response_format {kind!r} is none of {', '.join(FORMATS)}"
            raise Failure(400, message, "invalid_form", "response_format")
        keys = ("timestamp_granularities[]", "timestamp_granularities")
        granularities = [str(name) for key in keys for name in form.getlist(key)]
        if not set(granularities) <= set(GRANULARITIES):
            message = f"timestamp_granularities[] are none of {', '.join(GRANULARITIES)}"
            raise Failure(400, message, "invalid_form", "timestamp_granularities[]")
        stream = str(form.get("stream") or "").lower() in ("true", "1")
        if stream and kind not in ("json", "text"):
            raise Failure(400, f"stream=true goes with response_format json, not {kind}", "invalid_form", "stream")
        if kind == "verbose_json" and not granularities:
            granularities = GRANULARITIES
        return Form(file, kind, granularities, stream, str(form.get("language") or "unknown"))

    async def _watched(self, request: Request, items: AsyncGenerator) -> AsyncIterator[Word | WholeFile]:
        """Yield `items`. Raises ClientDisconnect or Failure as soon as the client disconnects or the server stops.

        The server (`state.server` is vLLM's uvicorn.Server) waits for its responses before it ends.
        """
        gone = asyncio.create_task(disconnected(request))
        async with aclosing(items):
            try:
                while True:
                    item = asyncio.ensure_future(anext(items, None))
                    while not item.done():
                        await asyncio.wait([item, gone], timeout=STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                        if gone.done():
                            raise ClientDisconnect
                        if getattr(getattr(self._state, "server", None), "should_exit", False):
                            raise Failure(503, "the server is stopping", "server_error")
                    if item.result() is None:
                        return
                    yield item.result()
            finally:
                gone.cancel()
                item.cancel()
                await asyncio.gather(gone, item, return_exceptions=True)

    async def _transcribe(self, form: Form) -> AsyncIterator[Word | WholeFile]:
        """Yield the words as they become final, and the WholeFile last. Raises Failure."""
        transcript = WholeFile(0.0)
        async with self._sessions() as count, self._decoding(form.file) as source:
            pool = Pool(Engine(self._state.openai_serving_realtime, patience=math.inf), count, asyncio.Event())
            pieces = cut(0, source, lambda: pool.width) if count > 1 else iter([uncut(0, source)])
            async with aclosing(pool.run(pieces)) as items:
                async for piece, item in items:
                    if isinstance(item, Word):
                        transcript.words.append(item)
                        yield item
                    elif item is None or isinstance(item, AudioError):
                        transcript.end = round(piece.offset / RATE + piece.transcriber.received, 3)
                        transcript.warning = item and str(item)
                    else:
                        raise Failure(503, str(item), "server_error")
        if transcript.warning and not transcript.words:
            raise Failure(400, transcript.warning, "invalid_audio", "file")
        yield transcript

    def warm(self) -> None:
        """Let a process wait for the next file."""
        if self._spare is None or self._spare.process.poll() is not None:
            self._spare = Decoding()

    @asynccontextmanager
    async def _decoding(self, file: UploadFile) -> AsyncIterator[Decoding]:
        """Have a file decoded. At the end of the context the process is killed, and the next one begins."""
        await asyncio.to_thread(file.file.rollover)
        self.warm()
        decoding, self._spare = self._spare, None
        decoding.begin(f"/proc/{os.getpid()}/fd/{file.file.fileno()}", file.filename or "the file", MAX_HOURS)
        try:
            yield decoding
        finally:
            self.warm()
            await decoding.end()

    @asynccontextmanager
    async def _sessions(self) -> AsyncIterator[int]:
        """Reserve sessions and yield their number: half of the free ones, so that the next upload gets one.

        Raises Failure if no session becomes free within WAIT_SECONDS.
        """
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._freed:
                await self._freed.wait_for(lambda: self._free)
                count = (self._free + 1) // 2
                self._free -= count
        except TimeoutError:
            raise Failure(503, "all sessions for files are in use", "server_busy") from None
        try:
            yield count
        finally:
            self._free += count
            async with self._freed:
                self._freed.notify_all()


async def disconnected(request: Request) -> None:
    """Return when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def too_large() -> Failure:
    message = f"the file is larger than {MAX_MEGABYTES} MB (MAX_UPLOAD_MB of the server)"
    return Failure(413, message, "too_large", "file")


# --- transcripts ---


async def respond(form: Form, items: AsyncIterator[Word | WholeFile]) -> Response:
    """Return the response; for `stream` it continues while words become final. Raises Failure."""
    item = await anext(items)  # an error in the file becomes the HTTP status, also with `stream`
    if form.stream:
        headers = {"Cache-Control": "no-cache"}
        return Stream(events(item, items, form), media_type="text/event-stream", headers=headers)
    async for item in items:  # noqa: B007 - the last one is the transcript
        pass
    headers = {"X-Transcript-Warning": ascii(item.warning)[1:-1]} if item.warning else {}
    content = await asyncio.to_thread(body, item, form)  # a long one takes seconds
    return Response(content, media_type=FORMATS[form.format], headers=headers)


class Stream(StreamingResponse):
    """Ends where the client disconnects or does not read.

    Starlette's own would cancel what it streams again and again, and so what has to be tidied up.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALL_SECONDS):
                await send(message)

        with suppress(TimeoutError, ClientDisconnect):
            await self.stream_response(send_in_time)


def body(transcript: WholeFile, form: Form) -> str | bytes:
    """Return the body of the response."""
    if form.format == "text":
        return transcript.text + "\n"
    if form.format in ("srt", "vtt"):
        writer = subtitles.FORMATS[form.format](file := BytesIO(), standard=True)  # leaves it open
        for word in transcript.words:
            writer.write(word)
        writer.close()
        return file.getvalue()
    return json.dumps(answer(transcript, form), ensure_ascii=False)


def answer(transcript: WholeFile, form: Form) -> dict:
    """Return the fields of a response in JSON, and of a stream's last event."""
    usage = {"type": "duration", "seconds": transcript.end}
    fields = {"text": transcript.text, "usage": usage, "complete": transcript.warning is None}
    if transcript.warning:
        fields["warning"] = transcript.warning
    if form.format == "verbose_json":
        fields |= {"task": "transcribe", "language": form.language, "duration": transcript.end}
    if "segment" in form.granularities:
        fields["segments"] = list(segments(transcript))
    if "word" in form.granularities:
        fields["words"] = transcript.fields["words"]
    return fields


def segments(transcript: WholeFile) -> Iterator[dict]:
    """Yield the cues of the subtitles as OpenAI's segments.

    The model gives no probabilities. They are 0, because typed clients hold numbers only.
    """
    cues = subtitles.Cues()
    ended = [cue for each in transcript.words if (cue := cues.add(each))]
    for number, cue in enumerate([*ended, *([(cues.open,)] if cues.open else [])]):
        start, end = subtitles.span(*cue)
        text = subtitles.text_of(cue[0])
        times = {"start": round(start, 3), "end": min(round(end, 3), transcript.end)}  # a cue may last longer
        known = {"text": text, "tokens": [], "temperature": 0.0, "avg_logprob": 0.0, "no_speech_prob": 0.0}
        ratio = len(text.encode()) / len(zlib.compress(text.encode()))  # as Whisper computes it
        yield {"id": number, "seek": 0} | times | known | {"compression_ratio": round(ratio, 3)}


async def events(item: Any, items: AsyncIterator[Any], form: Form) -> AsyncIterator[str]:
    """Yield server-sent events: a delta for each word, the complete text, [DONE]; or an error."""
    begun = False
    try:
        while not isinstance(item, WholeFile):
            yield event("transcript.text.delta", delta=item.text if begun else item.text.lstrip())
            begun, item = True, await anext(items)
        yield event("transcript.text.done", **await asyncio.to_thread(answer, item, form))
        yield "data: [DONE]\n\n"
    except Failure as failure:
        yield f"data: {failure.answer.body.decode()}\n\n"


def event(kind: str, **fields: object) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields, ensure_ascii=False)}\n\n"
