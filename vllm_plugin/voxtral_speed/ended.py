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
(3) The error reaches the client. Frames of the session that were still on their way are dropped (frames.py): each
    would begin a new session, which nobody ends.
Relies on: vLLM calls `update_from_output` after each `schedule`. It passes the ended sessions to the API process.
Unnecessary with: vllm#49439 for (1), 0.33.0 for (3).
"""

from http import HTTPStatus

from .frames import Frames, is_late

BUSY = "The engine is currently busy: its memory for sessions is full."
FULL = "The session was ended, because the memory for sessions is full: go on in a new one."


CHECKED = {
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": "da4f2cf2fc39",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "4113f5de8a84",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "85b29db96051",
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": "9e116796002e",
    "vllm.v1.engine.output_processor:OutputProcessor._finish_request": "976ff7fc6fd7",
    "vllm.v1.engine.async_llm:AsyncLLM._add_request": "588d66be1f23",
}


def apply_to_engine() -> None:
    """End sessions, and report it."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule, update, allocate = Scheduler.schedule, Scheduler.update_from_output, KVCacheManager.allocate_slots

    def allocate_and_note(self, request, *args, **kwargs):
        blocks = allocate(self, request, *args, **kwargs)
        if blocks is None:
            self.refused_request = request
        return blocks

    def schedule_and_end(self, *args, **kwargs):
        output = schedule(self, *args, **kwargs)
        refused = self.kv_cache_manager.__dict__.pop("refused_request", None)
        if refused and type(refused.mm_features) is Frames:
            make_room(self, refused)
        return output

    def update_and_report(self, *args, **kwargs):
        outputs = update(self, *args, **kwargs)
        report_ended(self, outputs)
        return outputs

    KVCacheManager.allocate_slots = allocate_and_note
    Scheduler.schedule, Scheduler.update_from_output = schedule_and_end, update_and_report


def make_room(scheduler, refused) -> None:
    """End what cannot go on after a step in which there was no block for the session `refused`."""
    from vllm.v1.request import RequestStatus

    sessions = [request for request in scheduler.requests.values() if type(request.mm_features) is Frames]
    preempted = [s for s in sessions if s.status is RequestStatus.PREEMPTED and s.mm_features.spent]
    for session in preempted:
        end(scheduler, session, FULL)
    if preempted or refused.is_finished() or scheduler.deferred_frees:
        return  # there are free blocks, now or soon
    if refused.num_computed_tokens == 0:
        end(scheduler, refused, BUSY)
    else:
        computed = [session for session in sessions if session.num_computed_tokens]
        end(scheduler, min(computed, key=lambda session: session.num_computed_tokens), FULL)


def end(scheduler, session, reason: str) -> None:
    """End a session; `report_ended` sends the reason to the client."""
    from vllm.v1.request import RequestStatus

    for request in scheduler.finish_requests(session.request_id, RequestStatus.FINISHED_ERROR):
        scheduler.__dict__.setdefault("ended_sessions", []).append((request, reason))


def report_ended(scheduler, outputs: dict) -> None:
    """Add the sessions that were ended to the outputs of a step."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    for request, reason in scheduler.__dict__.pop("ended_sessions", ()):
        of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
        finish = request.get_finished_reason()
        of_client.outputs.append(EngineCoreOutput(request.request_id, [], finish_reason=finish, stop_reason=reason))


def apply_to_server() -> None:
    """Pass the error on; drop late frames."""
    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    process, add_request = OutputProcessor.process_outputs, AsyncLLM._add_request

    def process_and_raise(self, engine_core_outputs, *args, **kwargs):
        failed = [o for o in engine_core_outputs if o.finish_reason is FinishReason.ERROR and is_session(self, o)]
        for output in failed:
            state = self.request_states[output.request_id]
            self._finish_request(state)
            message = output.stop_reason or "The engine has ended the session."
            state.queue.put(GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE))
        if failed:
            engine_core_outputs = [o for o in engine_core_outputs if o not in failed]
        return process(self, engine_core_outputs, *args, **kwargs)

    def is_session(processor, output) -> bool:
        state = processor.request_states.get(output.request_id)
        return state is not None and state.streaming_input and state.queue is not None

    async def add_known(self, request, *args, **kwargs):
        if not is_late(self.model_config, request, self.output_processor.request_states):
            await add_request(self, request, *args, **kwargs)

    OutputProcessor.process_outputs, AsyncLLM._add_request = process_and_raise, add_known
