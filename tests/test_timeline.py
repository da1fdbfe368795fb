"""The bookkeeping alone, with a model that is right by definition: random words, random cuts."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxtral_client.audio import to_pcm16
from voxtral_client.protocol import FRAME, RATE
from voxtral_client.timeline import Timeline, Word

DELAY = 6 * FRAME
UNITS = st.integers(8, 45)  # a word's length, in 20 ms
GAPS = st.integers(4, 100)  # the silence after it, in 20 ms


class Model:
    """Marks a word's end in the frame in which it ends, and spells it out in those that follow.

    It knows a word only if the session's audio holds all of it: what is cut in two comes out as "?".
    """

    def __init__(self, words: list[tuple[str, int, int]], origin: int):
        self.origin, self.frames, self.queue = origin, 0, []
        self.words = [(text if start >= origin else "?", start, end) for text, start, end in words if end > origin]

    def delta(self) -> str:
        self.frames += 1
        now = self.origin + self.frames * FRAME
        while self.words and self.words[0][2] <= now:
            text = self.words.pop(0)[0]
            self.queue += ["", " " + text[:3]] + ([text[3:]] if text[3:] else [])
        return self.queue.pop(0) if self.queue else ""


def audio_of(lengths: list[tuple[int, int]]) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """Noise bursts with silence between them, and (text, start, end) of each in samples."""
    noise = np.random.default_rng(1)
    parts, words, at = [np.zeros(RATE // 2)], [], RATE // 2
    for i, (units, gap) in enumerate(lengths):
        parts += [noise.normal(0, 0.1, units * 320), np.zeros(gap * 320)]
        words.append((f"word{i}", at, at + units * 320))
        at += (units + gap) * 320
    return np.concatenate(parts) + noise.normal(0, 1e-4, at), words


def transcribe(lengths, cuts) -> tuple[list, list]:
    """Run a timeline over noise bursts; a session ends after each of `cuts` deltas. Returns got, wanted."""
    return follow(*audio_of(lengths), cuts)


def follow(samples: np.ndarray, words: list[tuple[str, int, int]], cuts) -> tuple[list, list]:
    """Run a timeline over the audio; a session ends after each of `cuts` deltas. Returns got, wanted."""
    timeline, pcm, got, sent = Timeline(), to_pcm16(samples), [], 0
    cuts = list(cuts)
    while True:
        origin = timeline.begin()
        model, left = Model(words, origin), cuts.pop(0) if cuts else None
        while left is None or left > 0:
            needed = timeline.transcribed + FRAME + DELAY
            if timeline.received < needed and sent < len(pcm):
                timeline.add_audio(pcm[sent : sent + 3200])
                sent += 3200
                continue
            if sent >= len(pcm) and timeline.transcribed >= timeline.received + RATE // 2 and not model.queue:
                timeline.finish()
                return got + timeline.take(), words
            timeline.add_delta(model.delta())
            got += timeline.take()
            left = None if left is None else left - 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(UNITS, GAPS), min_size=1, max_size=25), st.lists(st.integers(1, 400), max_size=6))
def test_nothing_is_lost_and_nothing_doubled(lengths, cuts):
    got, wanted = transcribe(lengths, cuts)
    assert "".join(word.text for word in got).split() == [text for text, _, _ in wanted]
    for word, (_, start, end) in zip(got, wanted, strict=True):
        assert abs(word.end - end / RATE) <= 0.16
        assert abs(word.start - start / RATE) <= 0.16
    assert all(a.end <= b.start for a, b in itertools.pairwise(got))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(UNITS, GAPS), min_size=2, max_size=20), st.lists(st.integers(1, 400), min_size=1, max_size=4))
def test_times_do_not_depend_on_the_cuts(lengths, cuts):
    cut, whole = transcribe(lengths, cuts)[0], transcribe(lengths, [])[0]
    assert [word.text for word in cut] == [word.text for word in whole]
    for a, b in zip(cut, whole, strict=True):
        assert abs(a.end - b.end) <= 0.16
        assert abs(a.start - b.start) <= 0.16


def test_talk_without_a_pause_settles_between_words():
    """Forty words with 20 ms between them, more than a session holds: still no word is cut in two."""
    got, wanted = transcribe([(30, 1)] * 120, [])
    assert "".join(word.text for word in got).split() == [text for text, _, _ in wanted]


@pytest.mark.parametrize("seconds", [0.6, 2.0])
@pytest.mark.parametrize("sound", ["tone", "noise"])
@pytest.mark.parametrize("cut", [None, 2.4, 3.3, 4.1, 4.6])
def test_quiet_talk_after_something_loud(sound, seconds, cut):
    """A beep or a bang 37 dB above the voice: starts are right all the same, and no word is taken for silence."""
    time = np.arange(round(seconds * RATE)) / RATE
    loud = np.sin(2000 * np.pi * time) if sound == "tone" else np.random.default_rng(2).uniform(-1, 1, len(time))
    samples, words = audio_of([(30, 14), (20, 40), (25, 12), (30, 60)])
    before = np.concatenate([np.zeros(RATE), 0.9 * loud]) + np.random.default_rng(3).normal(0, 1e-4, RATE + len(time))
    shifted = [(text, start + len(before), end + len(before)) for text, start, end in words]
    cuts = [round((cut + seconds) / 0.08)] if cut else []
    got, wanted = follow(np.concatenate([before, samples * 10 ** (-22 / 20)]), shifted, cuts)
    assert [word.text.strip() for word in got] == [text for text, _, _ in wanted]
    for word, (_, start, end) in zip(got, wanted, strict=True):
        assert abs(word.start - start / RATE) <= 0.2
        assert abs(word.end - end / RATE) <= 0.2


@pytest.mark.parametrize("noise", [-60, -50, -40])
def test_starts_in_steady_noise(noise):
    """Voices whose weak sounds, 12 dB below their loud ones, barely rise above it."""
    _, words = audio_of([(40, 14), (40, 40), (45, 12), (40, 60)])
    rng, length = np.random.default_rng(4), words[-1][2] + 2 * RATE
    voice = np.zeros(length)
    for _, start, end in words:
        shape = np.where(np.arange(end - start) < 0.7 * (end - start), 10 ** (-12 / 20), 1.0)
        voice[start:end] = rng.normal(0, 1, end - start) * shape
    samples = rng.normal(0, 10 ** (noise / 20), length) + voice * 10 ** ((noise + 16) / 20)
    got, wanted = follow(samples, words, [])
    for word, (_, start, end) in zip(got, wanted, strict=True):
        assert abs(word.start - start / RATE) <= 0.2
        assert abs(word.end - end / RATE) <= 0.2


@pytest.mark.slow
def test_memory_stays_bounded_over_two_hours():
    """Two hours of talk leave no more in the timeline than a minute of it does."""
    samples, words = audio_of([(20, 40)] * 50)  # one minute
    pcm, timeline = to_pcm16(samples), Timeline(iter(range(1, 2)))  # what pickle takes in all Pythons
    timeline.begin()
    sizes = []
    for minute in range(120):
        model = Model([(t, s + minute * len(samples), e + minute * len(samples)) for t, s, e in words], 0)
        model.frames = timeline.transcribed // FRAME
        for at in range(0, len(pcm), 3200):
            timeline.add_audio(pcm[at : at + 3200])
            while timeline.received - timeline.transcribed > DELAY + FRAME:
                timeline.add_delta(model.delta())
        timeline.take()
        sizes.append(len(pickle.dumps(timeline)))
    assert max(sizes[-10:]) <= 1.5 * max(sizes[1:11])


def spoken(sessions: list[list[str]]) -> str:
    """What becomes of sessions with these texts, each piece followed by a pause that commits it."""
    timeline = Timeline()
    for texts in sessions:
        timeline.begin()
        timeline.add_audio(bytes(2 * RATE * len(texts)))
        for text in texts:
            for delta in ["", "", text, *[""] * 8]:
                timeline.add_delta(delta)
    timeline.finish()
    return "".join(word.text for word in timeline.take())


@pytest.mark.parametrize(
    ("before", "after", "space"),
    [
        *[("你好", "世界", ""), ("です。", "また", ""), ("第", "3章", ""), ("𠮷", "野", ""), ("カ", "ﾀ", "")],
        *[("안녕", "하세요", " "), ("नमस्ते", "आप", " "), ("hello ", "you", ""), ("🙂", "you", " "), ("¡", "¿qué?", " ")],
    ],
)
def test_space_between_sessions(before, after, space):
    """Only where one is missing, and only between sessions: within a session, the model's text is what it says."""
    assert spoken([[before], [after]]) == before + space + after
    assert spoken([[before, after]]) == before + after


