"""What serve.sh does before vLLM starts: the download from a small hub, the delay, the fit on a GPU."""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hub import COMMIT, REPOSITORY, TOKEN, WITHOUT_XET_SERVER, XET_HASH, Hub
from servers import CHECKPOINT, ROOT, free_port

from launch.fit import Plan
from launch.settings import Settings

MB = 1_000_000
LARGE = 32 * MB


@pytest.fixture(scope="module")
def large() -> bytes:
    return random.Random(1).randbytes(LARGE)


@pytest.fixture
def hub(large):
    """A repository with the three files, and two more that must not be fetched."""
    files = {name: (CHECKPOINT / name).read_bytes() for name in ("params.json", "tekken.json")}
    files |= {"consolidated.safetensors": large, "model.safetensors": large, "README.md": b"# Voxtral"}
    with Hub(files) as hub:
        yield hub


@pytest.fixture
def launch(tmp_path, hub):
    """What serve.sh runs before vLLM, with caches of its own."""

    def run(*arguments: str, smi: str = "", wait: bool = True, **variables: str):
        names = ("HF_TOKEN", "HF_HUB_OFFLINE", "VLLM_API_KEY", "HF_HOME", "HF_HUB_CACHE")
        settings = {name: value for name, value in os.environ.items() if name not in names}
        settings |= {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
        settings |= {"MODEL": REPOSITORY, "HOST": "127.0.0.1", "PORT": str(free_port())} | variables
        if smi:
            settings |= {name: value for name, value in fake_gpu(tmp_path, smi).items() if name not in variables}
        command = [sys.executable, "-m", "launch", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=settings, **pipes)
        if not wait:
            return process
        output, errors = process.communicate(timeout=100)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    return run


def fake_gpu(folder: Path, smi: str, code: int = 0) -> dict[str, str]:
    """Variables with which nvidia-smi prints `smi`, and vLLM is a build for GPUs."""
    smi = "\n".join(f"{line}, 0, 8.6" if line.count(",") == 3 else line for line in smi.splitlines())
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat << 'END'\n{smi}\nEND\nexit {code}\n")
    (folder / "nvidia-smi").chmod(0o755)
    info = folder / "site-gpu/vllm-0.32.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    gpu = {"PYTHONPATH": str(info.parent), "CUDA_VISIBLE_DEVICES": "0"}
    return gpu | {"PATH": f"{folder}:{os.environ['PATH']}"}


def refused(result: subprocess.CompletedProcess, *words: str, code: int = 1) -> None:
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert sum(line.startswith("error") for line in result.stderr.splitlines()) == 1
    for word in words:
        assert word in line


def printed(result: subprocess.CompletedProcess) -> dict[str, str]:
    """The lines that serve.sh reads."""
    assert result.returncode == 0, result.stderr
    return dict(part.split("=", 1) for part in shlex.split(result.stdout) if part != "export")


def folder(result: subprocess.CompletedProcess) -> Path:
    return Path(printed(result)["model"])


def test_three_files_once_then_offline(launch, hub, large, tmp_path):
    model = folder(first := launch())
    assert "someone/voxtral" in first.stderr
    assert hub.downloaded() == {"params.json", "tekken.json", "consolidated.safetensors"}
    assert {file.name for file in model.iterdir()} == hub.downloaded()
    assert (model / "consolidated.safetensors").read_bytes() == large
    assert model == tmp_path / "hf/hub/models--someone--voxtral/snapshots" / COMMIT  # where every other program looks
    hub.asked.clear()
    again = launch(HF_TOKEN="wrong")
    assert (folder(again), again.stderr, hub.asked) == (model, "", [])
    assert folder(launch(MODEL_REVISION=COMMIT)) == model
    assert folder(launch(HF_HUB_OFFLINE="1")) == model
    assert hub.asked == []


def test_cut_connections_go_on_in_the_same_run(launch, hub, large):
    hub.cuts = [25 * MB, 1 * MB]
    assert (folder(launch()) / "consolidated.safetensors").read_bytes() == large
    assert any(start > 20 * MB for start in starts(hub))


def starts(hub) -> list[int]:
    return [int(asked.removeprefix("bytes=").rstrip("-")) for _, _, asked in hub.asked if asked]


def test_broken_download_goes_on_in_the_next_run(launch, hub, large):
    hub.cuts = [25 * MB] + [0] * 100
    refused(launch(), "consolidated.safetensors", "0.02 of 0.03 GB", "run this again")
    hub.cuts, hub.sent = [], 0
    assert (folder(launch()) / "consolidated.safetensors").read_bytes() == large
    assert hub.sent < LARGE - 20 * MB


def test_stopped_by_ctrl_c(launch, hub, large, tmp_path):
    """The bytes that came stay."""
    hub.hold = 25 * MB
    process = launch(wait=False)
    assert hub.holding.wait(60)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 20 * MB for file in tmp_path.rglob("voxtral-partial/*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1].startswith("stopped")
    hub.hold = hub.sent = 0
    assert (folder(launch()) / "consolidated.safetensors").read_bytes() == large
    assert hub.sent < LARGE - 20 * MB


@pytest.mark.slow
def test_damage_on_the_way_and_on_disk(launch, hub, large):
    """A damaged file is said to be one, and stays until the new one is there."""
    hub.spoil = True
    refused(launch(), "consolidated.safetensors was damaged during the download", "run this again")
    hub.spoil = False
    weights = folder(launch()) / "consolidated.safetensors"
    weights.resolve().write_bytes(large[:-7])  # truncated
    refused(launch(HF_HUB_OFFLINE="1"), str(weights), "damaged", "HF_HUB_OFFLINE")
    hub.cuts = [0] * 100
    refused(launch(), "was interrupted at")
    assert weights.read_bytes() == large[:-7]
    hub.cuts = []
    for spoiled in (large[:-7], b"\0" + large[1:]):  # the second: changed
        weights.resolve().write_bytes(spoiled)
        result = launch()
        assert folder(result) == weights.parent
        assert "damaged: downloading it again" in result.stderr
        assert weights.read_bytes() == large


@pytest.fixture
def with_xet(hub, tmp_path) -> dict[str, str]:
    """Variables with which the library downloads by Xet, and stores as it does then."""
    hub.xet = True
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WITHOUT_XET_SERVER)
    return {"PYTHONPATH": str(tmp_path / "site")}


def test_file_that_repositories_share(launch, hub, large, tmp_path, with_xet):
    """Stored by Xet, a blob is a link to a file whose name is no sha256: whole all the same, and not ours to change."""
    weights = folder(launch(**with_xet)) / "consolidated.safetensors"
    shared = tmp_path / "hf/hub/blobs" / XET_HASH[:2] / XET_HASH
    assert weights.resolve() == shared
    hub.asked.clear()
    again = launch(XDG_CACHE_HOME=str(tmp_path / "other"))  # as if another program had downloaded it
    assert (folder(again), again.stderr, hub.asked) == (weights.parent, "", [])

    spoiled = b"\0" + large[1:]
    shared.chmod(0o600)
    shared.write_bytes(spoiled)
    result = launch(**with_xet)
    assert "damaged: downloading it again" in result.stderr
    assert (folder(result) / "consolidated.safetensors").read_bytes() == large
    assert shared.read_bytes() == spoiled


def test_xet_that_fails(launch, hub, large, tmp_path):
    """Plain HTTP comes in its place, and goes on where it broke off; nothing of it is left then."""
    hub.xet, hub.cuts = True, [25 * MB] + [0] * 100
    result = launch()
    refused(result, "0.02 of 0.03 GB", "run this again")
    assert "Xet's download failed" in result.stderr
    hub.cuts, hub.sent = [], 0
    assert (folder(launch()) / "consolidated.safetensors").read_bytes() == large
    assert hub.sent < LARGE - 20 * MB
    assert not list(tmp_path.rglob("voxtral-partial"))


def test_hashed_once(launch, hub, tmp_path):
    """A large file is read through once, after its download, and not at the next start."""
    (tmp_path / "site").mkdir()
    counting = "import hashlib, sys\nreal = hashlib.file_digest\n"
    counting += "hashlib.file_digest = lambda *a: (print('HASHED', file=sys.stderr), real(*a))[1]\n"
    (tmp_path / "site/sitecustomize.py").write_text(counting)
    runs = [launch(PYTHONPATH=str(tmp_path / "site")).stderr.count("HASHED") for _ in range(2)]
    assert runs == [1, 0]


def test_refusals_of_the_hub(launch, hub):
    hub.gated = True
    refused(launch(), f"{hub.url}/{REPOSITORY}", "agree to its terms", "HF_TOKEN")
    hub.gated, hub.private = False, True
    refused(launch(), f"{hub.url}/{REPOSITORY}", "does not exist, or is private", "HF_TOKEN")
    refused(launch(MODEL="someone/nothing"), "someone/nothing does not exist")
    assert folder(launch(HF_TOKEN=TOKEN)).name == COMMIT
    assert not hub.leaked  # the host of the large files has no business with the token
    refused(launch(MODEL_REVISION="v9", HF_TOKEN=TOKEN), "no revision v9", "MODEL_REVISION")
    hub.status = 503
    refused(launch(MODEL="someone/other"), "HTTP 503", "later")
    hub.status = 200  # the login page of a network, say
    refused(launch(MODEL="someone/other"), "does not answer as a hub does")
    refused(launch(MODEL="some one/other"), "neither a folder nor a name")


def test_repository_without_one_of_the_files(launch, hub):
    del hub.files["params.json"]
    refused(launch(), "no params.json", "Mistral's format")


def test_no_network(launch, tmp_path):
    """The cause is said, and what can be done."""
    closed = f"http://127.0.0.1:{free_port()}"
    no_proxy = dict.fromkeys(("no_proxy", "NO_PROXY", "HTTP_PROXY", "http_proxy"), "")
    refused(launch(HF_ENDPOINT=closed), "refuses the connection", "first start needs the network")
    refused(launch(HF_ENDPOINT="http://hub.invalid", **no_proxy), "hub.invalid is not found by DNS")
    proxy = launch(HF_ENDPOINT="http://hub.invalid", **no_proxy | {"http_proxy": closed.replace("//", "//me:secret@")})
    refused(proxy, "HTTP_PROXY", "refuses the connection")
    assert "secret" not in proxy.stderr
    make_certificate(tmp_path / "hub")
    with tls_server(tmp_path / "hub") as port:
        refused(launch(HF_ENDPOINT=f"https://localhost:{port}"), "certificate is not trusted", "SSL_CERT_FILE")
    refused(launch(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")


@contextlib.contextmanager
def tls_server(folder: Path):
    """Answers no request, but shows its certificate; yields the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_not_enough_disk(launch, hub, tmp_path):
    hub.claims = 10**15
    refused(launch(), "1000000.0 GB", "GB are free", str(tmp_path / "hf"), "HF_HOME")
    assert hub.downloaded() == set()


def test_delay_is_an_edited_copy(launch, tmp_path):
    def run(delay: str) -> list[str]:
        found = printed(launch(MODEL=str(CHECKPOINT), TRANSCRIPTION_DELAY_MS=delay))
        return [found["model"], found["tokenizer"]]

    original = json.loads((CHECKPOINT / "tekken.json").read_text())
    assert run("480") == run("") == [str(CHECKPOINT), ""]  # its own
    tokenizers = set()
    for delay in (80, 1200, 2400, 2400):
        _, tokenizer = run(str(delay))
        tokenizers.add(tokenizer)
        copy = json.loads((Path(tokenizer) / "tekken.json").read_text())
        assert copy["audio"].pop("transcription_delay_ms") == delay
        assert copy | {"audio": copy["audio"] | {"transcription_delay_ms": 480}} == original
        assert [file.name for file in Path(tokenizer).iterdir()] == ["tekken.json"]
    assert len(tokenizers) == 3
    assert json.loads((CHECKPOINT / "tekken.json").read_text()) == original


@pytest.mark.parametrize("delay", ["0", "100", "1280", "2480", "960ms", "-80"])
def test_delay_that_the_model_does_not_know(launch, delay):
    refused(launch(TRANSCRIPTION_DELAY_MS=delay), f"={delay}:", "80, 160,", "1200, 2400", code=2)


def test_wrong_settings(launch, tmp_path):
    model = {"MODEL": str(CHECKPOINT)}
    refused(launch("--tokenizer", "x", **model, TRANSCRIPTION_DELAY_MS="960"), "--tokenizer", code=2)
    refused(launch(**model, PORT="eighty"), "PORT=eighty", code=2)
    refused(launch(**model, PORT="70000"), "PORT=70000: must be a number up to 65535", code=2)
    refused(launch("--port", "x", **model), "--port x: must be a number up to 65535", code=2)
    refused(launch(**model, CPU_KVCACHE_GB="1.5"), "CPU_KVCACHE_GB=1.5: must be a whole number", code=2)
    few = {"MAX_NUM_SEQS": "600", "MAX_NUM_BATCHED_TOKENS": "512"}
    refused(launch(**model, **few), "less than MAX_NUM_SEQS=600: set MAX_NUM_BATCHED_TOKENS=600", code=2)
    result = launch("--max-num-seqs", "600", "--max-num-batched-tokens=512", **model)
    refused(result, "less than --max-num-seqs 600: set --max-num-batched-tokens 600", code=2)
    refused(launch(**model, HOST="192.0.2.99"), "192.0.2.99", "an address of this machine")


def test_measured_memory():
    """The arithmetic gives what vLLM printed on an H100 (79.18 GiB) with random weights of the real shapes."""
    plan = Plan(weights=3.06, total=79.18 * 2**30, share=0.151, length=32768, batch=88)
    assert plan.blocks_of_a_session == 91
    assert plan.sessions() * 32768 == pytest.approx(170_681, rel=0.01)
    plan = Plan(weights=3.06, total=79.18 * 2**30, share=0.85, length=32768, batch=304)
    assert plan.sessions() * 32768 == pytest.approx(1_074_844, rel=0.01)
    assert Plan(3.06, 2**33, 0.9, 32768, 8192).blocks_of_a_session * 16 / 1024 == pytest.approx(19.2, abs=0.05)


NONE_512 = {"QUANTIZATION": "none", "MAX_NUM_BATCHED_TOKENS": "512"}
# free and total MiB, settings, words of the answer
FIT = [
    ("11900, 12288", {}, "the rest holds about 4.4 sessions of 43 min"),
    ("8000, 8192", {}, "the rest holds about 1.8 sessions"),
    ("8000, 8192", {"MAX_NUM_BATCHED_TOKENS": "128", "MAX_MODEL_LEN": "4096"}, "the rest holds about 2.6 sessions"),
    ("24000, 24576", {"QUANTIZATION": "none"}, "the rest holds about 8.2 sessions"),
    ("8000, 8192", {"QUANTIZATION": "none"}, "set QUANTIZATION=bitsandbytes"),
    ("11900, 12288", NONE_512, "set GPU_MEMORY_UTILIZATION=0.95 MAX_NUM_BATCHED_TOKENS=128"),
    ("7100, 12288", {}, "7100 of 12288 MiB of GPU memory are free, but 11059 must be"),
    ("7100, 12288", {}, "or set GPU_MEMORY_UTILIZATION=0.57"),
    ("4000, 12288", {}, "5.4 GiB is the least that can work"),
    ("4000, 4096", {}, "this GPU is too small"),
]


@pytest.mark.parametrize("memory, settings, answer", FIT)
def test_fit(launch, tmp_path, memory, settings, answer):
    """A folder with the real model's params.json; its weights are only looked at later."""
    defaults = {"QUANTIZATION": "bitsandbytes", "MAX_MODEL_LEN": "32768"}
    defaults |= {"GPU_MEMORY_UTILIZATION": "0.90", "MAX_NUM_SEQS": "8", "MODEL": str(full_size(tmp_path))}
    result = launch(smi=f"0, GPU-8932f937, {memory}", **defaults | settings)
    if answer.startswith("the rest"):
        assert result.returncode == 0
        assert answer in result.stderr
    else:
        refused(result, answer)


def full_size(tmp_path) -> Path:
    model = Path(shutil.copytree(CHECKPOINT, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "*.wav")))
    params = json.loads((model / "params.json").read_text()) | {"dim": 3072, "n_layers": 26}
    (model / "params.json").write_text(json.dumps(params))
    return model


def test_fit_follows_the_command_line(launch, tmp_path):
    settings = {"QUANTIZATION": "bitsandbytes", "MAX_MODEL_LEN": "32768", "MAX_NUM_BATCHED_TOKENS": "512"}
    settings |= {"GPU_MEMORY_UTILIZATION": "0.90", "MAX_NUM_SEQS": "8", "MODEL": str(full_size(tmp_path))}
    result = launch("--max_num_batched_tokens=8192", smi="0, GPU-1, 11900, 12288", **settings)
    refused(result, "19.2 for one session", "set --max_num_batched_tokens 128")
    few = launch("--max-num-seqs=12", smi="0, GPU-1, 11900, 12288", **settings)
    assert few.returncode == 0 and "more live sessions than --max-num-seqs 8 may fall behind" in few.stderr
    # What it knows nothing of it leaves to vLLM.
    assert launch("-q", "torchao", smi="0, GPU-1, 8000, 8192", **settings).stderr == ""
    assert launch(smi="0, GPU-1, [N/A], [N/A]", **settings).stderr == ""


GPUS = "0, GPU-8932f937-d72c, 4000, 12288\n1, GPU-89ab0000-0001, 6000, 12288"


@pytest.mark.parametrize("name, index", [("1,0", "1,0"), ("GPU-89ab0000-0001", "1"), ("GPU-893", "0"), (None, "")])
def test_gpu_by_index_and_by_name(launch, tmp_path, name, index):
    """vLLM gets indices. Without a choice all GPUs stay visible: --data-parallel-size 2 takes two."""
    settings = os.environ | fake_gpu(tmp_path, GPUS) | ({"CUDA_VISIBLE_DEVICES": name} if name else {})
    if not name:
        del settings["CUDA_VISIBLE_DEVICES"]
    code = "import os; from launch import gpu; print(gpu.find(os.environ))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
    free = 6000 if index.startswith("1") else 4000
    assert result.stdout == f"Gpu(visible='{index}', free={free}, total=12288)\n", result.stderr


def test_gpu_that_cannot_be_used(launch, tmp_path):
    model = {"MODEL": str(CHECKPOINT), "GPU_MEMORY_UTILIZATION": "0.3"}
    for name in ("MIG-89ab0000", "2", "GPU-", "GPU-89ac", "fast", "0,"):
        refused(launch(smi=GPUS, **model, CUDA_VISIBLE_DEVICES=name), "CUDA_VISIBLE_DEVICES", name.strip(","), code=2)
    found = printed(launch(smi=GPUS, **model, CUDA_VISIBLE_DEVICES="GPU-893"))
    assert (found["device"], found["CUDA_VISIBLE_DEVICES"]) == ("gpu", "0")
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    settings = fake_gpu(tmp_path, words, code=9)
    refused(launch(**model | settings), words, "repair the driver")
    refused(launch(**model | settings | {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "0"}), words)


def test_gpu_that_is_too_old(launch, hub):
    """Before the download, and also if it is the second of two."""
    old = GPUS.replace("6000, 12288", "6000, 12288, 0, 7.5")
    refused(launch(smi=old, CUDA_VISIBLE_DEVICES="1,0"), "GPU 1 has compute capability 7.5", "needs 8.0", "RTX 30")
    assert not hub.sent
    assert launch(smi=old, MODEL=str(CHECKPOINT), GPU_MEMORY_UTILIZATION="0.3").returncode == 0


def test_gpu_with_vllm_for_the_cpu_and_the_other_way_round(launch, tmp_path):
    model = {"MODEL": str(CHECKPOINT)}
    result = launch(smi=GPUS, **model, PYTHONPATH="")
    refused(result, "nvidia-smi shows a GPU, but vLLM is installed for the CPU: run ./setup.sh")
    refused(launch(smi=GPUS, **model, CUDA_VISIBLE_DEVICES=""), "installed for one", "./setup.sh --cpu")
    found = printed(launch(smi=GPUS, **model, PYTHONPATH="", CUDA_VISIBLE_DEVICES=""))
    assert (found["device"], found.get("CUDA_VISIBLE_DEVICES")) == ("cpu", None)


def test_memory_is_what_cuda_counts(tmp_path):
    """vLLM takes its share of CUDA's total: on an H100, nvidia-smi's 81559 MiB without the 480 that are reserved."""
    settings = os.environ | fake_gpu(tmp_path, "0, GPU-1, 12000, 12288, 244, 8.6")
    code = "import os; from launch import gpu; print(gpu.find(os.environ).total)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert result.stdout == "12044\n", result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"sessions": "8", "executor": "", "MAX_NUM_BATCHED_TOKENS": "88", "QUANTIZATION": "bitsandbytes"}),
        ("--max-num-seqs 16", {"sessions": "16", "MAX_NUM_SEQS": "16", "MAX_NUM_BATCHED_TOKENS": "96"}),
        ("--data-parallel-size 2", {"sessions": "16", "executor": "uni"}),
        ("--max_model_len=8k -q mxfp4", {"MAX_MODEL_LEN": "8k", "QUANTIZATION": "mxfp4"}),
    ],
)
def test_command_line_leads_what_depends_on_it(launch, options, expected):
    assert printed(launch(*options.split(), MODEL=str(CHECKPOINT))).items() >= expected.items()


