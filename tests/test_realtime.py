"""OpenAI's and Mistral's realtime protocols, as the server speaks them: vllm_plugin/voxtral_realtime."""

import asyncio
import contextlib
import io
import json
import os
import re
import ssl
import urllib.request
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
import soxr
import websockets
from realtime import DONE, MISTRAL, OPENAI, opened
from servers import CHECKPOINT
from speech import say, talk
from voxtral_realtime.audio import Intake

from voxtral_client.audio import to_pcm16
from voxtral_client.session import Server

SAMPLE, _ = soundfile.read(CHECKPOINT / "sample.wav", dtype="float32")
TEXT = (CHECKPOINT / "sample.txt").read_text().strip()
BOTH = pytest.mark.parametrize("dialect", [OPENAI, MISTRAL], ids=["openai", "mistral"])
SECOND = 32_000  # bytes of PCM16 at 16 kHz


def noisy(samples: np.ndarray) -> bytes:
    return to_pcm16(samples + np.random.default_rng(0).normal(0, 1e-4, samples.shape))


def words_of(events: list[dict]) -> list[dict]:
    return [word for event in events if event["type"] in DONE.values() for word in event["words"]]


def assert_spoken(words: list[dict], spoken: list[tuple[str, float, float]], offset: float = 0.0) -> None:
    """All words, once and in order, with times to 0.2 s."""
    assert [word["word"] for word in words] == [text for text, _, _ in spoken]
    for word, (_, start, end) in zip(words, spoken, strict=True):
        assert abs(word["start"] - start - offset) < 0.2 and abs(word["end"] - end - offset) < 0.2, (word, start, end)


def running(server: object) -> float:
    """How many sessions the engine has."""
    scheme, trusting = ("https", ssl._create_unverified_context()) if server.tls else ("http", None)
    with urllib.request.urlopen(f"{scheme}://127.0.0.1:{server.port}/metrics", context=trusting) as reply:
        return sum(
            map(float, re.findall(r"^vllm:num_requests_(?:running|waiting){.*} (.*)$", reply.read().decode(), re.M))
        )


async def nothing_left(server: object) -> None:
    """No session, and nothing that Python found when it collected garbage."""
    async with asyncio.timeout(30):
        while running(server):
            await asyncio.sleep(0.2)
    log = server.log.read_text(errors="replace") if server.log.exists() else ""
    assert not re.findall("never retrieved|destroyed but it is pending|already running", log)


# --- audio ---


def test_g711_is_what_libsndfile_reads():
    for encoding, subtype in (("pcm_mulaw", "ULAW"), ("pcm_alaw", "ALAW")):
        file = io.BytesIO(bytes(range(256)))
        right, _ = soundfile.read(file, dtype="int16", channels=1, samplerate=8000, subtype=subtype, format="RAW")
        assert np.array_equal(np.frombuffer(Intake(encoding, 16_000).decode(bytes(range(256)))[1], "<i2"), right)


@pytest.mark.parametrize("rate", [8000, 24_000, 44_100])
def test_resampling_has_no_seams(rate):
    """In pieces of any size as at once, and not a sample more or less."""
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate)).astype("<i2")
    intake, got = Intake("pcm_s16le", rate), b""
    for piece in np.array_split(tone, 97):
        got += intake.decode(piece.tobytes())[1]
    got = np.frombuffer(got + intake.finish(), "<i2").astype(float)
    right = 8000 * np.sin(2 * np.pi * 440 * np.arange(len(got)) / 16_000)
    assert len(got) == 48_000
    assert abs(got - right)[200:-200].max() < 20


