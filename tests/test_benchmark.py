"""benchmark.py: its arithmetic by a clock and a server that are scripted; once through against the real server."""

import asyncio
import contextlib
import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
from scripted import Scripted
from servers import CHECKPOINT, ROOT, free_port, run_script

from voxtral_client.session import Server
from voxtral_measure import benchmark
from voxtral_measure.figures import find_limit, holds, spread, summary
from voxtral_measure.streams import FRAME, Stream


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time passes only while it waits, and then at once."""

    def __init__(self):
        super().__init__()
        self.now, select = 0.0, self._selector.select

        def pass_time(timeout):
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = pass_time

    def time(self) -> float:
        return self.now


def run(server: Scripted, seconds: float = 20.0, hiccups: float = 0.0) -> tuple[Stream, dict]:
    """Stream to the scripted server; return the stream and the run's figures."""
    stream = Stream(1.0, 1.0 + seconds, offset=0, paced=True, give_up_after=60)

    async def scenario():
        loop = asyncio.get_running_loop()

        async def disturb():
            while True:
                await asyncio.sleep(0.079)
                loop.now += hiccups  # this process does something else

        disturbing = asyncio.create_task(disturb()) if hiccups else None
        await stream.run(server, "model", bytes(10 * FRAME))
        if disturbing:
            disturbing.cancel()

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(scenario())
    result = {
        "lags": stream.lags(server.delay),
        "late": stream.late,
        "frames": [len(stream.arrived)],
        "minutes": [stream.minutes()],
        "last": max(stream.arrived.values()),
        "outcomes": [stream.outcome],
        "cpu": 0.1,
        "seconds": seconds,
    }
    return stream, summary([result], 1, 1.0, 1.0 + seconds)


@pytest.mark.parametrize("delay_tokens", [1, 6, 12, 30])
def test_lag_counts_from_the_message_that_completed_the_frame(delay_tokens):
    """A server that needs 50 ms for every frame has a lag of 50 ms, whatever the model's delay."""
    stream, figures = run(Scripted(lambda k: 0.05, delay_tokens))
    assert figures["lag_ms"] == pytest.approx({"p50": 50, "p95": 50, "p99": 50, "max": 50})
    assert figures["last_quarter_ms"] == pytest.approx(figures["lag_ms"])
    assert len(stream.lags(delay_tokens)) == 250 - (delay_tokens + 1)
    assert len(stream.sent) == 250
    assert stream.sent[-1] == pytest.approx(21.0)
    assert not figures["client"]["is_limit"]


def test_drift_shows_in_the_last_quarter():
    """A server that needs 81 ms for a frame of 80 falls behind by 1 ms in every frame."""
    _, figures = run(Scripted(lambda k: 0.010 + 0.001 * k), seconds=40.0)
    assert figures["lag_ms"]["p50"] == pytest.approx(10 + 246, abs=2)
    assert figures["lag_ms"]["max"] == pytest.approx(10 + 492, abs=2)
    assert figures["last_quarter_ms"]["p50"] == pytest.approx(10 + 430, abs=2)
    assert holds(figures, max_lag=520)
    assert not holds(figures, max_lag=400)


def test_milliseconds_of_a_frame_by_minute():
    """A server that becomes slower by 0.1 ms in every frame needs 80.1 ms for each; the third minute is not full."""
    stream, figures = run(Scripted(lambda k: 0.0001 * k), seconds=150.0)
    assert stream.minutes() == pytest.approx([80.1, 80.1])
    assert figures["ms_per_frame"] == []  # of paced streams it says nothing
    result = {"lags": [], "late": [], "frames": [1], "last": 1.0, "outcomes": [""], "cpu": 0.1, "seconds": 1.0}
    several = [result | {"minutes": [[1.0, 2.0]]}, result | {"minutes": [[3.0, 6.0], [5.0, 7.0, 9.0]]}]
    assert summary(several, 3, 0, 1, paced=False)["ms_per_frame"] == [3.0, 5.0]


def test_frames_that_never_come_are_not_left_out():
    stream, figures = run(Scripted(lambda k: 0.01 if k < 100 else 3600.0), seconds=20.0)
    assert len(stream.lags(6)) == 243
    assert stream.outcome == ""
    assert figures["last_quarter_ms"]["p50"] > 10_000


def test_a_stream_that_breaks_is_counted():
    _, figures = run(Scripted(lambda k: 0.01, fault=100))
    assert figures["broken"] == {"connection lost (no closing message)": 1}
    assert figures["lag_ms"]["max"] == pytest.approx(10)
    assert not holds(figures, max_lag=1000)


def test_a_server_that_does_not_read_is_not_the_clients_fault():
    """It stops taking messages for a second: that is its lag."""
    stream, figures = run(Scripted(lambda k: 0.01, block=lambda message: 1.0 if message == 100 else 0.0))
    assert max(stream.late) == pytest.approx(0)
    assert figures["lag_ms"]["max"] > 900
    assert not figures["client"]["is_limit"]


def test_a_client_that_is_too_slow_says_so():
    _, figures = run(Scripted(lambda k: 0.01), hiccups=0.06)
    assert figures["client"]["late_p95_ms"] > 20
    assert figures["client"]["is_limit"]
    busy = {"lags": [], "late": [], "frames": [10], "last": 1.0, "outcomes": [""], "cpu": 0.9, "seconds": 1.0}
    assert summary([busy], 1, 0, 1)["client"]["is_limit"]


