"""Computes whether the model fits into the GPU's memory. vLLM itself reports it only after a minute or two.

vLLM uses the share GPU_MEMORY_UTILIZATION of the GPU. What the weights and vLLM's own work leave is for the sessions,
in blocks of 16 MiB. A block is 16 frames of the audio encoder's cache, or 128 of the decoder's, for 32 layers each
(the decoder's 26 are padded; vllm/v1/core/kv_cache_utils.py). For one session vLLM reserves the sliding windows and
the frames of two steps:

    decoder  min(8191 + 2 B, L) / 128 + 1 blocks      L = MAX_MODEL_LEN, B = MAX_NUM_BATCHED_TOKENS,
    encoder  min( 188 + 2 B, L) /  16 + 1 blocks      both in frames of 80 ms

The result agrees with measurements on an H100: with 12 GiB, INT4, L = 32768, B = 88 there were 474 blocks for
sessions of 91, printed as 170,681 tokens or 5.2 sessions. (On an H200 B = 512 with fewer graphs gave 482 blocks for
sessions of 150, or 3.2 sessions.) vLLM reserves memory for a CUDA graph of each size of step, 1, 2, 4, 8, 16 and so
on up to B: 0.30 GiB for the 14 sizes of B = 88, 0.72 for the 38 of B = 304. The remainder (CUDA's context,
activations) is fitted to the first of these measurements: 1.2 GiB. On a smaller GPU it may be less.
"""

import math
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from . import Stop
from .settings import Settings
from .weights import is_full_size

GIB = 2**30
BLOCK = 16 * 2**20  # bytes
WEIGHTS = {"bitsandbytes": 3.06, "none": 8.43, "mxfp4": 2.93, "fp8": 4.88}  # GiB on the GPU
WEIGHTS_BF16_ENCODER = 4.3  # bitsandbytes with VOXTRAL_INT4_ENCODER=0
OTHER = 1.2  # GiB, without graphs
OTHER_AT_LEAST = 0.6  # GiB; if only this fits, the start continues with a warning
GRAPHS, GRAPH = 0.05, 0.018  # GiB: for all graphs together, and for each size of step
SHARE_AT_MOST = 0.95
SMALL, SMALL_SESSIONS = 12.5, 8  # GiB; sessions for which real time was computed (docs/performance.md, RTX 3060)