@BOTH
@pytest.mark.parametrize("rate, kind", [(24_000, ""), (16_000, ""), (8000, ""), (8000, "u"), (8000, "a")])
def test_sample(server, dialect, rate, kind):
    samples = soxr.resample(SAMPLE, 16_000, rate) if rate != 16_000 else SAMPLE
    data = to_pcm16(samples)
    if kind:
        file = io.BytesIO()
        soundfile.write(file, samples, rate, subtype={"u": "ULAW", "a": "ALAW"}[kind], format="RAW")
        data, kind = (
            file.getvalue(),
            {OPENAI: f"audio/pcm{kind}", MISTRAL: f"pcm_{'m' * (kind == 'u')}{kind}law"}[dialect],
        )

    async def scenario() -> None:
        async with opened(server, dialect) as socket:
            await socket.configure(rate, kind)
            item = await socket.end(data)
            assert (
                item["text"]
                == "seven three nine kilo oscar tango twenty five thousand tuesday october eleven sierra zero"
            )
            assert "".join(event.get("delta", event.get("text")) for event in socket.of(".delta")) == item["text"]
            assert [word["word"] for word in item["words"]] == item["text"].split()
            assert abs(item["audio_end_ms"] - 1000 * len(SAMPLE) / 16_000) < 2
            if dialect == MISTRAL:
                assert (item["model"], item["usage"]["prompt_audio_seconds"]) == ("tiny", round(len(SAMPLE) / 16_000))
                segments = [{key: each[key] for key in ("text", "start", "end")} for each in item["segments"]]
                assert [{k: v for k, v in each.items() if k != "type"} for each in socket.of(".segment")] == segments
            else:
                assert abs(item["usage"]["seconds"] - len(SAMPLE) / 16_000) < 0.01

    asyncio.run(scenario())


# --- turns ---


def test_turns_end_at_pauses_of_the_length_asked_for(server):
    spoken, times = say(["seven", "kilo", "nine", "oscar", "three"], [0.7, 0.2, 1.6, 0.6, 3.0])

    async def scenario(silence: int) -> list[str]:
        async with opened(server) as socket:
            session = await socket.configure(turns=silence, progress=True)
            assert session["audio"]["input"]["turn_detection"]["silence_duration_ms"] == silence
            await socket.end(noisy(spoken), end_ms=len(spoken) / 16)
            items = [event for event in socket.of(".completed") if event["transcript"]]
            assert_spoken(words_of(items), times)
            ids = [item["item_id"] for item in socket.of(".completed")]
            committed = socket.of(".committed")
            assert [event["item_id"] for event in committed] == ids
            assert [event["previous_item_id"] for event in committed] == [None, *ids[:-1]]
            for item, start, stop in zip(items, socket.of("speech_started"), socket.of("speech_stopped"), strict=False):
                assert start["item_id"] == stop["item_id"] == item["item_id"]
                first = 1000 * item["words"][0]["start"]
                assert first - 302 <= start["audio_start_ms"] <= first
                assert 1000 * item["words"][-1]["end"] <= stop["audio_end_ms"] == item["audio_end_ms"]
                order = [
                    event["type"].rpartition(".")[2]
                    for event in socket.events
                    if event.get("item_id") == item["item_id"]
                ]
                assert (order[0], *order[-3:]) == ("speech_started", "speech_stopped", "committed", "completed")
            told = [(event["audio_end_ms"], event["transcribed_ms"]) for event in socket.of(".progress")]
            assert told == sorted(told) and all(end <= transcribed for end, transcribed in told) and told
            return [item["transcript"] for item in items]

    assert asyncio.run(scenario(500)) == ["seven", "kilo nine", "oscar", "three"]
    assert asyncio.run(scenario(1000)) == ["seven kilo nine", "oscar three"]


def test_a_turn_ends_in_sound_without_words(server):
    """Music goes on behind the words: the item ends without a pause, and without a commit."""
    spoken, times = say(["seven", "kilo"], [0.2, 7.0])
    at = np.arange(len(spoken)) / 16_000
    music = 0.1 * np.sin(2 * np.pi * 330 * at) * (1 + np.sin(2 * np.pi * 1.3 * at)) * (at > times[-1][2] + 0.1)

    async def scenario() -> None:
        async with opened(server) as socket:
            await socket.configure(turns=500)
            await socket.append(noisy(spoken + music))
            item = await socket.done()
            assert_spoken(item["words"], times)

    asyncio.run(scenario())


