"""Client side of vLLM's realtime endpoint: audio in, words with times out.

`session` speaks the protocol, `timeline` keeps the words and their times, `transcriber` joins both into one
transcription that survives its sessions. Nothing here imports torch or vllm.
"""

__version__ = "1.0.0"


class UserError(Exception):
    """Something that the user can change; the message is one line that says what."""
