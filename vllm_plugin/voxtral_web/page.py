"""Serves the captions page at /captions/ on vLLM's own port, through `vllm.endpoint_plugins`.

vLLM loads such a plugin only if VLLM_PLUGINS names it (`load_endpoint_plugins` in
vllm/plugins/__init__.py); serve.sh does. The page itself needs no key: vLLM guards /v1 alone.
"""

import logging
import os
from typing import Any

from starlette.applications import Starlette
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

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


class Captions:
    """An endpoint plugin, as vllm/plugins/endpoint_plugins/interface.py wants it."""

    name = "voxtral_captions"
    required_tasks = ("realtime",)

    def attach_router(self, app: Starlette) -> None:
        """Mount the page, if there is one."""
        folder = os.environ.get(FOLDER, "")
        if os.path.isfile(os.path.join(folder, "index.html")):
            app.mount("/captions", Page(directory=folder, html=True), "captions")
        else:
            logging.getLogger("vllm.voxtral_web").warning("no /captions/: %s=%r has no index.html", FOLDER, folder)

    async def init_state(self, engine_client: object, state: object, args: object) -> None:
        """Nothing to prepare."""
