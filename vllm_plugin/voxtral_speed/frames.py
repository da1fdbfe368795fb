"""The frames of a session, as the patches of the scheduler see them.

In vLLM a realtime session is one `Request` that grows by one frame (80 ms of audio, one token) at a time. Its
`mm_features` is a list with one `MultiModalFeatureSpec` for each frame. vLLM finds entries by index and by bisection
over positions: an entry may become small, but must stay. `mark_sessions` turns this list into a `Frames`. The patches
recognize a session of Voxtral Realtime by this type.
"""

import functools

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


@functools.cache
def mark_sessions() -> None:
    """Make every new session of Voxtral Realtime keep its features in `Frames`. Raises Unexpected."""
    from vllm.v1.core.sched.scheduler import Scheduler

    add_request = Scheduler.add_request
    expect(add_request, "fa2b51cd04a9")

    def marked(self, request):
        grows = request.resumable and type(request.mm_features) is list
        if grows and is_voxtral_realtime(self.vllm_config.model_config):
            request.mm_features = Frames(request.mm_features)
        add_request(self, request)

    Scheduler.add_request = marked
