"""The worker gets a session's list of frames itself, not a copy.

vLLM: for each frame, `NewRequestData.from_request` calls `strip_covered_mm_data` (vllm/multimodal/utils.py). It builds
a new list of all frames of the session, with a copy of each frame that is already in the KV cache.
Cost: 0.85 to 2 µs for each frame of the session, in every step: 34 ms at 43 minutes, 120 ms with eight sessions of 10
minutes.
Relies on: a worker in the scheduler's process that only reads the list. For a worker in another process the list is
pickled, and stripping it is right: the patch is then off. serve.sh chooses the executor `uni` for this reason.
Unnecessary with: a fix of vllm#58324. The fault came with vllm#52041, and is in 0.33.0 too.
"""

from . import turn_off
from .frames import Frames

CHECKED = {
    "vllm.v1.core.sched.output:strip_covered_mm_data": "60c43fcae113",
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": "c02680245672",
}


def apply_to_engine() -> None:
    """Do not copy the list of a session of Voxtral Realtime."""
    from vllm.v1.core.sched import output
    from vllm.v1.core.sched.scheduler import Scheduler

    strip, init = output.strip_covered_mm_data, Scheduler.__init__

    def strip_others(features, num_computed_tokens, uses_mrope=False):
        if type(features) is Frames:
            return features
        return strip(features, num_computed_tokens, uses_mrope=uses_mrope)

    def patch_if_shared(self, vllm_config, *args, **kwargs):
        parallel = vllm_config.parallel_config
        if parallel.distributed_executor_backend == "uni" and parallel.world_size == 1:
            output.strip_covered_mm_data = strip_others
        else:
            turn_off("features", "the worker runs in its own process")
        init(self, vllm_config, *args, **kwargs)

    Scheduler.__init__ = patch_if_shared