def test_turns_of_mistral(server):
    spoken, times = say(["seven", "kilo"], [1.5, 1.5])

    async def scenario() -> None:
        async with opened(server, MISTRAL) as socket:
            assert (await socket.configure(turns=600))["turn_detection"]["min_silence_ms"] == 600
            done = await socket.end(noisy(spoken))
            assert_spoken(done["words"], times)
            starts = [event["time_s"] for event in socket.of("turn.start")]
            ends = [event["time_s"] for event in socket.of("turn.end")]
            assert len(starts) == len(ends) == 2
            assert starts[0] < times[0][2] < ends[0] < times[1][1] + 0.2 < times[1][2] < ends[1]
            # The session goes on after a flush; the server closes after the end, for which clients wait.
            await socket.append(noisy(spoken))
            await socket.send("input_audio.end")
            again = await socket.done()
            assert_spoken(again["words"], times, len(spoken) / 16_000)
            with pytest.raises(websockets.ConnectionClosedOK):
                await socket.receive()

    asyncio.run(scenario())


def test_talk_without_a_pause_is_let_go(server):
    """Items end after 30 s at the latest; nothing is cut or said twice. Also across sessions of 79 s."""
    names = "seven kilo nine oscar three tango".split() * 22
    spoken, times = say(names, [0.13] * len(names))

    async def scenario() -> None:
        async with opened(server) as socket:
            await socket.configure(turns=500)
            await socket.end(noisy(spoken), end_ms=len(spoken) / 16)
            ends = [0, *(item["audio_end_ms"] for item in socket.of(".completed"))]
            assert np.diff(ends).max() < 35_000
            words = words_of(socket.events)
            assert sum(a["word"] == b for a, (b, _, _) in zip(words, times, strict=True)) >= 0.95 * len(times)
            for item in socket.of(".completed"):
                assert all(1000 * word["end"] <= item["audio_end_ms"] + 100 for word in item["words"])

    asyncio.run(scenario())


# --- items that the client ends ---


@BOTH
def test_several_items_at_once(server, dialect):
    parts = [say([word], [0.4]) for word in "seven kilo nine".split()]

    async def scenario() -> None:
        async with opened(server, dialect) as socket:
            await socket.configure()
            for spoken, _ in parts:  # all before the first answer
                await socket.append(noisy(spoken))
                await socket.commit()
            offset, items = 0.0, []
            for spoken, times in parts:
                items.append(await socket.done())
                assert_spoken(items[-1]["words"], times, offset)
                offset += len(spoken) / 16_000
                assert abs(items[-1]["audio_end_ms"] - 1000 * offset) < 2
            if dialect == OPENAI:
                ids = [item["item_id"] for item in items]
                order = [(event["item_id"], event["previous_item_id"]) for event in socket.of(".committed")]
                assert order == list(zip(ids, [None, *ids], strict=False))
                assert socket.of("speech_started") == []

    asyncio.run(scenario())


@BOTH
def test_items_without_words(server, dialect):
    """The shortest audio, silence, a hum: an item each, which is empty, in order with one that has a word."""
    hum = 0.1 * np.sin(2 * np.pi * 120 * np.arange(24_000) / 16_000)
    spoken, times = say(["seven"], [0.4])
    parts = [bytes(2), bytes(SECOND), to_pcm16(hum), noisy(spoken)]

    async def scenario() -> None:
        async with opened(server, dialect) as socket:
            await socket.configure()
            for part in parts:
                await socket.append(part)
                await socket.commit()
            items = [await socket.done() for _ in parts]
            assert [item["text"] for item in items] == ["", "", "", "seven"]
            offset = sum(map(len, parts[:3])) / SECOND
            assert_spoken(items[-1]["words"], times, offset)
            assert [item["audio_end_ms"] for item in items[:3]] == [0, 1000, 2500]
            assert "".join(event.get("delta", event.get("text")) for event in socket.of(".delta")) == "seven"
            if dialect == OPENAI:
                assert len(socket.of(".committed")) == 4
                await socket.configure(turns=500)
                await socket.append(bytes(SECOND))
                await socket.commit()
                assert (await socket.done())["text"] == ""
                assert len(socket.of(".committed")) == 5 and not socket.of("speech_started")

    asyncio.run(scenario())


@BOTH
def test_the_format_changes_within_an_item(server, dialect):
    """Every second at another rate: no word is cut, and all have their times."""
    spoken, times = say(["seven", "kilo", "nine"], [0.6, 0.6, 0.6])
    second = 16_000

    async def scenario() -> None:
        async with opened(server, dialect) as socket:
            for number, at in enumerate(range(0, len(spoken), second)):
                rate = (24_000, 8000, 16_000)[number % 3]
                await socket.configure(rate)
                piece = spoken[at : at + second]
                await socket.append(noisy(piece if rate == 16_000 else soxr.resample(piece, 16_000, rate)))
            await socket.commit()
            item = await socket.done()
            assert_spoken(item["words"], times)
            assert abs(item["audio_end_ms"] - len(spoken) / 16) < 2

    asyncio.run(scenario())


