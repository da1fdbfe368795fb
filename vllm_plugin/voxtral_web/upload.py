"""`POST /v1/audio/transcriptions`: OpenAI's form around this project's file client. It replaces vLLM's route.

The specification is in PROTOCOL.md, "Files over HTTP". The file client, test_file_transcribe.py, runs in its own
process as a client of this server, so that the process that serves live captions decodes no files of unknown origin.
When the HTTP client disconnects, the file client is killed, which ends its sessions.

Environment: VOXTRAL_HOME, the folder of the file client (without it every request gets 501); MAX_UPLOAD_MB;
UPLOAD_SESSIONS, the most sessions that all uploads together may use (default: half of the server's).
"""

import asyncio
import ipaddress
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import refuse

HOME = os.environ.get("VOXTRAL_HOME", "")
CLIENT = Path(HOME, "test_file_transcribe.py")
MAX_MEGABYTES = int(os.environ.get("MAX_UPLOAD_MB") or 512)
FIELDS_BYTES = 2**20  # all of the form but the file
AT_ONCE = 32  # uploads that are received, wait or are transcribed; each may use MAX_UPLOAD_MB of disk
WAIT_SECONDS = 60  # for a session
STALL_SECONDS = 60  # without data of an upload
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
    granularities: list[str]
    stream: bool
    language: str


@dataclass
class Transcript:
    """The file client's result. `words`: voxtral_client's Word. `warning`: why a part is missing, or None."""

    words: list[Any]
    seconds: float  # of audio
    warning: str | None

    @property
    def text(self) -> str:
        return "".join(word.text for word in self.words).strip()


