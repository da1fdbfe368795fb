"""Word errors: counted by jiwer after the usual normalisation, summed, and two runs compared."""

import unicodedata
import warnings
from collections.abc import Callable, Iterable

import numpy as np

try:
    import jiwer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its source text has invalid escapes
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
except ImportError:  # only evaluate.py needs them
    jiwer = None

NORMALIZERS = ("english", "basic", "none")
KINDS = ("substitutions", "deletions", "insertions")


def normalizer(name: str) -> Callable[[str], str]:
    """Return a function from text to words with single spaces between them.

    english: Whisper's, the usual one for English error rates: spelling, contractions, numbers as digits (so "one two"
    becomes one word, 12). basic: case and punctuation, for any language. none: white space only. All of them remove
    what cannot be seen: zero-width characters, byte order marks, marks of direction.
    """
    clean = {"english": EnglishTextNormalizer, "basic": BasicTextNormalizer}.get(name, lambda: str)()
    return lambda text: " ".join(clean("".join(c for c in text if unicodedata.category(c) != "Cf")).split())


def count(reference: str, hypothesis: str) -> dict:
    """Return {"words", "substitutions", "deletions", "insertions"} of normalised texts; either may be empty."""
    found = jiwer.process_words(reference, hypothesis)
    return {"words": len(reference.split())} | {kind: getattr(found, kind) for kind in KINDS}


def alignment(reference: str, hypothesis: str) -> str:
    """Return both texts, one below the other, with the errors marked."""
    found = jiwer.process_words(reference, hypothesis)
    return jiwer.visualize_alignment(found, show_measures=False, skip_correct=False).split("\n", 2)[2].rstrip()


def add(counts: Iterable[dict]) -> dict:
    """Return the sums of `counts`, the number of `files`, and `wer`: errors per word (None without words)."""
    counts = list(counts)
    total = {kind: sum(entry[kind] for entry in counts) for kind in ("words", *KINDS)}
    return {"files": len(counts)} | total | {"wer": rate(total)}


def rate(entry: dict) -> float | None:
    """Return errors per word of a count; None without words."""
    return round(errors(entry) / entry["words"], 5) if entry["words"] else None


def errors(entry: dict) -> int:
    """Return the number of errors of a count."""
    return sum(entry[kind] for kind in KINDS)


def groups(files: list[dict]) -> dict[str, list[dict]]:
    """Return files by their group, in the groups' order of appearance; nothing if all are in one."""
    found: dict[str, list[dict]] = {}
    for entry in files:
        found.setdefault(entry["group"], []).append(entry)
    return found if len(found) > 1 else {}


def interval(pairs: list[tuple[dict, dict]], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of WER(second) - WER(first), by bootstrap over files (Bisani and Ney, 2004).

    `pairs`: the counts of each file in both runs.
    """
    table = np.array([[errors(a), errors(b), a["words"]] for a, b in pairs], float)
    chosen = np.random.default_rng(0).integers(0, len(table), (draws, len(table)))
    sums = table[chosen].sum(axis=1)
    low, high = np.percentile((sums[:, 1] - sums[:, 0]) / np.maximum(sums[:, 2], 1), (2.5, 97.5))
    return float(low), float(high)
