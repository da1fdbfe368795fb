"""A frame's audio and its encoder output on the GPU are freed as soon as the frame is in the KV cache.

vLLM: it keeps the audio of every frame in `Request.mm_features` until the session ends. It keeps the encoder's output
until the encoder cache (32,768 embeddings) is full: a freed output only becomes available for replacement.
Cost: 3 MiB of host memory a minute and session, and up to 480 MiB on the GPU that are not reserved at the start.
Relies on: a session is never computed again. vLLM computes a preempted request again: `ended` ends such a session.
Without prefix caching a spent frame keeps only its position (`Spent`). With it the frame also keeps its identifier,
which block hashes need.
Unnecessary with: vllm#50871.
"""

from . import need
from .frames import Frames, Spent

CHECKED = {
    "vllm.v1.core.sched.scheduler:Scheduler._free_encoder_input": "d015877ed844",
    "vllm.v1.core.encoder_cache_manager:EncoderCacheManager.free_encoder_input": "221235ce752d",
}


def apply_to_engine() -> None:
    """Release what a frame in the KV cache holds. Raises Unexpected."""
    from vllm.v1.core.sched.scheduler import Scheduler

    need("ended")
    free = Scheduler._free_encoder_input

    def free_and_release(self, request, input_id):
        free(self, request, input_id)
        frames = request.mm_features
        if type(frames) is not Frames:
            return
        frame = frames[input_id]
        forget_encoder_output(self.encoder_cache_manager, frame.identifier)
        frames.spent += 1
        if request._block_hasher is None and frame.mm_position.length == 1:
            frames[input_id] = Spent(frame.mm_position.offset)
        else:
            frame.data = None

    Scheduler._free_encoder_input = free_and_release


def forget_encoder_output(cache, identifier: str) -> None:
    """Make the worker free an encoder output that no request uses."""
    if cache.cached.get(identifier) or identifier not in cache.freeable:
        return
    size = cache.freeable.pop(identifier)
    del cache.cached[identifier], cache.num_embeds_by_hash[identifier]
    cache.freed.append(identifier)
    cache.num_free_slots += size