def test_percentiles():
    assert spread([0.001 * n for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert spread([]) is None


@pytest.mark.parametrize("truth", [0, 1, 2, 3, 5, 8, 16, 23, 44, 100, 1000])
@pytest.mark.parametrize("start", [1, 8])
def test_search(truth, start):
    """Exact up to 16, within a sixteenth above; never asked twice."""
    asked = []

    async def measure(streams: int) -> bool:
        asked.append(streams)
        return streams <= truth

    found = asyncio.run(find_limit(measure, start))
    assert truth - max(0, truth // 16) <= found <= truth
    assert len(set(asked)) == len(asked) <= 2 * math.log2(truth + 2) + 4


def test_end_to_end(server):
    """With a path relative to the folder where the user is."""
    options = ["--url", server.url, "--streams", "1,2", "--duration", 4]
    result = run_script("benchmark.py", "sample.wav", *options, cwd=CHECKPOINT)
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.splitlines()
    found = json.loads(last)
    assert found["delay_ms"] == 480
    assert [run["streams"] for run in found["runs"]] == [1, 2]
    assert [line.split()[0] for line in table[-2:]] == ["1", "2"]
    for run in found["runs"]:
        assert run["frames"] >= 40 * run["streams"]
        lag = run["lag_ms"]
        assert 0 < lag["p50"] <= lag["p95"] <= lag["p99"] <= lag["max"]
        assert run["client"]["cpu_ms_per_stream_second"] > 0


def test_throughput(server):
    result = run_script("benchmark.py", "--unpaced", "--url", server.url, "--streams", 2, "--duration", 10)
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout.splitlines()[-1])["runs"][0]
    assert run["times_real_time"] > 0
    assert run["frames"] >= 2 * 10 / 0.08
    assert run["lag_ms"] is None


def test_report_of_a_running_server(server, tmp_path):
    """What a stranger pastes: machine, versions, all figures, what four sessions cannot hold, the word error rate."""
    for kind in ("wav", "txt"):
        (tmp_path / f"talk.{kind}").write_bytes((CHECKPOINT / f"sample.{kind}").read_bytes())
    result = run_script("scripts/report", "--url", server.url, "--duration", "4", "--corpus", tmp_path)
    assert result.returncode == 0, result.stderr
    table, _, rest = result.stdout.partition("<details>")
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE))
    assert rows["card"] == "none" and rows["start"] == "it was running" and "cores" in rows["processor"]
    assert "vllm" in rows["versions"] and float(rows["a 60 s file, × real time"]) > 0
    for number in (1, 2):
        assert rows[f"4 live streams, lag p50 / p99 / max, run {number}"].endswith(" ms")
        assert "4 streams refused" in rows[f"8 live streams, lag p50 / p99 / max, run {number}"]
    assert rows["word error rate"].startswith("0.00 % of ")
    report = json.loads(rest.partition("```json\n")[2].partition("\n```")[0])
    assert [run["streams"] for run in report["figures"]["unpaced"]] == [1, 8]
    assert report["machine"]["processor"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["--url", "nonsense"], 1, "not a server address"), (["--duration", "long"], 2, "--duration")],
)
def test_report_refuses_before_it_starts_anything(arguments, code, said):
    """Also when it is run as it stands in the documents: by the system's Python, which has not its packages."""
    result = subprocess.run([ROOT / "scripts" / "report", *arguments], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (code, "")
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_full_server_ends_the_search(server):
    """The server has four sessions: the search says so, and does not take it for slowness."""
    options = ["--streams", 4, "--duration", 4, "--max-lag", 10**6]
    result = run_script("benchmark.py", "--url", server.url, "--find-limit", *options)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["limit"], found["limited_by"]) == (4, "MAX_NUM_SEQS")
    assert "it took 4 of 8 streams" in result.stderr


def test_full_server_is_named(server):
    """Other clients have all sessions."""

    async def occupied() -> subprocess.CompletedProcess:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                session = await stack.enter_async_context(Server(server.url).session("tiny"))
                await session.send(bytes(32_000))
                await session.receive()
            return await asyncio.to_thread(run_script, "benchmark.py", "--url", server.url)

    result = asyncio.run(occupied())
    assert result.returncode == 1
    assert result.stderr.startswith("error: all sessions of the server are taken")
    assert "MAX_NUM_SEQS" in result.stderr
    assert result.stderr.count("\n") == 1


def test_interrupt_leaves_nothing_behind(server):
    command = [sys.executable, ROOT / "benchmark.py", "--url", server.url, "--streams", "2", "--duration", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (workers := children(process.pid)):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == "stopped\n"
    assert subprocess.run(["ps", "-p", ",".join(workers)], capture_output=True).returncode == 1


def children(pid: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--streams", "0"], "must be 1 or more"),
        (["--streams", "many"], "invalid"),
        (["--max-lag", "50"], "--find-limit"),
        (["--unpaced", "--find-limit"], "--unpaced measures throughput"),
        (["--find-limit", "--streams", "1,2"], "one number"),
        (["--duration", "1"], "4 seconds or more"),
    ],
)
def test_wrong_usage(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_work_is_said_in_one_line(server, capsys):
    """No server, no such file, a duration beyond the server's sessions."""
    for arguments, said in (
        (["--url", f"ws://127.0.0.1:{free_port()}"], "start ./serve.sh"),
        (["nothing.wav"], "no such file"),
        (["--url", server.url, "--duration", "100"], "MAX_MODEL_LEN"),
    ):
        assert benchmark.main(arguments) == 1
        assert said in (line := capsys.readouterr().err)
        assert line.count("\n") == 1
