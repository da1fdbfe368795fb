"""The worker on a CPU keeps a session's tokens as an array, and does not convert the complete list for each frame.

vLLM (model runner V1, which CPUs use): `InputBatch.add_request` copies all tokens of the session from a Python list.
Cost: 0.46 ms a session and frame after 44 minutes. From an array it is a copy of 128 KiB, which takes some µs.
Relies on: the list of tokens only grows; the readers of `CachedRequestState.prompt_token_ids` accept any sequence.
Unnecessary with: model runner V2 on CPUs.
"""

import numpy as np

from . import expect
from .frames import Frames, mark_sessions


def apply_to_engine() -> bool | None:
    """Return False on a GPU, which uses model runner V2. Raises Unexpected."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    expect(GPUModelRunner._update_streaming_request, "8d44859eaaec")
    expect(InputBatch.add_request, "33b3f53b9b19")
    mark_sessions()
    update = GPUModelRunner._update_streaming_request

    def update_with_array(self, req_id, new_req_data):
        known = self.requests[req_id].__dict__.get("token_array")
        state = update(self, req_id, new_req_data)
        if type(new_req_data.mm_features) is Frames:
            known = state.token_array = known or Tokens()
            state.prompt_token_ids = known.follow(new_req_data.prompt_token_ids)
        return state

    GPUModelRunner._update_streaming_request = update_with_array
    return None


class Tokens:
    """An array that follows a growing list."""

    def __init__(self) -> None:
        self._array, self._count = np.empty(1024, np.int32), 0

    def follow(self, tokens: list[int]) -> np.ndarray:
        """Return `tokens` as int32, shape (tokens,). It must begin with the tokens of the last call."""
        if len(tokens) > len(self._array):
            self._array = np.resize(self._array, 2 * len(tokens))
        self._array[self._count : len(tokens)] = tokens[self._count :]
        self._count = len(tokens)
        return self._array[: self._count]
