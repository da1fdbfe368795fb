"""What is served on vLLM's own port beside its routes, through `vllm.endpoint_plugins`.

The captions page at /captions/, and files over HTTP (upload.py) in place of vLLM's own route.

vLLM loads such a plugin only if VLLM_PLUGINS names it (`load_endpoint_plugins` in
vllm/plugins/__init__.py); serve.sh does. The page itself needs no key: vLLM guards /v1 alone.
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

FOLDER = "VOXTRAL_CAPTIONS"  # variable that names the folder with the page; serve.sh sets it

HEADERS = {
    "Cache-Control": "no-cache",  # with the ETag: 304 where nothing has changed
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Page(StaticFiles):
    """Static files that a browser asks for anew: a page half from before an update would not work."""

    async def get_response(self, path: str, scope: Scope) -> Any:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


async def models(request: Request) -> Response:
    """vLLM's answer; for each model also the largest upload, and `voxtral_speed: true` where that plugin is at work."""
    from vllm.entrypoints.openai.models.api_router import show_available_models

    listing = json.loads((await show_available_models(request)).body)
    more = {"max_upload_mb": MAX_MEGABYTES} | ({"voxtral_speed": True} if speed_is_active() else {})
    return JSONResponse(listing | {"data": [model | more for model in listing["data"]]})


async def transcriptions(request: Request) -> Response:
    """OpenAI's route for files: see upload.py."""
    return await request.app.state.uploads(request)


def speed_is_active() -> bool:
    """Do sessions cost the same however long they are?"""
    return voxtral_speed.active("features")  # without it every step handles all frames of the session


class Captions:
    """An endpoint plugin, as vllm/plugins/endpoint_plugins/interface.py wants it."""

    name = "voxtral_captions"
    required_tasks = ("realtime",)

    def attach_router(self, app: FastAPI) -> None:
        """Mount the page, if there is one, and take over /v1/models."""
        app.get("/v1/models")(models)
        app.post("/v1/audio/transcriptions")(transcriptions)
        folder = os.environ.get(FOLDER, "")
        if os.path.isfile(os.path.join(folder, "index.html")):
            app.mount("/captions", Page(directory=folder, html=True), "captions")
        else:
            logging.getLogger("vllm.voxtral_web").warning("no /captions/: %s=%r has no index.html", FOLDER, folder)

    async def init_state(self, engine_client: object, state: Any, args: Namespace) -> None:
        """Prepare what takes uploads."""
        state.uploads = Uploads(args, state.openai_serving_models)
