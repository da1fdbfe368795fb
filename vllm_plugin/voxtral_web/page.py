"""Routes that are added to vLLM's own, through `vllm.endpoint_plugins`.

They are the captions page at /captions/, /v1/models with more fields, files over HTTP (upload.py), and the WebSockets
of voxtral_realtime. The plugin also applies the patches of voxtral_speed for the process that it is in.

vLLM loads such a plugin only if VLLM_PLUGINS names it (`load_endpoint_plugins` in vllm/plugins/__init__.py). serve.sh
sets that variable. The page needs no key, because vLLM checks the key only below /v1.
"""

import json
import logging
import os
from argparse import Namespace
from typing import Any

import voxtral_realtime.routes
import voxtral_speed
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from voxtral_speed.warmup import warm_up

from .limits import sessions
from .upload import MAX_MEGABYTES, Uploads

FOLDER = "VOXTRAL_WEB"  # the variable with the page's folder; serve.sh sets it

HEADERS = {
    "Cache-Control": "no-cache",  # with the ETag: 304 if the file has not changed
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Page(StaticFiles):
    """Static files that a browser requests each time: a page with files from before and after an update would fail."""

    async def get_response(self, path: str, scope: Scope) -> Any:
        folder = os.path.dirname(scope["app"].state.args.ssl_certfile or "")
        if path == "ca.pem" and os.path.isfile(ca := os.path.join(folder, path)):  # for phones, which install it
            response = FileResponse(ca, media_type="application/x-x509-ca-cert")
        else:
            response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


async def models(request: Request) -> JSONResponse:
    """Return vLLM's list of models with more fields: see PROTOCOL.md, "Getting in"."""
    from vllm.entrypoints.openai.models.api_router import show_available_models

    listing = json.loads((await show_available_models(request)).body)
    more = {"max_upload_mb": MAX_MEGABYTES, "max_sessions": sessions(request.app.state.args) or None}
    if speed_is_active():
        more["voxtral_speed"] = True
    return JSONResponse(listing | {"data": [model | more for model in listing["data"]]})


class Transcription(Response):
    """The response to a file: see upload.py, which also receives the file."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await scope["app"].state.uploads(scope, receive, send)


async def transcriptions() -> Response:
    """Return the response to a file."""
    return Transcription()


def speed_is_active() -> bool:
    """Return whether long sessions are as fast as short ones."""
    return voxtral_speed.active("features")  # without it every step handles all frames of the session


def without_traceback(record: logging.LogRecord) -> bool:
    """Let vLLM log in one line what clients cause: a refused session, a message without sense. Not that they leave."""
    from vllm.exceptions import GracefulHTTPError

    error = record.exc_info and record.exc_info[1]
    if isinstance(error, GracefulHTTPError) or record.funcName == "handle_connection":
        record.exc_info = None
    return not isinstance(error, WebSocketDisconnect)


class Web:
    """An endpoint plugin. Interface: vllm/plugins/endpoint_plugins/interface.py."""

    name = "voxtral_web"
    required_tasks = ("realtime",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, which replace vLLM's own with the same path and method. Mount the page, if there is one."""
        app.get("/v1/models")(models)
        app.post("/v1/audio/transcriptions")(transcriptions)
        voxtral_realtime.routes.attach(app)
        folder = os.environ.get(FOLDER, "")
        if os.path.isfile(os.path.join(folder, "index.html")):
            app.mount("/captions", Page(directory=folder, html=True), "captions")
        else:
            logging.getLogger("vllm.voxtral_web").warning("no /captions/: %s=%r has no index.html", FOLDER, folder)

    async def init_state(self, engine_client: object, state: Any, args: Namespace) -> None:
        """Apply the speed patches of an API process, and warm it up. vLLM calls this before the port answers."""
        await voxtral_speed.register_server(engine_client)
        await warm_up(state.openai_serving_realtime, args)
        logging.getLogger("vllm.entrypoints.speech_to_text.realtime.connection").addFilter(without_traceback)
        state.uploads = Uploads(args, state)
        state.uploads.warm()
