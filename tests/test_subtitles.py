"""Cues of odd words: without length, overlapping, long, without spaces; and the times that players read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxtral_client.subtitles import Cues, Limits, span, text_of, timestamp
from voxtral_client.timeline import Word

TEXTS = st.sampled_from([" a", " word", "字", "。", " end.", " -->", " " + "x" * 60, ""])
WORDS = st.lists(st.tuples(TEXTS, st.sampled_from([0.0, 0.08, 0.3, 2.0, 9.0]), st.sampled_from([0.0, 0.2, 5.0])))


@given(WORDS, st.sampled_from([Limits(), Limits(1, 5)]))
def test_every_word_is_in_one_cue(drawn, limits):
    """In order, within the lines unless one word alone is larger, and no cue reaches into the next."""
    words, at = [], 0.0
    for text, later, length in drawn:
        at += later
        words.append(Word(text, at, at + length, 1))
    cues, ended = Cues(limits), []
    for word in words:
        if done := cues.add(word):
            ended.append(done)
    ended += [(cues.open, float("inf"))] if cues.open else []
    assert [word for cue, _ in ended for word in cue] == words
    for number, (cue, over) in enumerate(ended):
        start, end = span(cue, over)
        assert cue[0].start == start <= end <= over
        assert len(cue) == 1 or len(limits.wrap(text_of(cue))) <= limits.lines
        assert number + 1 == len(ended) or end <= span(*ended[number + 1])[0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "00:00:00,000"),
        (0.0004, "00:00:00,000"),
        (59.9996, "00:01:00,000"),  # rounds over all places
        (3599.9999, "01:00:00,000"),
        (360_000.001, "100:00:00,001"),
    ],
)
def test_timestamp(seconds, shown):
    assert timestamp(seconds, ",") == shown
