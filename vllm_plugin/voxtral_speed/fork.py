"""On a CPU the engine's process is a fork of the one that starts it, so it has all modules already.

vLLM: on a CPU it starts the engine by `spawn`, whatever VLLM_WORKER_MULTIPROC_METHOD says (vllm/platforms/cpu.py). The
new process imports torch, transformers and vLLM once more.
Cost: 7 of 17 s of a start with the embedded model.
Relies on: no GPU is in use, and no other thread of the process holds a lock, before the engine starts. GNU's OpenMP
would wait forever in a fork of a process that has used several threads: until then torch may use one.
Unnecessary with: `fork` as a choice on a CPU too (no issue known).
"""

import contextlib
import ctypes
import os
import signal
import socket
from multiprocessing import parent_process
from multiprocessing.context import ForkContext, ForkProcess

import torch

CHECKED = {"vllm.v1.engine.utils:CoreEngineProcManager.__init__": "e0e505ebaee2"}
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def apply_to_start() -> None:
    """Fork the engines, if this is the process that starts them."""
    from vllm.v1.engine import utils

    if parent_process():
        return
    Process.threads = torch.get_num_threads()
    torch.set_num_threads(1)
    utils.get_mp_context = Context


class Process(ForkProcess):
    """An engine's process. It ends with the one that forked it, and leaves the port and the event loop to that."""

    def run(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):  # this is no socket
                inherited = socket.socket(fileno=fd)
                if inherited.family in (socket.AF_INET, socket.AF_INET6):
                    os.dup2(nothing, fd)
                inherited.detach()
        torch.set_num_threads(self.threads)
        super().run()


class Context(ForkContext):
    """What multiprocessing.get_context("fork") returns, with this Process."""

    Process = Process
