"""Patches of vLLM 0.32.0 that keep realtime sessions of Voxtral fast. Each patch is a module.

vLLM calls `register` in each of its processes, through the entry point `voxtral_speed` of `vllm.general_plugins`.
Each module states what vLLM does, what that costs, what the patch relies on, and which upstream change makes the patch
unnecessary. VOXTRAL_SPEED=0 turns all patches off. A list of names ("release,rows") turns on only these patches. A list
with minus signs ("-encode,-rows") turns off these patches.

A patch checks the source of the functions that it changes. If the source is not the expected one, the patch changes
nothing and logs one line. With another version of vLLM no patch is applied. Other models and requests get vLLM's own
code.
"""

import functools
import hashlib
import importlib
import inspect
import logging
import multiprocessing
import os
from collections.abc import Callable

from voxtral_int4 import TESTED, installed

VLLM = TESTED["vllm"]
# Patches of the engine's processes (scheduler and worker), and of the API processes, which talk to the clients.
ENGINE = ("blocks", "features", "release", "ended", "ahead", "rows", "encode", "tokens")
SERVER = ("inputs", "ended", "ahead", "warmup")
PATCHES = tuple(dict.fromkeys(ENGINE + SERVER))

logger = logging.getLogger("vllm.voxtral_speed")


class Unexpected(Exception):
    """vLLM's source is not the one that a patch was written for. The message names the function."""


def enabled(setting: str | None = None) -> list[str]:
    """Return the names of the patches that VOXTRAL_SPEED (or `setting`) leaves on. Raises ValueError: unknown name."""
    setting = os.environ.get("VOXTRAL_SPEED", "") if setting is None else setting
    names = setting.replace(",", " ").split()
    if names in ([], ["1"]):
        return list(PATCHES)
    if names == ["0"]:
        return []
    off = {name.removeprefix("-") for name in names if name.startswith("-")}
    on = set(names) - {f"-{name}" for name in off} or set(PATCHES)
    if unknown := (on | off) - set(PATCHES):
        raise ValueError(
            f"VOXTRAL_SPEED={setting}: no patch {', '.join(sorted(unknown))}; there are {', '.join(PATCHES)}"
        )
    return [name for name in PATCHES if name in on - off]


def active(name: str) -> bool:
    """Return whether a patch is on. In an API process, a patch of the engine counts as on if it is enabled."""
    return name in _enabled_here() and name not in _off


def expect(function: Callable, digest: str) -> None:
    """Raise Unexpected if `source_digest` of a function or class is not `digest`."""
    try:
        found = source_digest(function)
    except (OSError, TypeError):
        found = "none"
    if found != digest:
        raise Unexpected(f"{function.__module__}.{function.__qualname__} has another source than vLLM {VLLM}'s")


def source_digest(function: Callable) -> str:
    """Return the first 12 digits of the sha256 of a function's source text."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


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


_off: set[str] = set()  # names of patches that could not be applied


def turn_off(name: str, reason: object) -> None:
    """Record that a patch is off. Log the reason once."""
    if name not in _off:
        _off.add(name)
        logger.warning("speed patch %s is off: %s", name, reason)


@functools.cache  # vLLM may call it more than once in a process
def register() -> None:
    """Apply the patches of this process. Never raises: a server without patches is slower, but works.

    vLLM names the processes of its engines EngineCore. It names several API processes ApiServer_0, ApiServer_1, ...
    """
    in_engine = not multiprocessing.current_process().name.startswith(("MainProcess", "ApiServer"))
    on = []
    for name in _enabled_here():
        if name not in (ENGINE if in_engine else SERVER):
            continue
        try:
            module = importlib.import_module(f"voxtral_speed.{name}")
            if (module.apply_to_engine if in_engine else module.apply_to_server)() is not False:
                on.append(name)
        except Exception as error:  # also unforeseen errors: the server must start
            turn_off(name, error)
    if on and in_engine:
        logger.info("Speed patches: %s", ", ".join(on))
