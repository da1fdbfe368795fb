"""Serves the captions page at /captions/ on vLLM's own port, through `vllm.endpoint_plugins`; adds to /v1/models.

vLLM loads such a plugin only if VLLM_PLUGINS names it (`load_endpoint_plugins` in
vllm/plugins/__init__.py); serve.sh does. The page itself needs no key: vLLM guards /v1 alone.
"""

import json
import logging
import os
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = "VOXTRAL_CAPTIONS"  # variable that names the folder with the page; serve.sh sets it


class Page(StaticFiles):
    """Static files that a browser asks for anew: a page half from before an update would not work."""

    async def get_response(self, path: str, scope: Scope) -> Any:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"  # with the ETag: 304 where nothing has changed
        response.headers["Content-Security-Policy"] = "default-src 'self'; frame-ancestors 'none'"
        return response


async def models(request: Request) -> Response:
    """vLLM's answer, and `voxtral_speed: true` for each model where that plugin is at work."""
    from vllm.entrypoints.openai.models.api_router import show_available_models

    answer = await show_available_models(request)
    if not speed_is_active():
        return answer
    listing = json.loads(answer.body)
    for model in listing["data"]:
        model["voxtral_speed"] = True
    return JSONResponse(listing)


def speed_is_active() -> bool:
    """Do sessions cost the same however long they are?"""
    try:
        import voxtral_speed
    except ImportError:
        return False
    return bool(voxtral_speed.active())


class Captions:
    """An endpoint plugin, as vllm/plugins/endpoint_plugins/interface.py wants it."""

    name = "voxtral_captions"
    required_tasks = ("realtime",)

    def attach_router(self, app: FastAPI) -> None:
        """Mount the page, if there is one, and take over /v1/models."""
        app.get("/v1/models")(models)
        folder = os.environ.get(FOLDER, "")
        if os.path.isfile(os.path.join(folder, "index.html")):
            app.mount("/captions", Page(directory=folder, html=True), "captions")
        else:
            logging.getLogger("vllm.voxtral_web").warning("no /captions/: %s=%r has no index.html", FOLDER, folder)

    async def init_state(self, engine_client: object, state: object, args: object) -> None:
        """Nothing to prepare."""
