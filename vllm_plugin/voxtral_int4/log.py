"""The server's log states in one sentence for how many sessions there is memory.

vLLM logs this line in the engine's process, from vllm/v1/core/kv_cache_utils.py:
"GPU KV cache size: 105,294 tokens, Maximum concurrency for 32,768 tokens per request: 3.21x".
"""

import logging

MESSAGE = "%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx"
FRAME_MINUTES = 0.08 / 60  # one token of a realtime session is 80 ms of audio


class Sentence(logging.Filter):
    """Replaces vLLM's line by one in sessions and minutes. Other lines pass unchanged."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg == MESSAGE and len(record.args) == 4:
            device, tokens, length, sessions = record.args
            minutes = int(length.replace(",", "")) * FRAME_MINUTES
            record.msg = "Memory for %.1f sessions of %d minutes at once, or more short ones (%s KV cache: %s tokens)"
            record.args = (sessions, minutes, device, tokens)
        return True