def test_values_are_safe_for_bash(launch, tmp_path):
    """serve.sh evaluates them: a quote, a space or a command in a value stays what it is."""
    model = tmp_path / "my model's $(touch hacked)"
    shutil.copytree(CHECKPOINT, model)
    script = (
        f'set -eu; eval {shlex.quote(launch(MODEL=str(model)).stdout)}; printf \'%s|\' "$model" "$SERVED_MODEL_NAME"'
    )
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (f"{model}|{model.name}|", "")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("options", "engines", "executor"),
    [
        ("", 1, ""),
        ("--data-parallel-size 1", 1, ""),
        ("--data_parallel_size=3", 3, "uni"),
        ("-dp 2 --api-server-count 4", 2, "uni"),
        ("--data-parallel-size 2 --distributed-executor-backend mp", 2, ""),
        ("--data-parallel-size 2 -tp 2", 2, ""),
        ("--pipeline_parallel_size=2 --data-parallel-size 2", 2, ""),
        ("--data-parallel-size two", 1, ""),  # vLLM refuses it
    ],
)
def test_workers_of_several_engines_run_in_their_engines(options, engines, executor):
    """So the speed patches stay on. Who chooses an executor, or more GPUs for an engine, gets that."""
    settings = Settings({"DATA_PARALLEL_SIZE": "9"}, options.split())
    assert (settings.engines, settings.executor) == (engines, executor)


