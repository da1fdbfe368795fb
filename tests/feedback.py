"""vLLM's own async scheduler with sessions of frames and a model that is a formula. Run by test_speed.py.

    feedback.py CHECKPOINT

It prints a line of JSON without and one with the patch `feedback`: for each session its tokens and finish reasons, and
how many steps were scheduled while another one ran.
"""

import importlib
import json
import multiprocessing
import sys
from collections import deque
from types import SimpleNamespace
from unittest import mock

CHECKPOINT, SESSIONS, FRAMES, PROMPT, EOS = sys.argv[1], 3, 70, 39, 2


def make_scheduler():
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    options = {"tokenizer_mode": "mistral", "config_format": "mistral", "load_format": "mistral"}
    config = EngineArgs(
        CHECKPOINT, dtype="bfloat16", max_model_len=1024, max_num_seqs=4, enable_prefix_caching=False, **options
    ).create_engine_config()
    config.scheduler_config.async_scheduling = True
    config.cache_config.num_gpu_blocks = 1000
    config.parallel_config.distributed_executor_backend = "uni"
    groups = [
        KVCacheGroupSpec([name], FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.bfloat16))
        for name in ("decoder", "encoder")
    ]
    cache = KVCacheConfig(num_blocks=1000, kv_cache_tensors=[], kv_cache_groups=groups)
    scheduler = AsyncScheduler(config, cache, mock.MagicMock(), block_size=16)
    scheduler.use_v2_model_runner = True
    return scheduler


def frame(session: int, number: int, tokens: int):
    """A request as the API process makes it: one chunk of a session."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=1, temperature=0.0)
    params._eos_token_id = EOS
    feature = MultiModalFeatureSpec({"frame": number}, "audio", f"{session}-{number}", PlaceholderRange(0, tokens))
    return Request(f"s{session}", [0] * tokens, params, None, mm_features=[feature], resumable=True)


def run() -> None:
    from vllm.v1.outputs import ModelRunnerOutput

    scheduler = make_scheduler()
    waiting = {s: deque(frame(s, n, PROMPT if n == 0 else 1) for n in range(FRAMES)) for s in range(SESSIONS)}
    texts = {s: [] for s in waiting}
    rows, flight, overlapped, ahead = {}, deque(), 0, {s: 0 for s in waiting}
    for step in range(2000):
        for s, frames in waiting.items():
            # Session 0 always has frames in the engine, 1 sometimes, 2 is live: one frame every fifth step.
            room = {0: 4, 1: 3 if step % 20 < 10 else 0, 2: step % 5 == 0}[s]
            while frames and ahead[s] < room:
                scheduler.add_request(frames.popleft())
                ahead[s] += 1
        output = scheduler.schedule()
        if output.num_scheduled_tokens:
            overlapped += bool(flight)
            flight.appendleft((output, compute(output, rows)))
            if len(flight) < 2:
                continue
        elif not flight:
            if not any(waiting.values()):
                break
            continue
        done, sampled = flight.pop()
        ids = list(done.num_scheduled_tokens)
        result = ModelRunnerOutput(ids, {r: n for n, r in enumerate(ids)}, [[sampled[r]] for r in ids])
        for client in scheduler.update_from_output(done, result).values():
            for item in client.outputs:
                s = int(item.request_id[1:])
                ahead[s] -= 1
                texts[s].append([*item.new_token_ids, str(item.finish_reason)])
    print(json.dumps({"texts": texts, "overlapped": overlapped, "left": sum(map(len, waiting.values()))}))


def compute(output, rows: dict) -> dict[str, int]:
    """What a worker does: the token of a frame follows from its number, its position and the token before it."""
    for new in output.scheduled_new_reqs:
        row = rows.setdefault(new.req_id, SimpleNamespace(features=None, last=None))
        row.features, start = new.mm_features, new.num_computed_tokens
        row.fed, row.start = (new.prefill_token_ids or new.prompt_token_ids)[start], start
    for r, start in zip(
        output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True
    ):
        rows[r].fed, rows[r].start = rows[r].last, start
    sampled = {}
    for r, count in output.num_scheduled_tokens.items():
        row = rows[r]
        (number,) = output.scheduled_encoder_inputs[r]
        feature = row.features[number]
        assert feature.mm_position.offset == row.start and feature.mm_position.length == count
        data = feature.data["frame"]
        token = (7 * data + 13 * row.fed + row.start + int(r[1:])) % 900 + 3
        row.last = sampled[r] = EOS if data % 23 == 11 else token
    return sampled


def main() -> None:
    import voxtral_speed
    from vllm.platforms import current_platform

    multiprocessing.current_process().name = "EngineCore"
    for name in voxtral_speed.SCHEDULER + voxtral_speed.WORKER + voxtral_speed.SERVER:  # also those of a GPU
        for checked in importlib.import_module(f"voxtral_speed.{name}").CHECKED.items():
            voxtral_speed.expect(*checked)
    voxtral_speed.register()
    run()
    with mock.patch.object(type(current_platform), "is_cpu", lambda self: False):
        assert voxtral_speed._apply(("feedback",), "apply_to_engine") == ["feedback"]
    run()


if __name__ == "__main__":
    main()
