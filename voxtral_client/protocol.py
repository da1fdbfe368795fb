"""Constants of the realtime protocol (vLLM 0.32.0 with Voxtral Mini 4B Realtime 2602), and the form of its keys."""

RATE = 16_000  # samples a second, mono PCM16: the model accepts no other rate
FRAME = 1280  # samples of audio that one delta transcribes: 80 ms
PROMPT_TOKENS = 33  # with which a session begins; those of the delay follow: 6 at 480 ms, 30 at most
PROMPT_RESERVE = 80  # tokens of a session that are not for frames: the longest prompt, and reserve
DEFAULT_URL = "ws://localhost:8000/v1/realtime"


def key_fault(key: str) -> str:
    """Return what keeps `key` out of an HTTP header, as RFC 9110 and vLLM read it, "" if nothing."""
    if wrong := next((c for c in key if not " " <= c <= "~"), ""):
        return f"character {key.index(wrong) + 1} is {wrong!a}, which a header cannot carry: remove it"
    return "begins or ends with a space: remove it" if key != key.strip() else ""