def told(deltas: list[str], sound: list[tuple[int, int]]) -> list[Word]:
    """What becomes of one session with `sound` (see `audio_of`), whose deltas begin when its first word is over."""
    samples, words = audio_of(sound)
    timeline = Timeline()
    timeline.begin()
    timeline.add_audio(to_pcm16(samples))
    for delta in [""] * (words[0][2] // FRAME + 1) + deltas + [""] * 20:
        timeline.add_delta(delta)
    timeline.finish()
    return timeline.take()


@pytest.mark.parametrize(
    "pieces",
    [
        *[[" ", "2", "0", "2", "4"], [" ", "3", ".", "5"], [" ", "1", ",", "000"], [" ", "5", "%"], [" €", "5"]],
        *[[" C", "+", "+"], [" e", "-", "mail"], [" “", "yes", ".”"], [" —", " yes"], [" ", " yes"], ["yes", " "]],
    ],
)
def test_what_is_written_in_pieces_is_one_word_with_the_time_of_its_sound(pieces):
    (word,) = told(pieces, [(40, 60)])
    assert word.text.strip() == "".join(pieces).strip()
    assert abs(word.start - 0.5) <= 0.04
    assert abs(word.end - 1.3) <= 0.04


def test_a_number_that_is_written_while_it_is_said_lasts_to_its_end():
    """ "Twenty twenty-four": "24" follows after blanks, without a space."""
    (word,) = told([" ", "2", "0", *[""] * 8, "2", "4"], [(30, 3), (45, 60)])
    assert (word.text, abs(word.end - 2.06) <= 0.1) == (" 2024", True)


def test_two_words_in_one_delta():
    assert [word.text for word in told([" one two", "", ","], [(40, 60)])] == [" one", " two,"]


def test_sound_without_a_word_is_final_when_two_sessions_agree():
    samples, _ = audio_of([(250, 150)])
    timeline, committed = Timeline(), []
    timeline.add_audio(to_pcm16(samples))
    for _ in range(2):
        timeline.begin()
        for _ in range((len(samples) - timeline.committed) // FRAME):
            timeline.add_delta("")
        committed.append(timeline.committed / RATE)
        timeline.suspect_blanks()
    assert committed[0] < 0.5
    assert committed[1] > 6


def test_chinese_without_a_pause_becomes_words_with_times():
    """98 characters in 7.8 s, one a frame: they had been one word of 0.4 s."""
    text = "今天天气很好我们一起去公园散步吧" * 6 + "你好"
    words = told(list(text), [(8, 1)] + [(45, 1)] * 8 + [(10, 100)])
    assert "".join(word.text for word in words) == text
    assert max(len(word.text) for word in words) <= 7
    spoken = np.linspace(0.66, 0.66 + 0.08 * len(text), len(text))[np.cumsum([len(word.text) for word in words]) - 1]
    for word, end in zip(words, spoken, strict=True):
        assert abs(word.end - end) <= 0.25
    assert all(a.end <= b.start < b.end for a, b in itertools.pairwise(words))


@pytest.mark.parametrize("noise", [None, -65])
def test_soft_beginnings_and_tails_belong_to_the_word(noise):
    """Words that swell and fade over 0.16 s, 55 dB below the voice at their ends."""
    _, words = audio_of([(40, 14), (40, 40), (45, 12), (40, 60)])
    samples = np.random.default_rng(4).normal(0, 1e-4, words[-1][2] + 2 * RATE)
    fade, rng = round(0.16 * RATE), np.random.default_rng(5)
    for _, start, end in words:
        shape = np.ones(end - start)
        shape[:fade], shape[-fade:] = 10 ** np.linspace(-2.75, 0, fade), 10 ** np.linspace(0, -2.75, fade)
        samples[start:end] += rng.normal(0, 0.1, end - start) * shape
    if noise:
        samples += rng.normal(0, 10 ** (noise / 20), len(samples))
    got, wanted = follow(samples, words, [])
    for word, (_, start, end) in zip(got, wanted, strict=True):
        assert abs(word.start - start / RATE) <= 0.06
        assert abs(word.end - end / RATE) <= 0.06


def test_live_audio_beyond_the_buffer_is_dropped_and_told():
    timeline = Timeline()
    timeline.begin()
    rng = np.random.default_rng(0)
    for _ in range(100):
        timeline.add_audio(to_pcm16(rng.normal(0, 0.1, RATE)))
    lost = timeline.drop_oldest(30 * RATE)
    assert lost == (0, 70 * RATE)
    assert timeline.begin() == 70 * RATE
    assert len(timeline.audio(70 * RATE, 100 * RATE)) == 2 * 30 * RATE
    assert timeline.drop_oldest(30 * RATE) is None