@pytest.mark.parametrize(
    ("seqs", "cores", "options", "servers"),
    [
        ("8", 16, "", 1),
        ("224", 16, "", 3),
        ("288", 16, "", 4),
        ("224", 4, "", 1),  # the engine needs cores too
        ("224", 32, "-dp 2", 6),
        ("224", 16, "--api-server-count=1", 0),
    ],
)
def test_many_sessions_get_several_api_processes(seqs, cores, options, servers):
    assert Settings({"MAX_NUM_SEQS": seqs}, options.split()).api_servers(cores) == servers


def test_python_of_another_place():
    """vLLM's command is on the PATH, but python3 is one without its packages."""
    settings = {"MODEL": str(CHECKPOINT), "HOST": "127.0.0.1", "PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-m", "launch"]
    refused(subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60), "./setup.sh")


def test_key_and_open_network(launch):
    model = {"MODEL": str(CHECKPOINT)}
    assert "everyone on the network can use this server" in launch(**model, HOST="0.0.0.0").stderr
    assert launch(**model, HOST="0.0.0.0", VLLM_API_KEY="sesame").stderr == ""
    assert launch(**model, HOST="localhost").stderr == ""
    result = launch("--api-key", "sesame", **model)
    assert "VLLM_API_KEY" in result.stderr
    assert "sesame" not in result.stderr
    for key in ("sesame\r", "\ufeffsesame", "sésame", " sesame"):  # nobody could log in
        refused(launch(**model, VLLM_API_KEY=key), "VLLM_API_KEY: ", "remove it", code=2)
        refused(launch("--api-key", key, **model), "--api-key: ", "remove it", code=2)


