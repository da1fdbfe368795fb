"""The frames of a session, as the patches of the scheduler see them.

In vLLM a realtime session is one `Request` that grows by one frame (80 ms of audio, one token) at a time. Its
`mm_features` is a list with one `MultiModalFeatureSpec` for each frame. vLLM finds entries by index and by bisection
over positions: an entry may become small, but must stay. `mark_sessions` turns this list into a `Frames`. The patches
recognize a session of Voxtral Realtime by this type.
"""

from voxtral_int4 import is_voxtral_realtime

from . import expect


class Frames(list):
    """The features of one session. `spent`: how many frames have lost their audio and cannot be computed again."""

    spent = 0


class Spent(int):
    """What remains of a frame that is in the KV cache: its position in tokens. It takes 44 bytes.

    It has those attributes of MultiModalFeatureSpec and PlaceholderRange that vLLM reads from such a frame.
    """

    __slots__ = ()
    data = None
    modality = "audio"
    length = 1

    @property
    def mm_position(self) -> "Spent":
        return self

    @property
    def offset(self) -> int:
        return int(self)


def is_late(model_config, request, known: dict) -> bool:
    """Return whether a request is a frame, or the end, of a session that is not `known` any more. Both are one token.

    A session's first request is its prompt. In vLLM a late frame becomes a new session.
    """
    late = len(request.prompt_token_ids or ()) == 1 and request.request_id not in known
    return late and is_voxtral_realtime(model_config)


def mark_sessions() -> None:
    """Make every new session of Voxtral Realtime keep its features in `Frames`, and drop late frames.

    Raises Unexpected.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    expect("vllm.v1.core.sched.scheduler:Scheduler.add_request", "fa2b51cd04a9")
    add_request = Scheduler.add_request

    def marked(self, request):
        if is_late(self.vllm_config.model_config, request, self.requests):
            return
        grows = request.resumable and type(request.mm_features) is list
        if grows and is_voxtral_realtime(self.vllm_config.model_config):
            request.mm_features = Frames(request.mm_features)
        add_request(self, request)

    Scheduler.add_request = marked
