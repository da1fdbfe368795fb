"""The WebSocket routes of both dialects, and what they need of vLLM and uvicorn."""

import logging

from fastapi import FastAPI
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from voxtral_speed import Unexpected, expect
from voxtral_web.guard import MISTRAL, is_dialect

from .mistral import Mistral
from .openai import OpenAI


async def realtime(socket: WebSocket) -> None:
    """OpenAI's transcription if the client asks for it by `intent`, otherwise vLLM's own protocol."""
    from vllm.entrypoints.speech_to_text.realtime.api_router import realtime_endpoint

    if is_dialect(socket.scope):  # by which the guard chooses the limits
        await OpenAI(socket).serve()
    else:
        await realtime_endpoint(socket)


async def mistral(socket: WebSocket) -> None:
    """Mistral's transcription."""
    await Mistral(socket).serve()


def attach(app: FastAPI) -> None:
    """Add the routes, before vLLM's own."""
    app.router.routes[:0] = [
        WebSocketRoute("/v1/realtime", realtime),
        WebSocketRoute(MISTRAL, mistral),
    ]
    combine_connection_fields()


def combine_connection_fields() -> None:
    """Let handshakes have several `Connection` fields, as RFC 9110, 5.3 allows; LiveKit's Mistral plugin sends two.

    uvicorn reads the last one only, and takes the handshake for an ordinary request.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    get_upgrade = HttpToolsProtocol._get_upgrade
    try:
        expect("uvicorn.protocols.http.httptools_impl:HttpToolsProtocol._get_upgrade", "7b1305aac7b8")
    except Unexpected as error:
        return logging.getLogger("vllm.voxtral_realtime").warning("Connection fields are not combined: %s", error)

    def get_upgrade_of_all(self) -> bytes | None:
        fields = [value for name, value in self.headers if name == b"connection"]
        if len(fields) > 1:
            self.headers[:] = [field for field in self.headers if field[0] != b"connection"]
            self.headers.append((b"connection", b", ".join(fields)))
        return get_upgrade(self)

    HttpToolsProtocol._get_upgrade = get_upgrade_of_all
