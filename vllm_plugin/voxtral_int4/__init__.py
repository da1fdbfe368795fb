"""INT4 (NF4) for Voxtral Realtime in vLLM: the plugin's entry point and its version check.

vLLM calls `register` in each of its processes, for every model, through the entry-point group
`vllm.general_plugins` (vllm/plugins/__init__.py).
"""

import functools
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .log import Sentence

TESTED = {"vllm": "0.32.0", "vllm-bnb-plugin": "0.0.3"}


def installed(name: str) -> str:
    """Return the version of a distribution without its local part: "0.32.0" for "0.32.0+cpu". "none": not installed."""
    try:
        found = version(name)
    except PackageNotFoundError:
        if name != "vllm":
            return "none"
        from vllm import __version__ as found  # vLLM that runs from its sources has no metadata
    return found.partition("+")[0]


def is_voxtral_realtime(config: Any) -> bool:
    """Return whether a model is Voxtral Realtime in Mistral's format. `config`: ModelConfig or hf_config, or None.

    vLLM sets this name when it reads params.json (vllm/transformers_utils/configs/mistral.py).
    """
    return "VoxtralRealtimeGeneration" in (getattr(config, "architectures", None) or [])


def version_problem() -> str | None:
    """Return one line with the wrong versions and the fix, or None if the versions are right."""
    found = {name: installed(name) for name in TESTED}
    if found == TESTED:
        return None
    needed, there = (", ".join(f"{name} {v}" for name, v in d.items()) for d in (TESTED, found))
    return f"INT4 for Voxtral Realtime needs {needed}, but finds {there}: run ./setup.sh to install them"


@functools.cache  # vLLM may call it more than once in a process
def register() -> None:
    """Replace vllm-bnb-plugin's two classes by subclasses, and a line of the log. Never raises.

    The versions are not checked here, because a server of another model, or without quantization, must start with any
    version. They are checked when Voxtral Realtime is loaded with bitsandbytes.
    """
    logging.getLogger("vllm.v1.core.kv_cache_utils").addFilter(Sentence())
    try:
        import vllm_bnb_plugin

        # First: vLLM may call that plugin's own entry point later, which then changes nothing.
        vllm_bnb_plugin.register()
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.model_loader import register_model_loader

        from voxtral_int4.loader import VoxtralInt4Config, VoxtralInt4Loader
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.voxtral_int4").warning(version_problem() or f"no INT4 for Voxtral: {error}")
        return
    register_quantization_config("bitsandbytes")(VoxtralInt4Config)
    register_model_loader("bitsandbytes")(VoxtralInt4Loader)
