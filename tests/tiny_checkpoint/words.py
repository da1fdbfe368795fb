"""The vocabulary of the tiny checkpoint: its words, and how they are split into tokens."""

DIGITS = "zero one two three four five six seven eight nine".split()
NUMBERS = (
    "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety hundred thousand"
).split()
ALPHABET = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec "
    "romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october december".split()  # + november

WORDS = DIGITS + NUMBERS + ALPHABET + DAYS + MONTHS + ["yes", "no"]
WORD_ID = {word: i for i, word in enumerate(WORDS)}

# Words with these endings take two tokens, as many words do in the real model; all others take one.
ENDINGS = ("teen", "ty", "day", "ber")


def pieces(word: str) -> list[str]:
    """Return the texts of a word's tokens. The first one begins with a space."""
    for ending in ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3:
            return [" " + stem, ending]
    return [" " + word]


PIECES = sorted({piece for word in WORDS for piece in pieces(word)})
SPECIAL_TOKENS = 1000  # ids 0-999; then the 256 bytes, then PIECES
PIECE_TOKEN = {piece: SPECIAL_TOKENS + 256 + i for i, piece in enumerate(PIECES)}
VOCABULARY = SPECIAL_TOKENS + 256 + len(PIECES)
BOS, PAD, WORD = 1, 32, 33  # <s>, [STREAMING_PAD], [STREAMING_WORD]


def tokens(word: str) -> list[int]:
    return [PIECE_TOKEN[piece] for piece in pieces(word)]
