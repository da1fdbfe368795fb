"""The real vLLM servers that tests share, started as a user starts them; which tests run where, and in what order."""

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
CHECKPOINT = Path(os.environ.get("TINY_CHECKPOINT", ROOT / "tests" / "tiny_checkpoint"))
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "vllm_plugin")]  # scripts/: a microphone and a browser
for name in re.findall(r"^#   ([A-Z][A-Z0-9_]+)", (ROOT / "serve.sh").read_text(), re.M):
    os.environ.pop(name, None)  # what the user has exported for a server of his own: VLLM_API_KEY, PORT
os.environ["OMP_NUM_THREADS"] = "1"  # enough for so small a model; several servers run on two cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run vLLM's CPU build, whatever else is here
if sys.prefix != sys.base_prefix:
    os.environ["VOXTRAL_VENV"] = sys.prefix  # which may be another one than .venv: see scripts/cpu-venv
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored


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
                ["./serve.sh", *self._options],
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

    def kill(self, how: int = signal.SIGKILL) -> None:
        """Kill the server and the processes it started."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait()

    def revive(self) -> None:
        """Start it again if it was killed."""
        if self.process and self.process.poll() is not None:
            self.start().wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The server of most tests: sessions of at most 79 s, four at once."""
    folder = tmp_path_factory.mktemp("server")
    process = ServerProcess(folder / "log", MAX_MODEL_LEN="1024", MAX_NUM_SEQS="4", **_running())
    if not process.healthy():
        process.start().wait()
    yield process
    process.kill(signal.SIGTERM)


# Servers of a few tests each, which stand in several files.
SHARED = ("brief", "locked", "stock")
IDLE_SECONDS = 3  # of `locked`
FRIEND = "https://friend.example"  # an origin that `locked` lets in
shared: list[ServerProcess] = []


@contextlib.contextmanager
def sharing(process: ServerProcess) -> Iterator[ServerProcess]:
    shared.append(process)
    yield process.start().wait()
    process.kill()


@pytest.fixture(scope="session")
def brief(tmp_path_factory):
    """A server with the key `sesame`, whose sessions end after 217 deltas, 17 s. Its memory holds three of them."""
    log, memory = tmp_path_factory.mktemp("brief") / "log", ("--num-gpu-blocks-override", "16")
    with sharing(ServerProcess(log, *memory, VLLM_API_KEY="sesame", MAX_MODEL_LEN="256")) as process:
        yield process


@pytest.fixture(scope="session")
def locked(tmp_path_factory):
    """A server in INT4 with TLS, the key `sesame`, one slot, sessions that may idle for 3 s, and a middleware."""
    folder = tmp_path_factory.mktemp("locked")
    subprocess.run([ROOT / "scripts/make-certificate", folder], check=True, capture_output=True)
    certificate = folder / "certificate.pem"
    settings = {"TLS_CERT": str(certificate), "TLS_KEY": str(folder / "key.pem"), "VLLM_API_KEY": "sesame"}
    settings |= {"SESSION_IDLE_MINUTES": str(IDLE_SECONDS / 60), "ALLOWED_ORIGINS": FRIEND}
    options = ["--middleware", "starlette.middleware.gzip.GZipMiddleware"]
    process = ServerProcess(folder / "log", *options, QUANTIZATION="bitsandbytes", MAX_NUM_SEQS="1", **settings)
    process.certificate, process.page = certificate, f"https://127.0.0.1:{process.port}/captions/"
    with sharing(process):
        yield process


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """A server without the speed patches, with the key `secret`; like `server` otherwise."""
    settings = {"VOXTRAL_SPEED": "0", "VLLM_API_KEY": "secret", "MAX_MODEL_LEN": "1024", "MAX_NUM_SEQS": "4"}
    with sharing(ServerProcess(tmp_path_factory.mktemp("stock") / "log", **settings)) as process:
        yield process


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: ./setup.sh --cpu")
# Files that go to one worker, because they share one of these servers.
TOGETHER = {"test_serve": "test_captions", "test_faults": "test_protocol", "test_speed": "test_deploy"}
# What takes longest begins first: what is left for the end should be short.
LONGEST = [f"test_{name}" for name in "captions protocol microphone clients deploy openai session outputs".split()]


def group(nodeid: str) -> str:
    """Which tests stay on one worker, by the file."""
    file = Path(nodeid.partition("::")[0]).stem
    return TOGETHER.get(file, file)


class Groups(LoadScopeScheduling):
    """Of pytest-xdist's own schedulers, loadgroup has no effect with pytest 9.2, whose node ids it cannot change."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs a vLLM server, vLLM itself, a browser, sound, or a Debian package")


def pytest_collection_modifyitems(items):
    """Mark what is slow by its fixtures; put the longest groups first."""
    for item in items:
        if not {"server", "pulse", *SHARED}.isdisjoint(item.fixturenames):
            item.add_marker("slow")
        if "launch" in item.fixturenames:
            item.add_marker(needs_vllm)
    # test_deploy.py kills `stock` and leaves it so: after test_speed.py nobody needs it any more.
    place = {item: (*LONGEST, group(item.nodeid)).index(group(item.nodeid)) for item in items}
    items.sort(key=lambda item: (place[item], "test_deploy.py" in item.nodeid))


@pytest.fixture(autouse=True)
def alive(request):
    """A server that is not there any more when a test wants it, because another test killed it, is started again."""
    for name in {"server", *SHARED}.intersection(request.fixturenames):
        request.getfixturevalue(name).revive()


@pytest.hookimpl(trylast=True)  # behind the fixtures of the test
def pytest_runtest_teardown(item, nextitem):
    """Behind the last test that wants it, a shared server would only take memory."""
    if nextitem is None or group(nextitem.nodeid) != group(item.nodeid):
        for process in shared:
            process.kill()


def _running() -> dict[str, str]:
    """A server that runs already on this port is used instead, which makes single tests quick."""
    return {"PORT": os.environ["TEST_SERVER_PORT"]} if "TEST_SERVER_PORT" in os.environ else {}


def run_script(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user does; output as text, stdin closed."""
    options = {"capture_output": True, "text": True, "timeout": 600, "stdin": subprocess.DEVNULL} | options
    return subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], **options)
