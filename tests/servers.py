"""Real servers, started as a user starts them, and the project's scripts, run as a user runs them.

At import it makes the environment of all tests: without the user's own settings, and without a GPU.
"""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKPOINT = Path(os.environ.get("TINY_CHECKPOINT", ROOT / "tests" / "tiny_checkpoint"))
sys.path[:0] = [str(ROOT), str(ROOT / "vllm_plugin")]

from launch.settings import TABLE  # noqa: E402

for setting in TABLE:
    os.environ.pop(setting.name, None)  # what the user has exported for a server of his own: VLLM_API_KEY, PORT
os.environ["VLLM_API_KEY"] = ""  # nor the one in his ~/.config/voxtral/key
os.environ["OMP_NUM_THREADS"] = "1"  # enough for so small a model; several servers run on two cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run vLLM's CPU build, whatever else is here
if sys.prefix != sys.base_prefix:
    os.environ["VOXTRAL_VENV"] = sys.prefix  # which may be another one than .venv: see scripts/cpu-venv
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: ./setup.sh --cpu")
IDLE_SECONDS = 3  # how long sessions of the fixture `locked` may idle
FRIEND = "https://friend.example"  # an origin that `locked` allows


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """`./serve.sh` with the embedded checkpoint on a loopback port."""

    def __init__(self, log: Path, *options: str, **environment: str):
        self.port = int(environment.get("PORT") or free_port())
        self.log = log
        self._options = options
        self.tls = "--ssl-certfile" in options or "TLS_CERT" in environment
        self._environment = os.environ | {
            "MODEL": str(CHECKPOINT),
            "SERVED_MODEL_NAME": "tiny",
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "QUANTIZATION": "none",
            "CPU_KVCACHE_GB": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        }
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://127.0.0.1:{self.port}/v1/realtime"

    def start(self) -> "ServerProcess":
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["./serve.sh", "--num-gpu-blocks-override", "256", *self._options],  # 190 MB for sessions
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def wait(self) -> "ServerProcess":
        """Wait until the server answers; fail with its log if it ends instead."""
        while not self.healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"server ended:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)
        return self

    def healthy(self) -> bool:
        try:
            scheme, trusting = ("https", ssl._create_unverified_context()) if self.tls else ("http", None)
            url = f"{scheme}://127.0.0.1:{self.port}/health"
            with urllib.request.urlopen(url, timeout=5, context=trusting) as reply:
                return reply.status == 200
        except OSError:
            return False

    def kill(self, how: int = 9) -> None:
        """Kill the server and the processes it started."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait()

    def revive(self) -> None:
        """Start it again if it was killed."""
        if self.process and self.process.poll() is not None:
            self.start().wait()


def run_script(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user does; output as text, stdin closed."""
    options = {"capture_output": True, "text": True, "timeout": 600, "stdin": subprocess.DEVNULL} | options
    return subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], **options)
