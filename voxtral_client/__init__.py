"""Client side of vLLM's realtime endpoint: audio in, words with times out.

`session` implements the protocol, `timeline` stores the words and their times, `transcriber` combines both into one
transcription over several sessions. Nothing here imports torch or vllm.
"""

__version__ = "1.0.0"
