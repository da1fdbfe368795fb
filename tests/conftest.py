"""The fixtures: real vLLM servers that tests share. What tests import is in servers.py."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from scheduling import SHARED, group, order, pytest_xdist_make_scheduler  # noqa: F401, a hook of pytest-xdist
from servers import FRIEND, IDLE_SECONDS, ROOT, ServerProcess, needs_vllm

shared: list[ServerProcess] = []


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The server of most tests: sessions of at most 79 s, four at once."""
    folder = tmp_path_factory.mktemp("server")
    # A server that runs already on this port is used instead, which makes single tests quick.
    running = {"PORT": os.environ["TEST_SERVER_PORT"]} if "TEST_SERVER_PORT" in os.environ else {}
    process = ServerProcess(folder / "log", MAX_MODEL_LEN="1024", MAX_NUM_SEQS="4", **running)
    if not process.healthy():
        process.start().wait()
    yield process
    process.kill(signal.SIGTERM)


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
    settings = {"TLS_CERT": str(folder / "certificate.pem"), "TLS_KEY": str(folder / "key.pem")}
    settings |= {"VLLM_API_KEY": "sesame", "SESSION_IDLE_MINUTES": str(IDLE_SECONDS / 60), "ALLOWED_ORIGINS": FRIEND}
    options = ["--middleware", "starlette.middleware.gzip.GZipMiddleware"]
    process = ServerProcess(folder / "log", *options, QUANTIZATION="bitsandbytes", MAX_NUM_SEQS="1", **settings)
    process.certificate, process.page = folder / "ca.pem", f"https://127.0.0.1:{process.port}/captions/"
    with sharing(process):
        yield process


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """A server without the speed patches, with the key `secret`; like `server` otherwise."""
    settings = {"VOXTRAL_SPEED": "0", "VLLM_API_KEY": "secret", "MAX_MODEL_LEN": "1024", "MAX_NUM_SEQS": "4"}
    with sharing(ServerProcess(tmp_path_factory.mktemp("stock") / "log", **settings)) as process:
        yield process


def pytest_configure(config):
    needs = "a vLLM server, vLLM itself, a browser, sound, a Debian package, or ten seconds"
    config.addinivalue_line("markers", f"slow: needs {needs}")


def pytest_collection_modifyitems(items):
    """Mark what is slow by its fixtures; put the longest groups first."""
    for item in items:
        if not {"server", "pulse", *SHARED}.isdisjoint(item.fixturenames):
            item.add_marker("slow")
        if "launch" in item.fixturenames:
            item.add_marker(needs_vllm)
    items.sort(key=order)


@pytest.fixture(autouse=True)
def alive(request):
    """A server that is not there any more when a test wants it, because another test killed it, is started again."""
    for name in {"server", *SHARED}.intersection(request.fixturenames):
        request.getfixturevalue(name).revive()


@pytest.hookimpl(trylast=True)  # after the fixtures of the test
def pytest_runtest_teardown(item, nextitem):
    """After the last test that wants it, a shared server would only take memory."""
    if nextitem is None or group(nextitem.nodeid) != group(item.nodeid):
        for process in shared:
            process.kill()