class Uploads:
    """The handler of the route. Each API process has one."""

    def __init__(self, args: Namespace, models: Any):
        """`args`: vLLM's options. `models`: vLLM's OpenAIServingModels."""
        self._models = models
        slots = (args.max_num_seqs or 1) * (args.data_parallel_size or 1)
        share = int(os.environ.get("UPLOAD_SESSIONS") or 0) or slots // 2
        self._free = max(1, share // max(1, args.api_server_count or 1))
        self._freed = asyncio.Condition()
        self._places = asyncio.Semaphore(AT_ONCE)
        url = f"{'wss' if args.ssl_certfile else 'ws'}://{local_host(args.host)}:{args.port}/v1/realtime"
        self._command = ["nice", "-n", "5", sys.executable, str(CLIENT), "--url", url]
        self._command += "--format jsonl --output - --quiet".split()
        if args.ssl_certfile:  # the server is this machine; the certificate may lack this address
            self._command.append("--insecure")

    async def __call__(self, request: Request) -> Response:
        """Return the response to an upload."""
        async with AsyncExitStack() as stack:
            try:
                if not CLIENT.is_file():
                    raise Failure(501, "the file client is missing: set VOXTRAL_HOME", "not_served")
                form = await self._receive(request, stack)
                return await unless_disconnected(request, self._answer(request, form, stack))
            except Failure as failure:
                return failure.answer
            except ClientDisconnect:
                return Response(status_code=499)  # for the access log only, as nginx does

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
            form = await MultiPartParser(request.headers, bounded(request.stream()), max_files=1, max_fields=32).parse()
        except MultiPartException as error:
            raise Failure(400, f"not a form: {error.message}", "invalid_form") from None
        except OSError as error:
            raise Failure(500, f"the upload cannot be stored: {error.strerror}", "disk") from None
        stack.push_async_callback(form.close)
        return self._checked(form)

    def _checked(self, form: FormData) -> Form:
        """Return the form's fields. Raises Failure."""
        file, model = form.get("file"), str(form.get("model") or "")
        if not isinstance(file, UploadFile):
            raise Failure(400, "the form has no file", "invalid_form", "file")
        if model and not self._models.is_base_model(model):
            known = ", ".join(path.name for path in self._models.base_model_paths)
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
        return Form(file, kind, granularities or list(GRANULARITIES), stream, str(form.get("language") or "unknown"))

    async def _answer(self, request: Request, form: Form, stack: AsyncExitStack) -> Response:
        """Transcribe. Return the response; for `stream` it continues while words become final. Raises Failure."""
        items = await stack.enter_async_context(aclosing(self._transcribe(request, form)))
        item = await anext(items)  # an error in the file becomes the HTTP status, also with `stream`
        if form.stream:
            return Stream(events(item, items), stack.pop_all())
        while not isinstance(item, Transcript):
            item = await anext(items)
        transcript = item
        headers = {"X-Transcript-Warning": ascii(transcript.warning)[1:-1]} if transcript.warning else {}
        return Response(body(transcript, form), media_type=FORMATS[form.format], headers=headers)

    async def _transcribe(self, request: Request, form: Form) -> AsyncIterator[Any]:
        """Yield the words as they become final, and a Transcript last. Raises Failure."""
        await asyncio.to_thread(form.file.file.rollover)
        path = f"/proc/{os.getpid()}/fd/{form.file.file.fileno()}"
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        environment = os.environ | {"VLLM_API_KEY": key if scheme.lower() == "bearer" else "", "no_proxy": "*"}
        words, summary = [], None
        async with self._sessions() as count:
            command = [*self._command, "--parallel", str(count), path]
            async with process(command, environment) as client:
                watching = asyncio.create_task(kill_when_stopping(request.app.state, client))
                errors = asyncio.create_task(client.stderr.read())
                async for line in client.stdout:
                    entry = json.loads(line)
                    if "complete" in entry:
                        summary = entry
                    else:
                        words.append(client_module("timeline").Word(**entry))
                        yield words[-1]
                lines = (await errors).decode(errors="replace").strip().splitlines()
                watching.cancel()
        if stopping(request.app.state):
            raise Failure(503, "the server is stopping", "server_error")
        error = (summary or {}).get("error") or (None if summary else lines[-1] if lines else "the file client failed")
        if error and not error.startswith(path):
            raise Failure(503, error.removeprefix("error: "), "server_error")
        error = error and error.replace(path, form.file.filename or "the file")
        if error and not words:
            raise Failure(400, error, "invalid_audio", "file")
        yield Transcript(words, summary["seconds"], error)

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


class Stream(StreamingResponse):
    """Server-sent events. `stack` holds their source, and is closed at the end."""

    def __init__(self, content: AsyncIterator[str], stack: AsyncExitStack):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def unless_disconnected(request: Request, work: Any) -> Response:
    """Return the result of the coroutine `work`. Cancel it and raise ClientDisconnect if the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def bounded(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the request's body. Raises Failure if it is too long, or stalls for STALL_SECONDS."""
    size = 0
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise Failure(408, f"no data of the upload arrived for {STALL_SECONDS} s", "timeout") from None
        if chunk is None:
            return
        size += len(chunk)
        if size > MAX_MEGABYTES * 2**20 + FIELDS_BYTES:
            raise too_large()
        yield chunk


def too_large() -> Failure:
    message = f"the file is larger than {MAX_MEGABYTES} MB (MAX_UPLOAD_MB of the server)"
    return Failure(413, message, "too_large", "file")


@asynccontextmanager
async def process(command: list[str], environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program. At the end of the context, it and its child processes are killed."""
    pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    program = await asyncio.create_subprocess_exec(
        *command, stdin=none, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
    )
    try:
        yield program
    finally:
        kill(program)
        await program.wait()


def kill(program: asyncio.subprocess.Process) -> None:
    """Kill a program and its child processes, if it still runs."""
    with suppress(ProcessLookupError):
        if program.returncode is None:
            os.killpg(program.pid, signal.SIGKILL)


def stopping(state: Any) -> bool:
    """Return whether the server is stopping. `state`: the app's; `state.server` is vLLM's uvicorn.Server."""
    return getattr(getattr(state, "server", None), "should_exit", False)


async def kill_when_stopping(state: Any, program: asyncio.subprocess.Process) -> None:
    """Kill a program when the server is stopping, because the server waits for its responses before it ends."""
    while program.returncode is None:
        if stopping(state):
            return kill(program)
        await asyncio.sleep(0.5)


def local_host(host: str | None) -> str:
    """Return the host under which a program on this machine reaches a server that listens on `host`."""
    try:
        address = ipaddress.ip_address(host or "0.0.0.0")
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{address}]" if address.version == 6 else str(address)


# --- transcripts ---


def client_module(name: str) -> Any:
    """Import a module of voxtral_client. Its folder is not on Python's path, because it also holds other modules."""
    if "voxtral_client" not in sys.modules:
        spec = PathFinder.find_spec("voxtral_client", [HOME])
        sys.modules["voxtral_client"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["voxtral_client"])
    return __import__(f"voxtral_client.{name}", fromlist=[name])


def body(transcript: Transcript, form: Form) -> str | bytes:
    """Return the body of the response."""
    if form.format == "text":
        return transcript.text + "\n"
    if form.format in ("srt", "vtt"):
        writer = client_module("subtitles").FORMATS[form.format](file := BytesIO(), standard=True)  # leaves it open
        for word in transcript.words:
            writer.write(word)
        writer.close()
        return file.getvalue()
    answer = {"text": transcript.text}
    if form.format == "verbose_json":
        answer |= {"task": "transcribe", "language": form.language, "duration": transcript.seconds}
        if "segment" in form.granularities:
            answer["segments"] = list(segments(transcript.words))
        if "word" in form.granularities:
            timed = ({"word": word.text.strip(), "start": word.start, "end": word.end} for word in transcript.words)
            answer["words"] = list(timed)
    return json.dumps(answer | shared_fields(transcript), ensure_ascii=False)


def shared_fields(transcript: Transcript) -> dict:
    """Return the fields that all JSON responses have."""
    usage = {"usage": {"type": "duration", "seconds": transcript.seconds}, "complete": transcript.warning is None}
    return usage | ({"warning": transcript.warning} if transcript.warning else {})


def segments(words: list[Any]) -> Iterator[dict]:
    """Yield the cues of the subtitles as OpenAI's segments. Probabilities are null, because the model gives none."""
    subtitles = client_module("subtitles")
    cues = subtitles.Cues()
    ended = [cue for each in words if (cue := cues.add(each))]
    for number, cue in enumerate([*ended, *([(cues.open,)] if cues.open else [])]):
        start, end = subtitles.span(*cue)
        times = {"id": number, "seek": 0, "start": round(start, 3), "end": round(end, 3)}
        unknown = dict.fromkeys(("avg_logprob", "compression_ratio", "no_speech_prob"))
        yield times | {"text": subtitles.text_of(cue[0]), "tokens": [], "temperature": 0.0} | unknown


async def events(item: Any, items: AsyncIterator[Any]) -> AsyncIterator[str]:
    """Yield server-sent events: a delta for each word, the complete text, [DONE]; or an error."""
    begun = False
    try:
        while not isinstance(item, Transcript):
            yield event("transcript.text.delta", delta=item.text if begun else item.text.lstrip())
            begun, item = True, await anext(items)
        yield event("transcript.text.done", text=item.text, **shared_fields(item))
        yield "data: [DONE]\n\n"
    except Failure as failure:
        yield f"data: {failure.answer.body.decode()}\n\n"


def event(kind: str, **fields: object) -> str:
    return f"data: {json.dumps({'type': kind} | fields, ensure_ascii=False)}\n\n"
