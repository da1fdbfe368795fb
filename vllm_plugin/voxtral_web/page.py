"""Routes that are added to vLLM's own, through `vllm.endpoint_plugins`.

They are the captions page at /captions/, /v1/models with more fields, and files over HTTP (upload.py).

vLLM loads such a plugin only if VLLM_PLUGINS names it (`load_endpoint_plugins` in vllm/plugins/__init__.py). serve.sh
sets that variable. The page needs no key, because vLLM checks the key only below /v1.
"""

import json
import logging
import os
from argparse import Namespace
from typing import Any

import voxtral_speed
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from .upload import MAX_MEGABYTES, Uploads

FOLDER = "VOXTRAL_CAPTIONS"  # the variable with the page's folder; serve.sh sets it

HEADERS = {
    "Cache-Control": "no-cache",  # with the ETag: 304 if the file has not changed
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Page(StaticFiles):
    """Static files that a browser requests each time: a page with files from before and after an update would fail."""

    async def get_response(self, path: str, scope: Scope) -> Any:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


async def models(request: Request) -> Response:
    """Return vLLM's list of models, with `max_upload_mb`, and `voxtral_speed: true` if the patch `features` is on."""
    from vllm.entrypoints.openai.models.api_router import show_available_models

    listing = json.loads((await show_available_models(request)).body)
    more = {"max_upload_mb": MAX_MEGABYTES} | ({"voxtral_speed": True} if speed_is_active() else {})
    return JSONResponse(listing | {"data": [model | more for model in listing["data"]]})


async def transcriptions(request: Request) -> Response:
    """Return the response to a file: see upload.py."""
    return await request.app.state.uploads(request)


def speed_is_active() -> bool:
    """Return whether long sessions are as fast as short ones."""
    return voxtral_speed.active("features")  # without it every step handles all frames of the session


class Captions:
    """An endpoint plugin. Interface: vllm/plugins/endpoint_plugins/interface.py."""

    name = "voxtral_captions"
    required_tasks = ("realtime",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes. Mount the page if its folder has one."""
        app.get("/v1/models")(models)
        app.post("/v1/audio/transcriptions")(transcriptions)
        folder = os.environ.get(FOLDER, "")
        if os.path.isfile(os.path.join(folder, "index.html")):
            app.mount("/captions", Page(directory=folder, html=True), "captions")
        else:
            logging.getLogger("vllm.voxtral_web").warning("no /captions/: %s=%r has no index.html", FOLDER, folder)

    async def init_state(self, engine_client: object, state: Any, args: Namespace) -> None:
        """Create the handler of uploads."""
        state.uploads = Uploads(args, state.openai_serving_models)
