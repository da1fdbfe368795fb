"""Faults on the way between client and server: the transcript must come out as if there had been none.

The server is the real one. `proxy.Proxy` stands between and does what networks do; for the server's own
death the process is killed.
"""

import asyncio
import base64
import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
import websockets
from proxy import Proxy
from servers import CHECKPOINT, ROOT
from speech import talk, write

from voxtral_client import transcriber
from voxtral_client.audio import stream
from voxtral_client.media import AudioFile
from voxtral_client.session import Done, Server, SessionLost
from voxtral_client.timeline import Timeline, Word
from voxtral_client.transcriber import GaveUp, Transcriber

SAMPLE = CHECKPOINT / "sample.wav"


class Observed(Transcriber):
    """A transcriber that remembers what it told its user. `limits`: in place of what it computes by itself."""

    def __init__(self, url: str, key: str | None = None, give_up_after: float = 120, **limits: float):
        self.told: list[tuple[str, str]] = []
        self._limits = {f"_{name}": value for name, value in limits.items()}
        super().__init__(Server(url, key), notify=self._remember, give_up_after=give_up_after)

    def _remember(self, state: str, text: str) -> None:
        self.told.append((state, text))

    async def open(self) -> None:
        await super().open()
        vars(self).update(self._limits)

    async def transcribe(self, path, realtime=False) -> list[Word]:
        await self.open()
        return [word async for word in self.words(stream(AudioFile(path).blocks(), realtime))]

    def said(self, text: str) -> bool:
        return any(text in message for _, message in self.told)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Talk with pauses."""
    samples, _ = talk(40, seed=5)
    return write(tmp_path_factory.mktemp("audio") / "talk.wav", samples)


@pytest.fixture(scope="module")
def undisturbed(server, recording):
    """What the server makes of the recording in a single session."""
    transcriber = Observed(server.url, rollover_after=1e6)
    words = asyncio.run(transcriber.transcribe(recording))
    assert transcriber.session == 1
    assert len(words) > 25
    return words


def assert_same(got: list[Word], wanted: list[Word]) -> None:
    """Word for word the same text, and times that differ by two frames at most."""
    assert "".join(word.text for word in got) == "".join(word.text for word in wanted)
    for a, b in zip(got, wanted, strict=True):
        assert abs(a.start - b.start) <= 0.161, (a, b)
        assert abs(a.end - b.end) <= 0.161, (a, b)


async def through(server, recording, faults, **options) -> tuple[list[Word], Observed, Proxy]:
    async with Proxy(server.port, faults) as proxy:
        transcriber = Observed(proxy.url, **options)
        return await transcriber.transcribe(recording), transcriber, proxy


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([(203, "reset")], id="reset"),
        pytest.param([(331, "stall")], id="half-open"),
        pytest.param([(140, "close")], id="1011"),
        pytest.param([(97, "reset"), (171, "close"), (60, "reset")], id="three-in-a-row"),
        pytest.param([(1, "reset"), (2, "reset"), (300, "reset")], id="at-the-start"),
    ],
)
def test_connection_lost(server, recording, undisturbed, faults, monkeypatch):
    monkeypatch.setattr(transcriber, "STALL_SECONDS", 5 if "stall" in str(faults) else 60)
    words, client, proxy = asyncio.run(through(server, recording, faults))
    assert proxy.struck == [fault for _, fault in faults]
    assert client.said("trying again")
    assert_same(words, undisturbed)


def test_lost_while_the_last_words_come(server, recording, undisturbed):
    """The connection breaks after the last audio has been sent, before `done`."""
    frames = int(AudioFile(recording).seconds / 0.08) + 4
    words, _, proxy = asyncio.run(through(server, recording, [(frames, "reset")], rollover_after=1e6))
    assert proxy.struck == ["reset"]
    assert_same(words, undisturbed)


def test_server_killed_and_restarted(server, recording, undisturbed):
    """kill -9 in the middle of a word, of the process that has the port; its engine ends too. Then a new one starts."""

    async def scenario() -> list[Word]:
        transcriber = Observed(server.url, give_up_after=600)
        await transcriber.open()
        words, killed = [], False
        async for word in transcriber.words(stream(AudioFile(recording).blocks())):
            words.append(word)
            if not killed and word.end > 20:
                server.process.kill()
                server.process.wait()
                server.start()
                killed = True
        assert transcriber.said("connection lost")
        assert transcriber.said("no server answers")
        return words

    assert_same(asyncio.run(scenario()), undisturbed)


def test_rollover_at_pauses(server, recording, undisturbed):
    transcriber = Observed(server.url, rollover_after=8)
    words = asyncio.run(transcriber.transcribe(recording))
    assert transcriber.session >= 4
    assert_same(words, undisturbed)


def test_limit_of_the_server_reached_five_times(brief, tmp_path):
    """The server ends a session at its limit with an ordinary `done`; a client that does not look ahead resumes."""
    samples, spoken = talk(17 * 5 + 20, seed=6)
    path = write(tmp_path / "long.wav", samples)
    blind = Observed(brief.url, "sesame", rollover_after=1e6, session_limit=1e6)
    rolling = Observed(brief.url, "sesame")

    async def both() -> tuple[list[Word], list[Word]]:
        return await asyncio.gather(blind.transcribe(path), rolling.transcribe(path))

    at_limit, at_pauses = asyncio.run(both())
    assert blind.session >= 6
    assert rolling.session >= 6
    assert_same(at_limit, at_pauses)
    right = [text for text, _, _ in spoken]
    assert sum(a.text.strip() == b for a, b in zip(at_pauses, right, strict=True)) >= 0.95 * len(right)


def test_all_slots_taken(server, recording, undisturbed):
    """The client says that it waits, and goes on when a session ends."""

    async def scenario() -> tuple[list[Word], Observed]:
        name = (await Server(server.url).models())[0]["id"]
        occupied, taken = asyncio.Event(), asyncio.Semaphore(0)

        async def occupy() -> None:
            async with Server(server.url).session(name) as session:
                await session.send(bytes(2 * 16000))
                await session.receive()
                taken.release()
                await occupied.wait()

        others = [asyncio.create_task(occupy()) for _ in range(4)]
        for _ in others:
            await taken.acquire()
        transcriber = Observed(server.url, give_up_after=2)
        running = asyncio.create_task(transcriber.transcribe(recording))
        while not transcriber.said("waiting for a free one"):
            assert not running.done()
            await asyncio.sleep(0.1)
        await asyncio.sleep(3)  # longer than it would wait for a server that is not there
        occupied.set()
        await asyncio.gather(*others)
        return await running, transcriber

    words, _ = asyncio.run(scenario())
    assert_same(words, undisturbed)


def test_clients_without_sense_fill_no_log(server):
    """A line for a message that cannot be read, none for a client that leaves while it is answered."""
    begun = server.log.stat().st_size
    audio = json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(bytes(64000)).decode()})
    start = [json.dumps({"type": "session.update", "model": "tiny"}), '{"type": "input_audio_buffer.commit"}']

    async def leave(*messages: str | bytes) -> None:
        async with websockets.connect(server.url) as socket:
            for message in messages:
                await socket.send(message)
            await asyncio.sleep(0.1)
            socket.transport.abort()

    async def run() -> None:
        for _ in range(5):
            await leave(*["null", '{"type": "input_audio_buffer.append", "audio": 3}'] * 20)
            await leave(b"binary")
            await leave(*start, *[audio] * 10)

    asyncio.run(run())
    log = server.log.read_bytes()[begun:].decode(errors="replace")
    assert "Error handling event" in log
    assert "Traceback" not in log


def test_memory_for_sessions_runs_out(brief):
    """More sessions than the KV cache holds: some end with an error and go on, none is lost or silent."""
    begun = brief.log.stat().st_size
    command = [sys.executable, ROOT / "test_file_transcribe.py", SAMPLE, "--url", brief.url, "--api-key", "sesame"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    clients = [subprocess.Popen([*command, "--parallel", "1"], **pipes) for _ in range(6)]
    ends = [client.communicate(timeout=400) for client in clients]
    assert [client.returncode for client in clients] == [0] * 6, ends
    assert all(out.split() == SAMPLE.with_suffix(".txt").read_text().split() for out, _ in ends)
    log = brief.log.read_bytes()[begun:].decode(errors="replace")
    assert "memory for sessions is full" in log
    assert "Traceback" not in log
    assert brief.healthy()


def test_sessions_that_were_ended_leave_nothing_behind(brief):
    """Frames that were on their way when the memory was full: no slot and no block is theirs."""

    async def session(seconds: int) -> bool:
        """Does the server answer to the end?"""
        with contextlib.suppress(SessionLost):
            async with Server(brief.url, "sesame").session("tiny") as session:
                await session.send(SAMPLE.read_bytes()[44:][: 32000 * seconds])
                await session.finish()
                while not isinstance(await session.receive(), Done):
                    pass
                return True
        return False

    async def together(number: int, seconds: int) -> list[bool]:
        async with asyncio.timeout(120):
            return await asyncio.gather(*(session(seconds) for _ in range(number)))

    for _ in range(3):
        assert not all(asyncio.run(together(8, 14)))
    assert all(asyncio.run(together(3, 1)))
    assert counted(brief, "num_requests_waiting") == counted(brief, "num_requests_running") == 0


def counted(server, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as reply:
        return float(re.search(rf"^vllm:{name}{{.*}} (\S+)$", reply.read().decode(), re.M)[1])


def test_gives_up_with_what_is_settled(server, recording, undisturbed):
    async def scenario() -> None:
        async with Proxy(server.port, [(300, "reset")]) as proxy:
            transcriber = Observed(proxy.url, give_up_after=3)
            await transcriber.open()
            words, started = [], time.monotonic()
            with pytest.raises(GaveUp, match="gave up after 3 s"):
                async for word in transcriber.words(stream(AudioFile(recording).blocks())):
                    words.append(word)
                    proxy.refusing = True
            assert time.monotonic() - started < 60
            assert 10 < len(words) < len(undisturbed)
            assert_same(words, undisturbed[: len(words)])

    asyncio.run(scenario())


def test_speech_that_the_model_does_not_answer_is_asked_again(server, recording, undisturbed, monkeypatch):
    """vllm#47614: blanks over speech. Here the proxy blanks the deltas of the first session."""
    monkeypatch.setattr(transcriber, "BLANKS_SECONDS", 6)
    add_delta = Timeline.add_delta

    def stuck(timeline: Timeline, text: str) -> None:
        add_delta(timeline, "" if timeline.session == 1 and timeline.transcribed > 10 * 16000 else text)

    monkeypatch.setattr(Timeline, "add_delta", stuck)
    client = Observed(server.url)
    words = asyncio.run(client.transcribe(recording))
    assert client.said("asking a new session")
    assert_same(words, undisturbed)