@dataclass(frozen=True)
class Plan:
    """What decides how many sessions fit."""

    weights: float  # GiB
    total: float  # the GPU's memory in bytes
    share: float  # GPU_MEMORY_UTILIZATION
    length: int  # MAX_MODEL_LEN
    batch: int  # MAX_NUM_BATCHED_TOKENS

    @property
    def blocks_of_a_session(self) -> int:
        decoder = math.ceil(min(8191 + 2 * self.batch, self.length) / 128) + 1
        encoder = math.ceil(min(188 + 2 * self.batch, self.length) / 16) + 1
        return decoder + encoder

    @property
    def graphs(self) -> float:
        """GiB for CUDA graphs. Sizes of steps: `max_cudagraph_capture_size` in vllm/config/compilation.py."""
        return GRAPHS + GRAPH * (3 + min(self.batch, 256) // 8 + max(0, self.batch - 256) // 16)

    def sessions(self, other: float = OTHER) -> float:
        """Return how many of the longest sessions fit at once; 0 if less than one fits beside vLLM's own block."""
        blocks = (self.share * self.total - (self.weights + self.graphs + other) * GIB) // BLOCK
        return 0.0 if blocks < self.blocks_of_a_session + 1 else blocks / self.blocks_of_a_session

    def needed(self) -> float:
        """Return the GiB that one session of full length requires, weights included."""
        return self.weights + self.graphs + OTHER + (self.blocks_of_a_session + 1) * BLOCK / GIB


def check(settings: Settings, free: int, total: int) -> None:
    """Print on stderr how many sessions fit. `free` and `total`: MiB. Raises Stop if none fits."""
    share = settings.number("GPU_MEMORY_UTILIZATION")
    plan = plan_of(settings, total)
    most = math.floor(100 * free / total) / 100
    if free < share * total:
        fix = f"or set {settings.assignment('GPU_MEMORY_UTILIZATION', f'{most:.2f}')}"
        if plan and not (smaller := suggestion(settings, replace(plan, share=most), most)):
            fix = f"{Plan.needed(replace(plan, length=2048, batch=128)):.1f} GiB is the least that can work"
        elif plan:
            fix = f"or set {smaller}"
        raise Stop(
            f"{free} of {total} MiB of GPU memory are free, but {share * total:.0f} must be: "
            f"end other programs on the GPU (see nvidia-smi), {fix}"
        )
    if plan is None:
        return
    if total < SMALL * 1024 and (settings.number("MAX_NUM_SEQS") or 0) > SMALL_SESSIONS:
        fewer = settings.assignment("MAX_NUM_SEQS", SMALL_SESSIONS)
        print(f"warning: more live sessions than {fewer} may fall behind on a GPU of 12 GB (computed)", file=sys.stderr)
    minutes, work = int(plan.length * 0.08 / 60), OTHER + plan.graphs
    if not plan.sessions():
        fix = suggestion(settings, plan, min(most, SHARE_AT_MOST))
        fix = f"set {fix}" if fix else "this GPU is too small; QUANTIZATION=bitsandbytes needs the least"
        text = (
            f"{share * total / 1024:.1f} GiB of GPU memory are to be used, but {plan.needed():.1f} are needed: "
            f"{plan.weights:.1f} for the weights, {work:.1f} for vLLM's work, "
            f"{plan.blocks_of_a_session * BLOCK / GIB:.1f} for one session of {minutes} min: {fix}"
        )
        if not plan.sessions(OTHER_AT_LEAST):
            raise Stop(text)
        print(f"warning: this may not fit: {text}", file=sys.stderr)
        return
    print(
        f"{share * total / 1024:.1f} GiB of GPU memory: {plan.weights:.1f} for the weights, about {work:.1f} for "
        f"vLLM's work, the rest holds about {plan.sessions():.1f} sessions of {minutes} min at once",
        file=sys.stderr,
    )


def plan_of(settings: Settings, total: int) -> Plan | None:
    """Return the plan. None: another model or method, or a notation that only vLLM reads. `total`: MiB."""
    weights = WEIGHTS.get(settings["QUANTIZATION"])
    if settings["QUANTIZATION"] == "bitsandbytes" and settings["VOXTRAL_INT4_ENCODER"] == "0":
        weights = WEIGHTS_BF16_ENCODER
    share, length, batch = map(settings.number, ("GPU_MEMORY_UTILIZATION", "MAX_MODEL_LEN", "MAX_NUM_BATCHED_TOKENS"))
    known = weights and share and length and batch and settings["KV_CACHE_DTYPE"] in ("", "auto", "bfloat16")
    if not known or not is_full_size(settings["MODEL"], Path(settings["MODEL"])):
        return None
    return Plan(weights, total * 2**20, share, int(length), int(batch))


def suggestion(settings: Settings, plan: Plan, most: float) -> str:
    """Return the smallest change of settings that fits, as the user writes it, or "". `most`: the highest share."""
    batch = min(plan.batch, max(128, int(settings.number("MAX_NUM_SEQS") or 128)))
    for weights, length, frames, share in product(
        (plan.weights, WEIGHTS["bitsandbytes"]),
        (plan.length, 16384, 8192, 4096, 2048),
        (plan.batch, batch),
        (plan.share, max(plan.share, most)),
    ):
        if length > plan.length or weights > plan.weights:
            continue
        if Plan(weights, plan.total, share, length, frames).sessions():
            changes = {
                "QUANTIZATION": weights != plan.weights and "bitsandbytes",
                "GPU_MEMORY_UTILIZATION": share != settings.number("GPU_MEMORY_UTILIZATION") and f"{share:.2f}",
                "MAX_NUM_BATCHED_TOKENS": frames != plan.batch and frames,
                "MAX_MODEL_LEN": length != plan.length and length,
            }
            return " ".join(settings.assignment(name, value) for name, value in changes.items() if value)
    return ""
