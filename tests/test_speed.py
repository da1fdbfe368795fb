"""The speed patches: the same text with and without them, what a session costs, what happens without memory."""

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import psutil
import pytest
from realtime import MISTRAL, OPENAI, opened
from servers import CHECKPOINT, ROOT, ServerProcess, run_script

from voxtral_client.session import Server

voxtral_speed = importlib.import_module("voxtral_speed")
frames = importlib.import_module("voxtral_speed.frames")

SAMPLE = CHECKPOINT / "sample.wav"
TEXT = (CHECKPOINT / "sample.txt").read_text().split()
PCM = 6 * SAMPLE.read_bytes()[44:]  # 85 s
ON_A_CPU = [name for name in voxtral_speed.SCHEDULER + voxtral_speed.WORKER if name not in ("rows", "feedback")]


def words(server: ServerProcess, audio: Path = SAMPLE, *options: str) -> subprocess.CompletedProcess:
    return run_script("test_file_transcribe.py", audio, "--url", server.url, "--parallel", "1", *options)


async def by_server(server: ServerProcess, dialect: str) -> list[str]:
    """The words that the server makes of the sample."""
    async with opened(server, dialect) as socket:
        await socket.configure()
        return (await socket.end(PCM[: len(PCM) // 6]))["text"].split()


def test_all_patches_are_on(server):
    """On the pinned vLLM each finds what it was written for, and the sessions of the warm-up went through."""
    log = server.log.read_text(errors="replace")
    if not log:
        pytest.skip("the server was started by somebody else")
    assert "Speed patches: " + ", ".join(ON_A_CPU) in log
    assert "speed patch" not in log
    assert "Warmed up by 5 sessions" in log
    assert words(server).stdout.split() == TEXT


@pytest.mark.slow
def test_other_processes_than_usual(tmp_path):
    """Two API processes and a worker of its own: a patch that is off there is off in all, and nothing else is told."""
    options = ("--api-server-count", "2", "--distributed-executor-backend", "mp")
    server = ServerProcess(tmp_path / "log", *options, MAX_MODEL_LEN="256", MAX_NUM_SEQS="2")
    try:
        server.start().wait()  # for one of the processes
        while len(re.findall("Warmed up by|warm-up failed", log := server.log.read_text(errors="replace"))) < 2:
            assert server.healthy()
            time.sleep(0.2)
        assert "the worker runs in its own process" in log
        assert (log.count("Warmed up by"), "warm-up failed" in log) == (2, False)
        assert set(re.findall(r"speed patch (\S+) is off", log)) == {"features"}
        (model,) = asyncio.run(Server(server.url).models())
        assert (model["voxtral_speed"], model["max_sessions"]) == (None, 2)
        assert words(server).stdout.split() == TEXT
        for dialect in (OPENAI, MISTRAL) * 2:  # in which process is chance
            assert asyncio.run(by_server(server, dialect)) == TEXT
            url = f"http://127.0.0.1:{server.port}/v1/audio/transcriptions"
            assert httpx2.post(url, files={"file": SAMPLE.read_bytes()}, timeout=60).json()["text"].split() == TEXT
    finally:
        server.kill()


def test_fast_sessions_are_told(server, stock):
    (fast,), (slow,) = (asyncio.run(Server(s.url, "secret").models()) for s in (server, stock))
    assert (fast["voxtral_speed"], slow["voxtral_speed"]) == (True, None)
    assert fast["max_sessions"] == slow["max_sessions"] == 4


def test_without_patches_the_text_is_the_same(stock):
    assert words(stock, SAMPLE, "--api-key", "secret").stdout.split() == TEXT
    assert "Speed patches" not in stock.log.read_text(errors="replace")


def processes(server: ServerProcess) -> tuple[psutil.Process, psutil.Process]:
    """The process that speaks with the clients, and the engine's."""
    listening = (c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == server.port)
    front = psutil.Process(next(listening))
    (engine,) = (child for child in front.children() if "EngineCore" in " ".join(child.cmdline()))
    return front, engine


def test_the_engine_is_a_fork(server, stock):
    """It imports nothing again; multiprocessing has a process for what it starts otherwise."""
    tracked = [
        sum("multiprocessing" in " ".join(child.cmdline()) for child in processes(each)[0].children())
        for each in (server, stock)
    ]
    assert tracked == [0, 1]


@pytest.mark.slow
def test_a_fork_computes_with_several_threads():
    """GNU's OpenMP waits forever in a fork, if the first process has used several threads."""
    code = """
        import torch
        from voxtral_speed import fork
        before = torch.get_num_threads()
        fork.apply_to_start()
        work = lambda: torch.ones(3000, 3000).exp().sum().item() and print(before, torch.get_num_threads())
        work()
        process = fork.Context().Process(target=work)
        process.start()
        process.join(60)
        process.kill()
    """
    settings = {"PYTHONPATH": str(ROOT / "vllm_plugin"), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["2", "1", "2", "2"], done.stderr[-3000:]


def collections(server: ServerProcess) -> int:
    """How often Python has looked for garbage in the server's first process: once for 700 new objects that stay."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as reply:
        found = re.findall(r"^python_gc_collections_total\S* (\S+)$", reply.read().decode(), re.M)
    assert len(found) == 3
    return round(sum(map(float, found)))


async def unpaced(server: ServerProcess, frames: int, *marks: int) -> list[int]:
    """One session of so many frames, some seconds in advance; returns the collections at these frames."""
    seen, sent = [], 0
    async with Server(server.url).session("tiny") as session:
        for frame in range(frames):
            while sent < frame + 48:
                await session.send(PCM[sent * 2560 :][: 5 * 2560])
                sent += 5
            assert isinstance(await session.receive(), str)
            if frame in marks:
                seen.append(await asyncio.to_thread(collections, server))
    return seen


def test_a_long_session_and_many_of_them_leave_nothing_behind(server):
    """A frame late in a session makes as many objects as one early in it; after many sessions memory is as before.

    The sound of 3600 frames as vLLM holds it, 2160 float32 each, is 31 MB.
    """
    first, middle, last = asyncio.run(unpaced(server, 700, 99, 399, 699))
    assert abs((last - middle) - (middle - first)) <= 2

    async def many() -> None:
        await asyncio.gather(*(unpaced(server, 450) for _ in range(4)))

    asyncio.run(many())
    before = [process.memory_info().rss for process in processes(server)]
    for _ in range(2):
        asyncio.run(many())
    grown = [process.memory_info().rss - rss for process, rss in zip(processes(server), before, strict=True)]
    assert max(grown) < 20 * 2**20, grown


def test_names_of_patches():
    everything = list(voxtral_speed.PATCHES)
    assert voxtral_speed.enabled("") == voxtral_speed.enabled("1") == everything
    assert voxtral_speed.enabled("0") == []
    assert voxtral_speed.enabled("-rows") == [name for name in everything if name != "rows"]
    with pytest.raises(ValueError, match="no patch raws; there are"):
        voxtral_speed.enabled("-raws")


def test_another_source_is_noticed():
    here = f"{__name__}:words"
    voxtral_speed.expect(here, voxtral_speed.source_digest(here))
    for name in (here, "no_such_module:words", f"{__name__}:no_such_words"):
        with pytest.raises(voxtral_speed.Unexpected, match="words has another source"):
            voxtral_speed.expect(name, "0123456789ab")


@pytest.mark.slow
def test_spent_frames_keep_their_place():
    """vLLM finds frames by bisection over their positions; spent ones are one small number each."""
    from vllm.multimodal.utils import get_mm_features_in_window

    first = SimpleNamespace(mm_position=SimpleNamespace(offset=0, length=39))
    session = frames.Frames([first, *map(frames.Spent, range(39, 2039))])
    assert get_mm_features_in_window(session, 1000, 1001) == (962, 963)
    assert get_mm_features_in_window(session, 10, 40) == (0, 2)
    assert session[5].data is None and sys.getsizeof(session[5]) < 64


def test_tokens_in_advance():
    """The second frame waits for the first token; then some frames may be sent before their tokens come."""
    ahead = importlib.import_module("voxtral_speed.ahead")

    async def run() -> None:
        queue: asyncio.Queue[list[int]] = asyncio.Queue()
        credit = ahead.Credit(queue)
        first = asyncio.ensure_future(credit.get())
        await asyncio.sleep(0)
        assert not first.done()
        queue.put_nowait([7])
        assert await first == [ahead.ANY]
        for _ in range(ahead.AHEAD - 1):
            await asyncio.wait_for(credit.get(), 1)
        blocked = asyncio.ensure_future(credit.get())
        await asyncio.sleep(0)
        assert not blocked.done()
        queue.put_nowait([8])
        await asyncio.wait_for(blocked, 1)

    asyncio.run(run())


@pytest.mark.slow
def test_the_next_frame_does_not_wait_for_the_token():
    """vLLM's async scheduler, as on a GPU: the same tokens, also after an end of text, in steps that overlap."""

    command = [sys.executable, Path(__file__).parent / "feedback.py", CHECKPOINT]
    settings = {"PYTHONPATH": str(ROOT / "vllm_plugin"), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    off, on = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert on["texts"] == off["texts"] and on["left"] == 0
    assert {len(text) for text in on["texts"].values()} == {70}
    assert on["overlapped"] > 2 * off["overlapped"]


def test_step_of_single_frames_is_known():
    """Audio comes in the batch's order, and only where each request of the step is one new frame."""
    encode = importlib.import_module("voxtral_speed.encode")

    def feature(number: int, length: int = 2160):
        return SimpleNamespace(data={"audio_arrays": SimpleNamespace(data=np.full(length, number))})

    features = {"a": [feature(0), feature(1)], "b": [feature(2)], "c": [feature(3, 51_000)]}
    batch = SimpleNamespace(req_ids=["b", "a"], num_tokens=2)
    assert [frame[0] for frame in encode.single_frames(features, {"a": [1], "b": [0]}, batch)] == [2, 1]
    assert encode.single_frames(features, {"a": [1]}, batch) is None
    assert encode.single_frames(features, {"a": [0, 1], "b": [0]}, batch) is None
    longer = SimpleNamespace(req_ids=["b", "c"], num_tokens=2)
    assert encode.single_frames(features, {"b": [0], "c": [0]}, longer) is None
    chunk = SimpleNamespace(req_ids=["b", "a"], num_tokens=40)
    assert encode.single_frames(features, {"a": [1], "b": [0]}, chunk) is None


@pytest.mark.slow
def test_frame_encoder_steps_aside(caplog):
    """Where its graphs cannot be captured; here there is no GPU at all."""
    encode = importlib.import_module("voxtral_speed.encode")
    audio = SimpleNamespace(frame_rate=12.5, streaming_look_back_ms=0, streaming_look_ahead_ms=0, sampling_rate=16000)
    model = SimpleNamespace(audio_config=audio, whisper_encoder=SimpleNamespace(dtype=None))
    runner = SimpleNamespace(get_model=lambda: model, max_num_reqs=2, device="cpu")
    assert encode.frame_encoder(runner) is None
    assert "frames are encoded without CUDA graphs: " in caplog.text


def test_sessions_keep_their_rows():
    """What the worker on a GPU is told of a session that goes on: one token, and blocks that are new."""
    rows = importlib.import_module("voxtral_speed.rows")
    staged: list[tuple] = []

    class Table:
        def __init__(self, name):
            self.name = name

        def stage_write(self, row, start, content):
            staged.append((self.name, row, start, list(content)))

        def stage_write_elem(self, row, value):
            staged.append((self.name, row, value))

    array = {name: np.zeros(4, np.int32) for name in ("max", "prompt", "prefill", "computed", "all")}
    states = SimpleNamespace(
        req_id_to_index={"a": 2},
        max_seq_len=array["max"],
        prompt_len=SimpleNamespace(np=array["prompt"]),
        prefill_len=SimpleNamespace(np=array["prefill"]),
        num_computed_prefill_tokens=array["computed"],
        num_computed_tokens_np=array["all"],
        total_len=Table("total"),
        num_computed_tokens=Table("computed"),
        all_token_ids=Table("tokens"),
    )
    array["prefill"][2] = 64
    counts = np.array([[0, 0, 1, 0], [0, 0, 4, 0]], np.int32)
    tables = SimpleNamespace(num_blocks=SimpleNamespace(np=counts), block_tables=[Table("decoder"), Table("encoder")])
    cache = SimpleNamespace(mm_features={})
    runner = SimpleNamespace(req_states=states, block_tables=tables, encoder_cache=cache)
    request = SimpleNamespace(
        req_id="a",
        mm_features=frames.Frames(),
        num_computed_tokens=64,
        prompt_len=65,
        prefill_token_ids=list(range(65)),
        block_ids=([9], [1, 2, 3, 4, 5]),
        sampling_params=SimpleNamespace(max_tokens=1),
    )
    assert rows.goes_on(runner, request)
    rows.continue_sessions(runner, [request])
    assert staged == [("total", 2, 65), ("computed", 2, 64), ("tokens", 2, 64, [64]), ("encoder", 2, 4, [5])]
    assert counts[:, 2].tolist() == [1, 5] and array["prefill"][2] == 65 and array["max"][2] == 66
    request.num_computed_tokens = 70  # tokens that the row never saw
    assert not rows.goes_on(runner, request)
    array["all"][2] = 69  # the last step has computed this token and sampled the next
    assert rows.goes_on(runner, request)
    request.req_id = "b"
    assert not rows.goes_on(runner, request)