def test_a_wrong_update_changes_nothing(server):
    async def scenario() -> None:
        async with opened(server) as socket:
            before = await socket.configure(turns=700)
            wrong = {"turn_detection": None, "format": {"type": "audio/mp3"}}
            await socket.send("session.update", session={"progress": True, "audio": {"input": wrong}})
            assert (await socket.receive())["type"] == "error"
            await socket.send("session.update", session={})
            now = (await socket.wait("session.updated"))["session"]
            assert now | {"expires_at": 0} == before | {"expires_at": 0}

    asyncio.run(scenario())


def test_clear(server):
    """What was sent before is gone, also from the middle of a transcription; what comes then has its right times."""
    spoken, times = say(["seven", "kilo"], [0.3, 0.4])

    async def scenario() -> None:
        async with opened(server) as socket:
            await socket.configure()
            for part in (noisy(spoken), noisy(spoken) + bytes(SECOND)):
                await socket.append(part)
                if len(part) > 2 * len(spoken):
                    await socket.wait(f"{DONE[OPENAI].rpartition('.')[0]}.delta")
                await socket.send("input_audio_buffer.clear")
                await socket.wait("input_audio_buffer.cleared")
            await socket.send("input_audio_buffer.commit", event_id="mine")
            error = (await socket.receive())["error"]
            assert (error["code"], error["event_id"]) == ("input_audio_buffer_commit_empty", "mine")
            item = await socket.end(noisy(spoken))
            assert_spoken(item["words"], times, 2 * len(spoken) / 16_000 + 1)
            assert len(socket.of(".completed")) == 1

    asyncio.run(scenario())
    asyncio.run(nothing_left(server))


# --- what is wrong ---

NO_MODEL = {"audio": {"input": {"transcription": {"model": "nope"}}}}
NOT_A_NUMBER = {"audio": {"input": {"turn_detection": {"silence_duration_ms": float("nan")}}}}
BAD = {
    "{": "invalid_json",
    "[]": "invalid_event",
    '{"event_id": "mine"}': "unknown_event",
    '{"type": ["a"]}': "unknown_event",
    '{"type": "session.update", "session": 5}': "invalid_event",
    '{"type": "session.update", "session": {"progress": "yes"}}': "invalid_event",
    json.dumps({"type": "session.update", "session": NO_MODEL}): "model_not_found",
    '{"type": "session.update", "session": {"audio": {"input": {"format": {"rate": 5}}}}}': "invalid_event",
    '{"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/mp3"}}}}}': "invalid_event",
    '{"type": "session.update", "session": {"audio": {"input": {"turn_detection": 5}}}}': "invalid_event",
    json.dumps({"type": "session.update", "session": NOT_A_NUMBER}): "invalid_event",
    '{"type": "input_audio_buffer.append"}': "invalid_audio",
    '{"type": "input_audio_buffer.append", "audio": "AAAA"}': "invalid_audio",
    '{"type": "input_audio_buffer.append", "audio": "-_-_"}': "invalid_audio",
    '{"type": "input_audio_buffer.commit"}': "input_audio_buffer_commit_empty",
}
BAD_FOR_MISTRAL = {
    "{": 400,
    '{"type": "input_audio_buffer.commit"}': 400,
    '{"type": "session.update", "session": {"audio_format": {"encoding": "mp3"}}}': 400,
    '{"type": "session.update", "session": {"turn_detection": {"min_silence_ms": "x"}}}': 400,
}


