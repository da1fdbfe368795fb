"""INT4 (NF4) for Voxtral Realtime in vLLM: the plugin's entry point and its version guard.

vLLM calls `register` in every one of its processes, whatever model it serves, through the
entry-point group `vllm.general_plugins` (vllm/plugins/__init__.py).
"""

import functools
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TESTED = {"vllm": "0.32.0", "vllm-bnb-plugin": "0.0.3"}


def installed(name: str) -> str:
    """Version of a distribution without its local part: "0.32.0+cpu" is "0.32.0"."""
    try:
        found = version(name)
    except PackageNotFoundError:
        if name != "vllm":
            return "none"
        from vllm import __version__ as found  # vLLM run from its sources has no metadata
    return found.partition("+")[0]


def is_voxtral_realtime(config: Any) -> bool:
    """True for Mistral's format only: vLLM makes up this name when it reads params.json.

    `config`: vLLM's, or None. Source: `_remap_mistral_audio_args` in vllm/transformers_utils/configs/mistral.py.
    """
    return "VoxtralRealtimeGeneration" in (getattr(config, "architectures", None) or [])


def version_problem() -> str | None:
    """One line saying what is wrong and what fixes it, or None."""
    found = {name: installed(name) for name in TESTED}
    if found == TESTED:
        return None
    wanted, there = (", ".join(f"{name} {v}" for name, v in d.items()) for d in (TESTED, found))
    return f"INT4 for Voxtral Realtime needs {wanted}, but finds {there}: run ./setup.sh to install them"


@functools.cache  # vLLM may call it more than once in a process
def register() -> None:
    """Put the two subclasses in the place of vllm-bnb-plugin's classes.

    It never raises and checks no version: a server of another model, or without quantization,
    must start with any version. The check comes when a Voxtral Realtime meets bitsandbytes.
    """
    try:
        import vllm_bnb_plugin

        # First, so that its own entry point, which vLLM may call later, finds its work done.
        vllm_bnb_plugin.register()
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.model_loader import register_model_loader

        from voxtral_int4.loader import VoxtralInt4Config, VoxtralInt4Loader
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.voxtral_int4").warning(version_problem() or f"no INT4 for Voxtral: {error}")
        return
    register_quantization_config("bitsandbytes")(VoxtralInt4Config)
    register_model_loader("bitsandbytes")(VoxtralInt4Loader)
