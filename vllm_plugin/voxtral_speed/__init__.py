"""Sessions that stay fast: patches of vLLM 0.32.0 for the realtime path of Voxtral, each in a module of its own.

vLLM calls `register` in every one of its processes, through the entry point `voxtral_speed` of
`vllm.general_plugins`. Each module says what vLLM does, what it costs, what the patch relies on and which upstream
issue makes it needless. VOXTRAL_SPEED=0 turns all of them off, a list of names ("release,rows") all others, a list
with minus signs ("-encode,-rows") those.

A patch looks at what it replaces. Where that is not what it was written for, it leaves vLLM as it is and says so in
one line; with another version of vLLM all of them do. Other models and requests get vLLM's own code.
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
# Patches of the process of scheduler and worker, and of the one that speaks with the clients.
ENGINE = ("blocks", "features", "release", "ended", "ahead", "rows", "encode", "tokens")
SERVER = ("inputs", "ended", "ahead", "warmup")
PATCHES = tuple(dict.fromkeys(ENGINE + SERVER))

logger = logging.getLogger("vllm.voxtral_speed")


class Unexpected(Exception):
    """vLLM is not what a patch was written for; the message says in what."""


def wanted(setting: str | None = None) -> list[str]:
    """Return the names that VOXTRAL_SPEED (or `setting`) leaves on. Raises ValueError for an unknown name."""
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
    """Whether a patch is on in this process, or one of the engine's would be in the engine's process."""
    return name in _wanted_here() and name not in _stepped_aside


def expect(function: Callable, digest: str) -> None:
    """Raise Unexpected where a function's source is not the one with this digest (see `source_digest`)."""
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
def _wanted_here() -> list[str]:
    try:
        names = wanted()
    except ValueError as error:
        logger.warning("%s: vLLM stays as it is", error)
        return []
    if names and (found := installed("vllm")) != VLLM:
        logger.warning("the speed patches know vLLM %s, not %s: vLLM stays as it is", VLLM, found)
        return []
    return names


_stepped_aside: dict[str, str] = {}  # name of a patch: why it is not on


def step_aside(name: str, reason: object) -> None:
    """Book that a patch leaves vLLM as it is, and say so once."""
    if name not in _stepped_aside:
        _stepped_aside[name] = str(reason)
        logger.warning("speed patch %s is off: %s", name, reason)


@functools.cache  # vLLM may call it more than once in a process
def register() -> None:
    """Apply the patches of this process. Never raises: a server without them is slower, but serves.

    vLLM calls the processes of its engines EngineCore, those of more than one server ApiServer_0, ApiServer_1.
    """
    in_engine = not multiprocessing.current_process().name.startswith(("MainProcess", "ApiServer"))
    on = []
    for name in _wanted_here():
        if name not in (ENGINE if in_engine else SERVER):
            continue
        try:
            module = importlib.import_module(f"voxtral_speed.{name}")
            if (module.apply_to_engine if in_engine else module.apply_to_server)() is not False:
                on.append(name)
        except Exception as error:  # also for what nobody thought of: the server must serve
            step_aside(name, error)
    if on and in_engine:
        logger.info("Speed patches: %s", ", ".join(on))
