"""The server's log says in a sentence how many sessions fit.

vLLM prints, from vllm/v1/core/kv_cache_utils.py in the process of its engine, where the GPU's memory has
been counted: "GPU KV cache size: 105,294 tokens, Maximum concurrency for 32,768 tokens per request: 3.21x".
"""

import logging

MESSAGE = "%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx"
FRAME_MINUTES = 0.08 / 60  # one token of a realtime session is 80 ms of audio


class Sentence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg == MESSAGE and len(record.args) == 4:
            device, tokens, length, sessions = record.args
            minutes = int(length.replace(",", "")) * FRAME_MINUTES
            record.msg = (
                "Room for %.1f sessions of %.0f minutes at once, or more that are shorter (%s KV cache: %s tokens)"
            )
            record.args = (sessions, minutes, device, tokens)
        return True


def register() -> None:
    """Called by vLLM in every process, through the entry point `voxtral_room` of vllm.general_plugins."""
    logger = logging.getLogger("vllm.v1.core.kv_cache_utils")
    if not any(isinstance(known, Sentence) for known in logger.filters):
        logger.addFilter(Sentence())
