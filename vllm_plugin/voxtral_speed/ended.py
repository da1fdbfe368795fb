"""A session for which there is no memory ends with an `error` event. Its client continues in a new session.

vLLM, when the KV cache is full:
(1) A session that waits for a block blocks all sessions behind it, forever and without a message, because sessions
    free their blocks only when they end.
(2) A running request may be preempted: vLLM frees its blocks and computes it again later. `release` has freed its
    audio, so the engine would fail ("Encoder cache miss").
(3) The API process treats the error of a session as the end of a frame, and waits forever.
Here:
(1) The session with the fewest frames ends, so that the others can finish. Its client continues in a new session, which
    is small at first. A new session gets the error that the server is busy.
(2) A preempted session that has lost audio ends.
(3) The error reaches the client.
Relies on: vLLM calls `update_from_output` after each `schedule`. It passes the ended sessions to the API process.
Unnecessary with: vllm#49439 for (1), 0.33.0 for (3).
"""

import functools
from http import HTTPStatus

from . import expect
from .frames import Frames, mark_sessions

BUSY, FULL = "voxtral: no memory for a new session", "voxtral: no memory left for this session"
MESSAGES = {
    BUSY: "The engine is currently busy: its memory for sessions is full.",
    FULL: "The session was ended, because the memory for sessions is full: go on in a new one.",
}


@functools.cache  # `release` calls it too
def apply_to_engine() -> None:
    """Raises Unexpected."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import RequestStatus

    expect(Scheduler.schedule, "da4f2cf2fc39")
    expect(Scheduler._preempt_request, "4113f5de8a84")
    expect(Scheduler.update_from_output, "85b29db96051")
    mark_sessions()
    schedule, preempt, update = Scheduler.schedule, Scheduler._preempt_request, Scheduler.update_from_output
    allocate = KVCacheManager.allocate_slots

    def end(scheduler, session, reason: str) -> None:
        for request in scheduler.finish_requests(session.request_id, RequestStatus.FINISHED_ERROR):
            scheduler.__dict__.setdefault("ended_sessions", []).append((request, reason))

    def end_preempted(scheduler) -> None:
        for request in scheduler.__dict__.pop("preempted_sessions", ()):
            if request.mm_features.spent and not request.is_finished():
                end(scheduler, request, FULL)

    def allocate_and_note(self, request, *args, **kwargs):
        blocks = allocate(self, request, *args, **kwargs)
        if blocks is None:
            self.refused_request = request
        return blocks

    def schedule_and_end(self, *args, **kwargs):
        end_preempted(self)
        output = schedule(self, *args, **kwargs)
        end_preempted(self)
        refused = self.kv_cache_manager.__dict__.pop("refused_request", None)
        if refused is None or type(refused.mm_features) is not Frames or refused.is_finished():
            return output
        if getattr(self, "deferred_frees", None):
            return output  # blocks will be freed soon
        if refused.num_computed_tokens == 0:
            end(self, refused, BUSY)
        else:
            sessions = [r for r in self.requests.values() if type(r.mm_features) is Frames and r.num_computed_tokens]
            end(self, min(sessions, key=lambda r: r.num_computed_tokens), FULL)
        return output

    def preempt_and_note(self, request, *args, **kwargs):
        preempt(self, request, *args, **kwargs)
        if type(request.mm_features) is Frames:
            self.__dict__.setdefault("preempted_sessions", []).append(request)

    def update_and_report(self, *args, **kwargs):
        outputs = update(self, *args, **kwargs)
        for request, reason in self.__dict__.pop("ended_sessions", ()):
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=reason,
                )
            )
        return outputs

    KVCacheManager.allocate_slots = allocate_and_note
    Scheduler.schedule, Scheduler._preempt_request = schedule_and_end, preempt_and_note
    Scheduler.update_from_output = update_and_report


def apply_to_server() -> None:
    """Raises Unexpected."""
    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    expect(OutputProcessor.process_outputs, "9e116796002e")
    expect(OutputProcessor._finish_request, "976ff7fc6fd7")
    process = OutputProcessor.process_outputs

    def process_and_raise(self, engine_core_outputs, *args, **kwargs):
        failed = [o for o in engine_core_outputs if o.finish_reason is FinishReason.ERROR and is_session(self, o)]
        for output in failed:
            state = self.request_states[output.request_id]
            self._finish_request(state)
            message = MESSAGES.get(output.stop_reason, "The engine has ended the session.")
            state.queue.put(GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE))
        if failed:
            engine_core_outputs = [o for o in engine_core_outputs if o not in failed]
        return process(self, engine_core_outputs, *args, **kwargs)

    def is_session(processor, output) -> bool:
        state = processor.request_states.get(output.request_id)
        return state is not None and state.streaming_input and state.queue is not None

    OutputProcessor.process_outputs = process_and_raise