def make_certificate(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [ROOT / "scripts/make-certificate", folder]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


def test_certificate(launch, tmp_path):
    """Made once, for every name and address of this machine; strict clients take it (as Python 3.13 is)."""
    result = make_certificate(tmp_path / "one")
    certificate, key, ca = (tmp_path / "one" / name for name in ("certificate.pem", "key.pem", "ca.pem"))
    assert {file.name for file in ca.parent.iterdir()} == {"certificate.pem", "key.pem", "ca.pem"}
    assert result.returncode == 0, result.stderr
    assert f"TLS_CERT={certificate} TLS_KEY={key}" in result.stdout
    assert "--cafile ca.pem" in result.stdout
    assert key.stat().st_mode & 0o777 == 0o600
    shown = subprocess.run(["openssl", "x509", "-in", certificate, "-noout", "-ext", "subjectAltName"],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    assert "DNS:localhost" in shown
    assert ".local" in shown
    assert "127.0.0.1" in shown
    assert all(address in shown for address in addresses if "." in address)
    again = make_certificate(tmp_path / "one")
    assert (again.returncode, again.stdout) == (1, "")
    assert "remove ca.pem, certificate.pem and key.pem" in again.stderr

    assert make_certificate(tmp_path / "two").returncode == 0
    model = {"MODEL": str(CHECKPOINT)}
    assert launch(**model, TLS_CERT=str(certificate), TLS_KEY=str(key)).stderr == ""
    refused(launch(**model, TLS_CERT=str(certificate)), "both TLS_CERT and TLS_KEY", code=2)
    refused(launch(**model, TLS_CERT=str(certificate), TLS_KEY="/no/key.pem"), "/no/key.pem", "make-certificate")
    other = str(tmp_path / "two/key.pem")
    refused(launch(**model, TLS_CERT=str(certificate), TLS_KEY=other), "the key belongs to another certificate")
    refused(launch(**model, TLS_CERT=other, TLS_KEY=other), "do not match")
    for name in ("localhost", "127.0.0.1", *addresses):
        assert strict_handshake(certificate, key, ca, name) == "", name
    assert "mismatch" in strict_handshake(certificate, key, ca, "bank.example")
    assert strict_handshake(certificate, key, certificate, "localhost") == ""  # what earlier commands of users name


def strict_handshake(certificate: Path, key: Path, ca: Path, name: str) -> str:
    """Why a client that trusts `ca` and checks everything that RFC 5280 demands takes no TLS connection to `name`."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)
    ours = ssl.create_default_context(cafile=ca)
    ours.verify_flags |= ssl.VERIFY_X509_STRICT
    a, b, c, d = (ssl.MemoryBIO() for _ in range(4))
    server = theirs.wrap_bio(a, b, server_side=True)
    client = ours.wrap_bio(c, d, server_hostname=name)
    for side in (client, server, client, server):
        try:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        a.write(d.read())
        c.write(b.read())
    return "" if client.getpeercert() else "no certificate"


STEAL = """#!/bin/sh
"$OPENSSL" "$@" || exit
while [ "$1" != -keyout ]; do shift; done
case $2 in */one/*) ;; *) cp "$2" "$STOLEN" ;; esac
"""


def test_certificate_is_worth_nothing_for_other_names(tmp_path):
    """Even to a thief of the authority's key, which is deleted: here openssl is replaced by one that steals it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/openssl").write_text(STEAL)
    (tmp_path / "bin/openssl").chmod(0o755)
    stolen = tmp_path / "stolen.pem"
    theirs = {"OPENSSL": shutil.which("openssl"), "STOLEN": str(stolen)}
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert make_certificate(tmp_path / "one", PATH=path, **theirs).returncode == 0
    ca, key, forged = tmp_path / "one/ca.pem", tmp_path / "one/key.pem", tmp_path / "forged.pem"
    extensions = "subjectAltName=DNS:{0} basicConstraints=critical,CA:FALSE authorityKeyIdentifier=keyid"

    def forge(name: str) -> str:
        added = [part for one in extensions.format(name).split() for part in ("-addext", one)]
        files = ["-key", key, "-CA", ca, "-CAkey", stolen, "-out", forged]
        subprocess.run(["openssl", "req", "-x509", "-subj", "/CN=x", *files, *added], check=True, capture_output=True)
        return strict_handshake(forged, key, ca, name)

    assert forge("localhost") == ""
    assert forge("bank.example") == "permitted subtree violation"
    # Nor does the server's own key sign anything: its certificate is no authority.
    leaf = ssl.create_default_context(cafile=tmp_path / "one/certificate.pem").get_ca_certs()
    assert len(leaf) == 1


@pytest.mark.slow
@pytest.mark.parametrize("manager", ["--user", "--system"])
def test_unit(tmp_path, manager):
    """systemd finds nothing wrong with the unit, wherever the clone lies."""
    unit = (ROOT / "deploy/voxtral.service").read_text()
    assert unit.count("%h/voxtral") >= 1
    (tmp_path / "voxtral.service").write_text(unit.replace("%h/voxtral", str(ROOT)))
    command = ["systemd-analyze", "verify", manager, "--man=no", tmp_path / "voxtral.service"]
    settings = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    result = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
