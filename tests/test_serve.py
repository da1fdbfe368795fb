"""serve.sh, setup.sh and demo.sh as a user runs them; a server in INT4 with a key and TLS."""

import asyncio
import os
import pty
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request

import numpy as np
import psutil
import pytest
import soundfile
import soxr
from hub import REPOSITORY, Hub
from servers import CHECKPOINT, ROOT, ServerProcess, free_port, needs_vllm, run_script
from test_launch import fake_gpu
from test_protocol import NODE

from launch.settings import OPTIONS, TABLE
from launch.weights import FILES
from voxtral_client.session import Done, Server

TEXT = (CHECKPOINT / "sample.txt").read_text().strip()


def serve(*arguments, **environment) -> subprocess.CompletedProcess:
    """Run serve.sh where it should refuse before vLLM's long start."""
    settings = os.environ | {"MODEL": str(CHECKPOINT), "HOST": "127.0.0.1", "PORT": str(free_port())}
    settings |= {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        ["./serve.sh", *arguments], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=100
    )


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@needs_vllm
@pytest.mark.parametrize("how", ["variable", "option", "option="])
def test_port_taken(how):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        match how:
            case "variable":
                result = serve(PORT=port)
            case "option":
                result = serve("--port", port)
            case _:
                result = serve(f"--port={port}")
        refused(result, port, "another program has this port")


@needs_vllm
@pytest.mark.parametrize("file", ["params.json", "tekken.json", "consolidated.safetensors"])
def test_model_folder_without_one_of_its_files(tmp_path, file):
    shutil.copytree(CHECKPOINT, tmp_path / "model", ignore=shutil.ignore_patterns(file))
    refused(serve(MODEL=str(tmp_path / "model")), file, "missing")


@needs_vllm
def test_model_folder_that_is_not_there(tmp_path):
    refused(serve(MODEL=str(tmp_path / "nothing")), "no such folder")


