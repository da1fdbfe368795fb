"""Patches of vLLM 0.32.0 that keep realtime sessions of Voxtral fast, and fix its start. Each patch is a module.

vLLM calls `register` in each of its processes, through the entry point `voxtral_speed` of `vllm.general_plugins`.
Which process it is does not matter: the scheduler's patches are applied everywhere, the worker's where vLLM makes one.
Those of an API process are applied by its endpoint plugin (voxtral_web.page), which asks the engines what is on there.
Each module states what vLLM does, what that costs, what the patch relies on, and which upstream change makes the patch
unnecessary. VOXTRAL_SPEED=0 turns all patches off, a list ("-encode,-rows") turns off these patches.

A module has `apply_to_engine()`, `apply_to_server()` or both, for two kinds of processes (for the one that starts the
engine: `apply_to_start()`), and CHECKED: the functions and classes (`module:name`) that it changes or relies on, with
digests of their source. If a source is another one, the patch changes nothing and logs one line. With another version
of vLLM no patch is applied. Other models and requests get vLLM's own code.
"""

import functools
import hashlib
import importlib
import inspect
import logging
import operator
import os

from voxtral_int4 import TESTED, installed, is_voxtral_realtime

VLLM = TESTED["vllm"]
# Patches of the engine, and of the API processes, which talk to the clients. What is in both has two halves.
SCHEDULER = ("blocks", "features", "ended", "release", "ahead", "feedback")
WORKER = ("rows", "encode", "products", "conditioning")
SERVER = ("inputs", "ended", "ahead")
START = ("fork", "sigterm")
PATCHES = (*dict.fromkeys(SCHEDULER + WORKER + SERVER + START), "warmup")  # the last changes nothing in vLLM
GPU_ONLY = ("rows", "feedback")  # a CPU has vLLM's model runner V1, and a scheduler that waits
CPU_ONLY = ("fork",)

logger = logging.getLogger("vllm.voxtral_speed")


class Unexpected(Exception):
    """vLLM's source is not the one that a patch was written for. The message names the function."""


def enabled(setting: str | None = None) -> list[str]:
    """Return the names of the patches that VOXTRAL_SPEED (or `setting`) leaves on. Raises ValueError: unknown name."""
    setting = os.environ.get("VOXTRAL_SPEED", "") if setting is None else setting
    if setting == "0":
        return []
    off = {name.removeprefix("-") for name in setting.replace(",", " ").split()} - {"1"}
    if unknown := off - set(PATCHES):
        unknown = ", ".join(sorted(unknown))
        raise ValueError(f"VOXTRAL_SPEED={setting}: no patch {unknown}; there are {', '.join(PATCHES)}")
    return [name for name in PATCHES if name not in off]


def active(name: str) -> bool:
    """Return whether a patch is on in this process; in an API process, one of the scheduler, in all its engines."""
    return name in _enabled_here() and name not in _off


def expect(name: str, digest: str) -> None:
    """Raise Unexpected if `source_digest` of a function or class, `module:name`, is not `digest`."""
    try:
        found = source_digest(name)
    except (ImportError, AttributeError, OSError, TypeError):
        found = "none"
    if found != digest:
        raise Unexpected(f"{name} has another source than vLLM {VLLM}'s")


@functools.cache  # another patch may change what has that name
def source_digest(name: str) -> str:
    """Return the first 12 digits of the sha256 of the source text of a function or class, `module:name`."""
    module, _, path = name.partition(":")
    found = operator.attrgetter(path)(importlib.import_module(module))
    return hashlib.sha256(inspect.getsource(found).encode()).hexdigest()[:12]


def need(*names: str) -> None:
    """Raise Unexpected if one of these patches is off."""
    if off := [name for name in names if not active(name)]:
        raise Unexpected(f"it needs the patch {off[0]}")


@functools.cache
def _enabled_here() -> list[str]:
    try:
        names = enabled()
    except ValueError as error:
        logger.warning("%s: all speed patches are off", error)
        return []
    if names and (found := installed("vllm")) != VLLM:
        logger.warning("all speed patches are off: they support vLLM %s, not %s", VLLM, found)
        return []
    return names


def new_graphs(name: str) -> None:
    """Give the models that a patch changes compiled graphs of their own.

    vLLM keeps compiled graphs, and the key that it finds them by knows the configuration, not the patches.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    create = BaseModelLoader.create_model

    def create_model(self, vllm_config, model_config, prefix=""):
        if is_voxtral_realtime(model_config):
            vllm_config.additional_config[f"voxtral_{name}"] = True
        return create(self, vllm_config, model_config, prefix)

    BaseModelLoader.create_model = create_model


_off: set[str] = set()  # names of patches that could not be applied


def turn_off(name: str, reason: object) -> None:
    """Record that a patch is off. Log the reason once."""
    if name not in _off:
        _off.add(name)
        logger.warning("speed patch %s is off: %s", name, reason)


@functools.cache  # vLLM may call it more than once in a process
def register() -> None:
    """Apply the patches of the engine. Never raises: a server without patches is slower, but works."""
    if not _enabled_here():
        return
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    from .frames import mark_sessions

    try:
        mark_sessions()
    except Exception as error:  # as in `_apply`
        for name in (*SCHEDULER, "rows"):
            turn_off(name, error)
    _apply(START, "apply_to_start")
    scheduler = _apply(SCHEDULER, "apply_to_engine")
    EngineCore.voxtral_patches = lambda self: [name for name in SCHEDULER if active(name)]
    init = WorkerBase.__init__

    @functools.cache
    def patch_worker() -> None:
        on = [*filter(active, scheduler), *_apply(WORKER, "apply_to_engine")]
        logger.info("Speed patches: %s", ", ".join(on))

    def init_patched(self, *args, **kwargs):
        patch_worker()
        init(self, *args, **kwargs)

    WorkerBase.__init__ = init_patched


async def register_server(engine_client: object) -> None:
    """Apply the patches of an API process; one that has a half in the engine only if all engines have that half."""
    if not _enabled_here():
        return
    try:
        answers = await engine_client.engine_core.call_utility_all_async("voxtral_patches")
    except Exception as error:  # an engine without this plugin, on another machine
        logger.warning("an engine has no speed patches: %s", error)
        answers = [()]
    for name in SCHEDULER:
        if active(name) and not all(name in on for on in answers):
            turn_off(name, "it is off in an engine")
    _apply(SERVER, "apply_to_server")


def _apply(names: tuple[str, ...], function: str) -> list[str]:
    """Apply patches; return those that are on and have an effect here."""
    from vllm.platforms import current_platform

    left_out = GPU_ONLY if current_platform.is_cpu() else CPU_ONLY
    names = [name for name in names if active(name) and name not in left_out]
    for name in names:
        try:
            module = importlib.import_module(f"voxtral_speed.{name}")
            for checked, digest in module.CHECKED.items():
                expect(checked, digest)
            getattr(module, function)()
        except Exception as error:  # also unforeseen errors: the server must start
            turn_off(name, error)
    return [*filter(active, names)]
