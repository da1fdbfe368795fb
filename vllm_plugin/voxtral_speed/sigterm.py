"""SIGTERM ends a server that is still starting: `kill`, `docker stop`, `systemctl stop`.

vLLM: until the server is ready, its handler raises KeyboardInterrupt. While the engine starts, `zmq_socket_ctx`
discards it, and both processes wait for each other.
Cost: the server neither starts nor ends for ten minutes, or until somebody kills it.
Relies on: vLLM's handler is there when it makes the engine's process.
Unnecessary with: a `zmq_socket_ctx` that discards nothing (no issue known).
"""

import signal
import sys

CHECKED = {
    "vllm.utils.network_utils:zmq_socket_ctx": "d309150aee7a",
    "vllm.v1.engine.utils:CoreEngineProcManager.__init__": "e0e505ebaee2",
}


def apply_to_start() -> None:
    """Replace vLLM's handler when the engine starts. What raises SystemExit is not discarded."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    init = CoreEngineProcManager.__init__

    def init_with_handler(self, *args, **kwargs):
        if getattr(signal.getsignal(signal.SIGTERM), "__name__", "") == "_interrupt_init":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        init(self, *args, **kwargs)

    CoreEngineProcManager.__init__ = init_with_handler
