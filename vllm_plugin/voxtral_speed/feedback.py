"""A frame that waits in the engine follows the previous one at once. Its token stays on the GPU.

vLLM: each frame is a request that stops after one token and resumes with the next frame. The next frame is scheduled
when its token has been on the host: between two frames the GPU waits for the scheduler, and the scheduler for the GPU.
Ordinary decoding does not wait: with async scheduling the next step reads the last token on the GPU.
Cost: on an H100 4.6 of 11.8 ms a frame with one session, 38 % of the throughput with eight.
Here: while a step runs, the next frame of its sessions becomes part of their requests, and the request goes on as in
ordinary decoding. The API process is told that the previous frame has ended, as before.
Relies on: async scheduling and model runner V2 (on GPUs); the worker reads the scheduler's own list of frames
(`features`); the token in a frame's request is the session's own (`ahead`); `ended`, which checks `schedule` and
`update_from_output`.
Unnecessary with: realtime models whose tokens are fed back in the engine (no issue known).
"""

from dataclasses import replace

from . import active, need
from .frames import Frames

CHECKED = {
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": "157edcf67cd3",
    "vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request": "9a77c9522634",
    "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs": "5b35ef24b51e",
}


def apply_to_engine() -> None:
    """Go on with a session in place of ending and resuming its request. Raises Unexpected."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import FinishReason

    need("features", "release", "ended", "ahead")
    update_request = AsyncScheduler._update_request_with_output

    def schedule(self, *args, **kwargs):
        usual = self.use_v2_model_runner and not self.num_spec_tokens and not self.kv_cache_manager.enable_caching
        if usual and active("features"):
            follow_on(self)
        return Scheduler.schedule(self, *args, **kwargs)

    def update_and_go_on(self, request, new_token_ids, is_stale=False):
        tokens, stopped = update_request(self, request, new_token_ids, is_stale)
        if type(request.mm_features) is not Frames or not request.num_output_placeholders:
            return tokens, stopped
        reason = request.get_finished_reason() if stopped else FinishReason.LENGTH
        self.__dict__.setdefault("frames_ended", {})[request.request_id] = reason
        if stopped:  # the model has written the token that ends a text: a session goes on
            request.status = type(request.status).RUNNING
        return tokens, False

    def update_from_output(self, *args, **kwargs):
        outputs = Scheduler.update_from_output(self, *args, **kwargs)
        if ended := self.__dict__.pop("frames_ended", None):
            for of_client in outputs.values():
                for output in of_client.outputs:
                    if output.finish_reason is None:
                        output.finish_reason = ended.get(output.request_id)
        return outputs

    AsyncScheduler.schedule, AsyncScheduler.update_from_output = schedule, update_from_output
    AsyncScheduler._update_request_with_output = update_and_go_on


def follow_on(scheduler) -> None:
    """Give each session whose last token is being computed its next frame, if one waits and memory is not scarce."""
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    if free < 2 * len(scheduler.running) * len(scheduler.kv_cache_config.kv_cache_groups):
        return  # a session that gets no block must wait, not be preempted
    for session in scheduler.running:
        if type(session.mm_features) is not Frames or not session.streaming_queue:
            continue
        frame, computed = session.streaming_queue[0], session.num_computed_tokens
        last = session.num_tokens + session.num_output_placeholders - 1
        if (
            frame is None
            or len(frame.prompt_token_ids or ()) != 1
            or len(frame.mm_features or ()) != 1
            or not session.num_output_placeholders
            or computed != last
            or computed + 2 >= scheduler.max_model_len
        ):
            continue
        session.streaming_queue.popleft()
        (feature,) = frame.mm_features
        feature.mm_position = replace(feature.mm_position, offset=computed)
        session.mm_features.append(feature)
        session.max_tokens += 1