def test_not_installed(tmp_path):
    """A clone without .venv, and no vllm on the PATH."""
    shutil.copy(ROOT / "serve.sh", tmp_path)
    result = subprocess.run(
        [tmp_path / "serve.sh"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60
    )
    refused(result, "./setup.sh")


@needs_vllm
def test_gpu_memory_held_by_others(tmp_path):
    """Here nvidia-smi is a script that prints what it does where another program holds most of the memory."""
    settings = fake_gpu(tmp_path, "0, GPU-1, 4000, 12288\n1, GPU-2, 6000, 12288")
    refused(serve(**settings), "4000 of 12288 MiB", "11059", "GPU_MEMORY_UTILIZATION=0.32")
    refused(serve(**settings | {"CUDA_VISIBLE_DEVICES": "1,0"}), "6000 of 12288 MiB")


@needs_vllm
def test_what_vllm_is_started_with(tmp_path):
    """Here vllm is a script that prints its options. Those of the command line lead the ones that depend on them."""
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "GPU=$CUDA_VISIBLE_DEVICES $@"\nenv\n')
    (tmp_path / "vllm").chmod(0o755)
    settings = fake_gpu(tmp_path, "0, GPU-11, 12000, 12288\n1, GPU-22, 12000, 12288")
    settings["PATH"] = f"{tmp_path}:{sys.prefix}/bin:{os.environ['PATH']}"
    settings |= {"VOXTRAL_VENV": str(tmp_path / "none"), "CUDA_VISIBLE_DEVICES": "GPU-2", "PORT": str(free_port())}
    result = serve("--max-num-seqs", "16", **settings)
    assert result.stdout.startswith("GPU=1 serve"), result.stderr
    assert "--max-num-queued-reqs 16" in result.stdout
    assert "--gpu-memory-utilization" in result.stdout
    assert "--distributed-executor-backend" not in result.stdout
    names = set(re.findall(r"^(\w+)=", result.stdout, re.MULTILINE))
    assert {"PORT", "MAX_NUM_SEQS", "SESSION_IDLE_MINUTES"} <= names  # vLLM's plugins read them
    assert names.isdisjoint("device model tokenizer executor sessions servers".split())
    both = serve("--data-parallel-size", "2", **settings | {"CUDA_VISIBLE_DEVICES": "0,1"}).stdout
    assert "--max-num-queued-reqs 16 " in both
    assert "--distributed-executor-backend uni " in both


@pytest.mark.parametrize("script", ["serve.sh", "setup.sh", "demo.sh"])
def test_help(script):
    result = subprocess.run([f"./{script}", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) >= 2
    assert "set -euo" not in result.stdout


def test_every_variable_is_in_the_table():
    """What serve.sh, launch/ and the plugins read, `./serve.sh -h` lists with its default."""
    used = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", (ROOT / "serve.sh").read_text()))
    for path in [*ROOT.glob("launch/*.py"), *ROOT.glob("vllm_plugin/*/*.py")]:
        used |= set(re.findall(r"""(?:settings|environ(?:ment)?)(?:\.get\(|\[)"([A-Z][A-Z0-9_]+)""", path.read_text()))
    others = {"PATH", "PYTHONPATH", "VLLM_PLUGINS", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"}
    others |= {name for name in used if name.startswith("HF_")} | set(OPTIONS.values())
    assert used - others - {"HOME"} <= {setting.name for setting in TABLE}
    shown = subprocess.run(["./serve.sh", "-h"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name, default, meaning, *_ in TABLE:
        assert re.search(rf"^  {name}{'=' + re.escape(default) if default else ''} +{re.escape(meaning)}", shown, re.M)


@pytest.mark.slow
def test_demo():
    """The command that the README gives first: the sample's text, exactly, in INT4."""
    result = subprocess.run(["./demo.sh"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == TEXT
    assert "× real time" in result.stderr


@needs_vllm
def test_addresses_and_a_code_for_phones(tmp_path):
    """The code is read from the blocks on the terminal. What is no terminal gets neither the code nor the key."""
    import cv2

    settings = os.environ | {"TLS_CERT": "certificate.pem", "VLLM_API_KEY": "open #1+", "PORT": "8443"}
    command, options = ["./serve.sh", "--show-address", "--host", "192.168.7.8"], {"cwd": ROOT, "env": settings}
    main, other = pty.openpty()
    subprocess.run(command, stdout=other, check=True, timeout=60, **options)
    os.close(other)
    *text, _ = os.read(main, 100_000).decode().splitlines()
    os.close(main)
    assert text[1] == "other clients: --url wss://192.168.7.8:8443/v1/realtime --cafile ca.pem"
    light = [[(c in "█▀", c in "█▄") for c in line] for line in text[3:]]
    picture = np.kron(np.array(light).transpose(0, 2, 1).reshape(-1, len(light[0])), np.full((8, 8), 255)).astype(
        "uint8"
    )
    assert cv2.QRCodeDetector().detectAndDecode(picture)[0] == "https://192.168.7.8:8443/captions/#key=open%20%231%2B"
    piped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, **options).stdout
    assert piped.splitlines() == text[:3]
    for host in ("127.0.0.1", "localhost"):
        options["env"] = os.environ | {"HOST": host}
        alone = subprocess.run(command[:2], capture_output=True, text=True, check=True, timeout=60, **options).stdout
        assert alone == "this machine:  http://localhost:8000/captions/\n"


def test_key_file(locked, tmp_path, monkeypatch):
    """Server and client read the same file, unless VLLM_API_KEY is set."""
    monkeypatch.delenv("VLLM_API_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    made = [subprocess.check_output([ROOT / "scripts/make-key"], text=True) for _ in range(2)]
    file = tmp_path / "voxtral/key"
    assert made == [f"{file}\n"] * 2
    assert (file.stat().st_mode & 0o777, len(file.read_text())) == (0o600, 49)
    assert "wrong API key (HTTP 401)" in transcribe(locked, "--insecure").stderr
    file.write_text("sesame\r\n")
    assert transcribe(locked, "--insecure").stdout == TEXT + "\n"
    assert "wrong API key (HTTP 401)" in transcribe(locked, "--insecure", VLLM_API_KEY="open").stderr
    file.write_text("sésame")
    result = serve()
    assert (result.returncode, result.stdout) == (2, "")
    assert "VLLM_API_KEY: character 2 is" in result.stderr  # serve.sh reads it


def transcribe(server, *arguments, **environment) -> subprocess.CompletedProcess:
    settings = {k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"} | environment
    arguments = (CHECKPOINT / "sample.wav", "--url", server.url, *arguments)
    return run_script("test_file_transcribe.py", *arguments, env=settings)


def test_int4_with_key_and_certificate(locked):
    for given in (["--api-key", "sesame"], []):
        result = transcribe(locked, "--cafile", locked.certificate, *given, VLLM_API_KEY="" if given else "sesame")
        assert (result.returncode, result.stdout) == (0, TEXT + "\n"), result.stderr
    assert transcribe(locked, "--insecure", "--api-key", "sesame").stdout == TEXT + "\n"
    trust = ssl.create_default_context(cafile=locked.certificate)
    with urllib.request.urlopen(f"{locked.page}ca.pem", context=trust) as ca:  # for phones
        assert ca.read() == locked.certificate.read_bytes()
    log = locked.log.read_text()
    assert '"WebSocket /v1/realtime" [accepted]' in log
    for secret in ("sesame", "input_audio_buffer", TEXT[:20]):
        assert secret not in log


def test_openais_javascript_client(locked, tmp_path):
    """The realtime part of the npm package: it speaks TLS only, and sends the key as a browser does."""
    samples, rate = soundfile.read(CHECKPOINT / "sample.wav", dtype="int16")
    (tmp_path / "sample.pcm").write_bytes(soxr.resample(samples, rate, 24_000).tobytes())
    base = f"https://127.0.0.1:{locked.port}/v1"
    command = [NODE, ROOT / "tests/sdks/openai.mjs", f"{sys.prefix}/openai/", base, "sesame", tmp_path / "sample.pcm"]
    trusting = os.environ | {"NODE_EXTRA_CA_CERTS": str(locked.certificate)}
    result = subprocess.run(command, env=trusting, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout) == (0, TEXT + "\n"), result.stderr


def test_wrong_key_unknown_certificate_wrong_scheme(locked, server):
    refused(transcribe(locked, "--cafile", locked.certificate), "API key")
    refused(transcribe(locked, "--cafile", locked.certificate, "--api-key", "wrong"), "API key")
    refused(transcribe(locked, "--api-key", "sesame"), "certificate not trusted", "--cafile")
    refused(transcribe(locked, "--cafile", "/no/such/file"), "--cafile")
    plain = run_script("test_file_transcribe.py", CHECKPOINT / "sample.wav", "--url", locked.url.replace("wss", "ws"))
    refused(plain, "wss://")
    secure = run_script("test_file_transcribe.py", CHECKPOINT / "sample.wav", "--url", server.url.replace("ws", "wss"))
    refused(secure, "write ws://")


@pytest.mark.slow
def test_stopped_while_it_starts(tmp_path):
    """By `kill` or `docker stop`, which tell one process, while the engine loads the model."""
    server = ServerProcess(tmp_path / "log", MAX_MODEL_LEN="256").start()

    def is_engine(process: psutil.Process) -> bool:
        of_server = process.info["ppid"] == server.process.pid
        return of_server and "EngineCore" in " ".join(process.info["cmdline"] or ())

    try:
        while not (engines := [*filter(is_engine, psutil.process_iter(["ppid", "cmdline"]))]):
            assert server.process.poll() is None
            time.sleep(0.1)
        server.process.terminate()
        assert server.process.wait(120) == 0
        assert not psutil.wait_procs(engines, 10)[1]
    finally:
        server.kill()


@pytest.mark.slow
def test_first_start_from_the_hub_with_another_delay(tmp_path):
    """`MODEL=OWNER/NAME TRANSCRIPTION_DELAY_MS=2400 ./serve.sh`: the clients need to know of neither.

    The words are wrong, since the embedded model was trained at 480 ms only; that audio goes through is what counts.
    """
    files = {name: (CHECKPOINT / name).read_bytes() for name in FILES}
    with Hub(files) as hub:
        settings = {"MODEL": REPOSITORY, "SERVED_MODEL_NAME": "", "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": ""}
        settings |= {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        server = ServerProcess(tmp_path / "log", TRANSCRIPTION_DELAY_MS="2400", MAX_MODEL_LEN="1024", **settings)
        try:
            server.start().wait()
            hub.asked.clear()
            result = transcribe(server)
            assert (result.returncode, result.stderr.count("error")) == (0, 0), result.stderr
            assert asyncio.run(one_session(server)) == 1 + 32 + 30  # BOS, left padding, delay of 30 frames
            assert hub.asked == []
        finally:
            server.kill()
    log = server.log.read_text()
    assert re.search(r"Memory for \d+\.\d sessions of 1 minutes at once", log)


async def one_session(server) -> int:
    """Two seconds of silence under the model's name on the hub; returns the tokens of the prompt."""
    async with Server(server.url).session(REPOSITORY) as session:
        await session.send(bytes(2 * 32000))
        await session.finish()
        while not isinstance(answer := await session.receive(), Done):
            pass
    return answer.prompt_tokens