@BOTH
def test_bad_messages(server, dialect):
    """Each gets an error, an object; the socket lives on. Wrong and vendors' names of models."""

    async def scenario() -> None:
        async with opened(server, dialect, ("&" if dialect == OPENAI else "?") + "model=nope") as socket:
            assert (await socket.receive())["error"]["code"] == ("model_not_found" if dialect == OPENAI else 404)
            for message, code in (BAD if dialect == OPENAI else BAD_FOR_MISTRAL).items():
                await socket.connection.send(message)
                error = (await socket.receive())["error"]
                assert (error["code"], bool(error["message"])) == (code, True), message
                assert error.get("event_id") == ("mine" if "mine" in message and dialect == OPENAI else None)
            await socket.connection.send(b"\0")
            assert (await socket.receive())["type"] == "error"
            await socket.configure()
            assert (await socket.end(noisy(say(["seven"], [0.4])[0])))["text"] == "seven"
        vendor = (
            "&model=gpt-4o-mini-transcribe" if dialect == OPENAI else "?model=voxtral-mini-transcribe-realtime-2602"
        )
        async with opened(server, dialect, vendor) as socket:
            await socket.configure()  # which fails at an error

    asyncio.run(scenario())


def test_older_form_and_what_the_model_cannot_do(server):
    async def scenario() -> None:
        async with opened(server) as socket:
            assert socket.events[0]["session"]["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24_000}
            assert socket.events[0]["session"]["audio"]["input"]["turn_detection"]["type"] == "server_vad"
            old = {
                "input_audio_format": "g711_ulaw",
                "turn_detection": {"type": "server_vad", "silence_duration_ms": 10},
            }
            old |= {"input_audio_transcription": {"model": "whisper-1", "language": "en", "prompt": "x"}}
            await socket.send("transcription_session.update", session=old)
            given = (await socket.wait("session.updated"))["session"]["audio"]["input"]
            assert given["format"] == {"type": "audio/pcmu"}
            assert given["transcription"] == {"model": "tiny", "language": None, "prompt": None}
            assert given["turn_detection"]["silence_duration_ms"] == 480

    asyncio.run(scenario())


# --- limits ---


def test_key_and_subprotocols(brief):
    async def scenario() -> None:
        offers = {"voxtral": "key." + b"sesame".hex(), "realtime": "openai-insecure-api-key.sesame"}
        for protocol, key in offers.items():
            async with opened(brief, subprotocols=[protocol, key]) as socket:
                assert socket.connection.subprotocol == protocol
        for options in ({}, {"subprotocols": ["realtime", "openai-insecure-api-key.wrong"]}):
            for dialect in (OPENAI, MISTRAL):
                with pytest.raises(websockets.InvalidStatus, match="401"):
                    async with opened(brief, dialect, **options):
                        pass

    asyncio.run(scenario())


def test_handshake_with_two_connection_fields(server):
    """As LiveKit's plugin for Mistral sends it; uvicorn alone answers 404."""

    async def scenario() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        fields = ["Connection: Upgrade", "Upgrade: websocket", "Connection: keep-alive", "Sec-WebSocket-Version: 13"]
        fields += [f"Host: 127.0.0.1:{server.port}", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        writer.write("\r\n".join([f"GET {MISTRAL} HTTP/1.1", *fields, "", ""]).encode())
        line = await reader.readline()
        writer.close()
        return line

    assert b"101" in asyncio.run(scenario())


def test_busy_and_idle(locked):
    """The only slot is taken: the client is told so. A socket that is idle is closed, not earlier without audio."""
    options = {"additional_headers": {"Authorization": "Bearer sesame"}, "ssl": ssl._create_unverified_context()}

    async def scenario() -> None:
        async with Server(locked.url, "sesame", options["ssl"]).session("tiny") as session:
            await session.send(bytes(SECOND))
            await session.receive()
            async with opened(locked, **options) as ours, opened(locked, **options) as plain:
                await ours.configure(progress=True)
                await plain.configure()

                async def talk_on(send: Callable) -> None:  # nobody is idle
                    with contextlib.suppress(websockets.ConnectionClosed):
                        while True:
                            await send(bytes(SECOND // 10))
                            await asyncio.sleep(0.3)

                talks = [asyncio.create_task(talk_on(send)) for send in (session.send, ours.append, plain.append)]
                for socket in (ours, plain):
                    with pytest.raises(websockets.ConnectionClosed) as closed:
                        while True:
                            await socket.receive()
                    assert (closed.value.rcvd.code, "taken" in closed.value.rcvd.reason) == (1013, True)
                for each in talks:
                    each.cancel()
                assert ours.events[-1]["error"]["code"] == "server_busy"
                assert plain.of("error") == []  # LiveKit's plugin gives up at one, and connects again after a close
        async with opened(locked, MISTRAL, **options) as socket:
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.receive()
            assert closed.value.rcvd.code == 4408
        await nothing_left(locked)

    asyncio.run(scenario())


def test_a_client_that_dies_leaves_nothing(server):
    """In any state."""
    spoken = noisy(say(["seven", "kilo"], [0.4, 0.4])[0])

    async def opening(state: int) -> None:
        async with opened(server, (OPENAI, MISTRAL)[state // 2 % 2]) as socket:
            if state > 0:
                await socket.configure(turns=500 if state % 2 else None)
            if state > 1:
                await socket.append(spoken * (5 if state < 6 else 200))
            if state > 2:
                await socket.wait("session.updated") if state < 3 else await asyncio.sleep(0.1 * state)
            if state > 4:
                await socket.commit()
                await socket.append(spoken)
            socket.connection.transport.abort()

    async def scenario() -> None:
        for state in range(8):
            await opening(state)
        await nothing_left(server)

    asyncio.run(scenario())


def test_a_client_that_does_not_read(server):
    """It costs the others nothing, and its audio waits."""

    async def scenario() -> None:
        async with opened(server) as slow, opened(server) as other:
            await slow.configure()
            flood = asyncio.create_task(slow.append(bytes(SECOND), 2))
            await other.configure()
            item = await other.end(noisy(say(["seven"], [0.4])[0]))
            assert item["text"] == "seven"
            flood.cancel()

    asyncio.run(scenario())


# --- sessions without an end ---


def test_hours_on_one_socket(server):
    """Many sessions, which last 40 s here, faster than real time: all words, once, with their times.

    TEST_MINUTES=44 takes as long as docs/performance.md says.
    """
    spoken, times = talk(60 * float(os.environ.get("TEST_MINUTES", 1.75)), seed=8)

    async def scenario() -> None:
        async with opened(server) as socket:
            await socket.configure(turns=500, progress=True)
            await socket.end(noisy(spoken), end_ms=len(spoken) / 16)
            words = words_of(socket.events)
            right = sum(word["word"] == text for word, (text, _, _) in zip(words, times, strict=True))
            assert right >= 0.98 * len(times)
            for word, (_, start, end) in zip(words, times, strict=True):
                assert abs(word["start"] - start) < 0.2 and abs(word["end"] - end) < 0.2
            for item in socket.of(".completed"):
                shown = "".join(e["delta"] for e in socket.of(".delta") if e["item_id"] == item["item_id"])
                assert shown == item["transcript"]

    asyncio.run(scenario())


def test_engine_out_of_memory(brief):
    """Four sockets where the memory holds three sessions: the words go on in new sessions."""
    talks = [talk(25, seed=seed) for seed in range(4)]

    async def one(spoken: np.ndarray, times: list) -> float:
        async with opened(brief, additional_headers={"Authorization": "Bearer sesame"}) as socket:
            await socket.configure(turns=500)
            await socket.end(noisy(spoken), end_ms=len(spoken) / 16)
            words = words_of(socket.events)
            shown = len("".join(event["delta"] for event in socket.of(".delta"))) + len(socket.of(".completed"))
            assert shown < 1.1 * len(" ".join(word["word"] for word in words))  # nothing again after a resume
            return np.mean([word["word"] == text for word, (text, _, _) in zip(words, times, strict=True)])

    async def scenario() -> list[float]:
        return await asyncio.gather(*(one(*each) for each in talks))

    assert min(asyncio.run(scenario())) >= 0.95
    asyncio.run(nothing_left(brief))


def test_eight_at_once(server):
    """Other words each, half of them in each dialect, on four slots: nobody gets another's words."""
    talks = [talk(12, seed=20 + number) for number in range(8)]

    async def one(number: int) -> None:
        spoken, times = talks[number]
        for _ in range(10):
            try:
                async with opened(server, MISTRAL if number % 2 else OPENAI) as socket:
                    await socket.configure()
                    return assert_spoken((await socket.end(noisy(spoken)))["words"], times)
            except (AssertionError, websockets.ConnectionClosed) as error:
                if "taken" not in str(error):
                    raise

    async def scenario() -> None:
        await asyncio.gather(*map(one, range(8)))

    asyncio.run(scenario())
