"""A session's list of frames goes to the worker as it is.

vLLM: for each frame `NewRequestData.from_request` calls `strip_covered_mm_data` (vllm/multimodal/utils.py), which
builds a new list of all the session's frames so far, with a copy of each that is in the KV cache already.
Cost: 0.85 to 2 µs a frame of the session, in every step: 34 ms at 44 minutes, 120 ms with eight sessions of 10
minutes.
Relies on: the worker in the scheduler's process (else the list would be pickled, and stripping it is right), and
workers that only read the list.
Needless with: a fix of vllm#58324. It came with vllm#52041, and is in 0.33.0 too.
"""

from . import expect, step_aside
from .frames import Frames, mark_sessions


def apply_to_engine() -> None:
    """Raises Unexpected."""
    from vllm.v1.core.sched import output
    from vllm.v1.core.sched.scheduler import Scheduler

    strip, init = output.strip_covered_mm_data, Scheduler.__init__
    expect(strip, "60c43fcae113")
    expect(init, "c02680245672")
    mark_sessions()

    def strip_others(features, num_computed_tokens, uses_mrope=False):
        if type(features) is Frames:
            return features
        return strip(features, num_computed_tokens, uses_mrope=uses_mrope)

    def patch_if_shared(self, vllm_config, *args, **kwargs):
        parallel = vllm_config.parallel_config
        if parallel.distributed_executor_backend == "uni" and parallel.world_size == 1:
            output.strip_covered_mm_data = strip_others
        else:
            step_aside("features", "the worker runs in a process of its own")
        init(self, vllm_config, *args, **kwargs)

    Scheduler.__init__ = patch_if_shared
