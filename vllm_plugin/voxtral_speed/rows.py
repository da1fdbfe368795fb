"""A session keeps its row in the worker's tables on the GPU. Only new data is written into the row.

vLLM (model runner V2, v1/worker/gpu/): a frame arrives as a new request. `add_requests` frees the session's row,
allocates one again, and stages all its tokens, block numbers and sampling parameters again, one session after the
other.
Cost: 0.14 ms a session and step after 10 minutes, 0.5 ms after 43 minutes, about 50 µs at the beginning: 12 % of the
engine's main thread with 48 live streams.
Relies on: the request keeps its row, which holds its earlier tokens and blocks; the sampling parameters of a session do
not change (the realtime endpoint has one set); no feature is on that keeps more state for a request (LoRA, pooling,
M-RoPE, prompt embeddings, prompt logprobs, pipeline parallelism, trace replay, elastic expert parallelism).
Unnecessary with: an update of streaming requests in place in vLLM (no issue known).
"""

from types import SimpleNamespace

from . import turn_off
from .frames import Frames

CHECKED = {
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests": "8321187d017e",
    "vllm.v1.worker.gpu.states:RequestState.add_request": "7feb34eb03ec",
    "vllm.v1.worker.gpu.block_table:BlockTables.append_block_ids": "93b3f2aae948",
    "vllm.v1.worker.gpu.sample.sampler:Sampler.add_request": "91f708bafa77",
}


def apply_to_engine() -> None:
    """Continue sessions in their rows."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    add_requests = GPUModelRunner.add_requests

    def add_all(self, scheduler_output):
        usual = self.__dict__.get("keeps_rows")
        if usual is None:
            usual = self.keeps_rows = not keeps_more_state(self)
            if not usual:
                turn_off("rows", "the worker keeps more state for a request")
        new = scheduler_output.scheduled_new_reqs
        going = [request for request in new if goes_on(self, request)] if usual else []
        if not going:
            return add_requests(self, scheduler_output)
        continue_sessions(self, going)
        if len(going) == len(new):
            return self.req_states.apply_staged_writes()
        ids = {request.req_id for request in going}
        others = [request for request in new if request.req_id not in ids]
        return add_requests(self, SimpleNamespace(scheduled_new_reqs=others))

    GPUModelRunner.add_requests = add_all


def keeps_more_state(runner) -> bool:
    """Return whether a request has state in the worker that this patch does not handle."""
    state = runner.model_state
    return bool(
        runner.adaptive_verification is not None
        or runner.pooling_runner is not None
        or runner.pp_handler is not None
        or runner.lora_config is not None
        or runner.encoder_cache is None
        or not runner.is_last_pp_rank
        or runner.req_states.num_speculative_steps
        or type(state).__name__ != "DefaultModelState"
        or state.rope_state is not None
        or state.prompt_embeds_state is not None
    )


def goes_on(runner, request) -> bool:
    """Return whether a request is the next frame of a session whose row holds all earlier frames."""
    row = runner.req_states.req_id_to_index.get(request.req_id)
    if row is None or type(request.mm_features) is not Frames:
        return False
    computed = request.num_computed_tokens
    # The row must hold the computed tokens: staged before, or sampled (`feedback`), at most one after the last step's
    # first. The number of blocks may only have grown.
    states = runner.req_states
    if not 0 < computed <= max(states.prefill_len.np[row], states.num_computed_tokens_np[row] + 1):
        return False
    counts = runner.block_tables.num_blocks.np[:, row]
    return all(len(ids) >= count for ids, count in zip(request.block_ids, counts, strict=True))


def continue_sessions(runner, requests: list) -> None:
    """Stage the new tokens and blocks of sessions that go on."""
    states, tables = runner.req_states, runner.block_tables
    rows = [states.req_id_to_index[request.req_id] for request in requests]
    computed = [request.num_computed_tokens for request in requests]
    lengths = [len(request.prefill_token_ids) for request in requests]
    prompts = [request.prompt_len for request in requests]
    states.max_seq_len[rows] = [p + r.sampling_params.max_tokens for p, r in zip(prompts, requests, strict=True)]
    states.prompt_len.np[rows] = prompts
    states.prefill_len.np[rows] = lengths
    states.num_computed_prefill_tokens[rows] = computed
    states.num_computed_tokens_np[rows] = computed
    for row, request, done, length in zip(rows, requests, computed, lengths, strict=True):
        states.total_len.stage_write_elem(row, length)
        states.num_computed_tokens.stage_write_elem(row, done)
        states.all_token_ids.stage_write(row, done, request.prefill_token_ids[done:])
        runner.encoder_cache.mm_features[request.req_id] = request.mm_features
        for group, ids in enumerate(request.block_ids):
            count = int(tables.num_blocks.np[group, row])
            if len(ids) > count:
                tables.block_tables[group].stage_write(row, count, ids[count:])
                tables.num_blocks.np[group, row] = len(ids)
