"""The frames of a session, as the patches of the scheduler see them.

In vLLM a realtime session is one `Request` that grows by a frame (80 ms of audio, one token) at a time. Its
`mm_features` is a list with one `MultiModalFeatureSpec` a frame, addressed by index and by bisection over positions:
an entry may become small, but must stay. `mark_sessions` makes a `Frames` of that list, by which the patches know a
session of Voxtral Realtime from every other request.
"""

import functools

from voxtral_int4 import is_voxtral_realtime

from . import expect


class Frames(list):
    """The features of one session. `spent`: how many have lost their audio, so that they cannot be computed again."""

    spent = 0


class Spent(int):
    """What remains of a frame that is in the KV cache: its position in tokens, in 44 bytes.

    It has the attributes of MultiModalFeatureSpec and PlaceholderRange that are read of such a frame.
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
    """Have every new session of Voxtral Realtime hold its features in `Frames`. Raises Unexpected."""
    from vllm.v1.core.sched.scheduler import Scheduler

    add_request = Scheduler.add_request
    expect(add_request, "fa2b51cd04a9")

    def marked(self, request):
        grows = request.resumable and type(request.mm_features) is list
        if grows and is_voxtral_realtime(self.vllm_config.model_config):
            request.mm_features = Frames(request.mm_features)
        add_request(self, request)

    Scheduler.add_request = marked
