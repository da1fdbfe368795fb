"""deploy/nginx.conf: nginx itself in front of two real servers."""

import asyncio
import json
import re
import shutil
import subprocess
import time
import urllib.request

import pytest
import websockets
from servers import ROOT, ServerProcess, free_port
from speech import talk, write

from voxtral_client.audio import stream
from voxtral_client.media import AudioFile
from voxtral_client.session import Server
from voxtral_client.transcriber import Transcriber


@pytest.fixture
def balancer(server, stock, tmp_path):
    """nginx with the configuration as it is, but for its ports and the places of its files.

    `stock` wants a key: nginx must pass it on.
    """
    port, text = free_port(), (ROOT / "deploy" / "nginx.conf").read_text()
    for old, new in (("127.0.0.1:8001", server.port), ("127.0.0.1:8002", stock.port)):
        assert text.count(old) == 1
        text = text.replace(old, f"127.0.0.1:{new}")
    assert text.count("listen 8000;") == 1
    text = text.replace("listen 8000;", f"listen 127.0.0.1:{port};")
    paths = "".join(f"{name}_temp_path {tmp_path}/{name};" for name in ("client_body", "proxy"))
    paths += "".join(f"{name}_temp_path {tmp_path}/{name};" for name in ("fastcgi", "uwsgi", "scgi"))
    text = text.replace("http {", f"http {{ access_log off; {paths}")
    (tmp_path / "nginx.conf").write_text(f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors;\n{text}")
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/opt/homebrew/bin")
    assert program, "apt install nginx"
    process = subprocess.Popen([program, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "errors"])
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "errors").read_text()
        yield f"ws://127.0.0.1:{port}/v1/realtime"
    finally:
        process.terminate()
        process.wait()


def connections(server: ServerProcess) -> int:
    """How many sessions the server says that it has."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as reply:
        return round(float(re.search(r"^vllm:websocket_connections_active\S* (\S+)$", reply.read().decode(), re.M)[1]))


async def transcribe(url: str, path, told: list[str], realtime: bool = True) -> str:
    transcriber = Transcriber(Server(url, "secret"), notify=lambda state, text: told.append(text), give_up_after=600)
    await transcriber.open()
    chunks = stream(AudioFile(path).blocks(), realtime)
    return "".join([word.text async for word in transcriber.words(chunks)])


def test_browser_is_let_in(balancer):
    """The captions page behind nginx: its Origin is nginx's address, which must reach the server as Host."""

    async def greeting(origin: str) -> str:
        headers = {"Authorization": "Bearer secret"}
        async with websockets.connect(balancer, origin=origin, additional_headers=headers) as socket:
            return json.loads(await socket.recv())["type"]

    here = balancer.replace("ws:", "http:").removesuffix("/v1/realtime")
    for _ in range(2):  # one server each
        assert asyncio.run(greeting(here)) == "session.created"
    with pytest.raises(websockets.InvalidStatus, match="403"):
        asyncio.run(greeting("https://elsewhere.example"))


def test_streams_spread_and_survive_a_server(server, stock, balancer, tmp_path):
    """Four live streams, two on each server; one server is killed; all words arrive as if nothing had happened."""
    paths = [write(tmp_path / f"{seed}.wav", talk(15, seed)[0]) for seed in range(70, 74)]

    async def scenario() -> tuple[list[str], list[str], list[list[str]], list[int]]:
        undisturbed = [await transcribe(server.url, path, [], realtime=False) for path in paths]
        told = [[] for _ in paths]
        streams = [asyncio.create_task(transcribe(balancer, *pair)) for pair in zip(paths, told, strict=True)]
        spread = [0, 0]
        while sum(spread) < len(streams):
            spread = [await asyncio.to_thread(connections, each) for each in (server, stock)]
        await asyncio.sleep(4)
        stock.kill()
        return undisturbed, list(await asyncio.gather(*streams)), told, spread

    undisturbed, texts, told, spread = asyncio.run(scenario())
    assert spread == [2, 2]
    assert [any("connection lost" in text for text in messages) for messages in told].count(True) == 2
    assert texts == undisturbed
    assert all(len(text.split()) > 10 for text in texts)
