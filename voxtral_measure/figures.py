"""The arithmetic of benchmark.py: figures from lags, and the search for the most streams."""

from collections import Counter
from collections.abc import Awaitable, Callable

import numpy as np

LATE_MS = 20.0  # sends later than this at the 95th percentile: the client is too slow to measure with
BUSY_CORE = 0.8  # share of a core


def spread(lags: list[float]) -> dict[str, float] | None:
    """Return p50, p95, p99 and max of `lags` (seconds) in milliseconds; None if there are none."""
    if not lags:
        return None
    values = 1000 * np.asarray(lags)
    figures = dict(zip(("p50", "p95", "p99"), np.percentile(values, (50, 95, 99)), strict=True)) | {"max": values.max()}
    return {name: round(float(value), 1) for name, value in figures.items()}


def summary(results: list[dict], streams: int, begin: float, end: float, paced: bool = True) -> dict:
    """Return the figures of one run from the results of its processes (voxtral_measure.streams.run).

    All streams ran from `begin` to `end` (seconds from the job's start); the last quarter is that of this span. Only
    paced streams have a lag, and only others `ms_per_frame`, a mean over all streams for each minute. Units are in the
    figures' names; "busy" and "broken" count streams.
    """
    lags = [pair for result in results for pair in result["lags"] if paced]
    late = [late for result in results for late in result["late"]]
    outcomes = [outcome for result in results for outcome in result["outcomes"]]
    minutes = [] if paced else [minutes for result in results for minutes in result["minutes"]]
    seconds = sum(sum(result["frames"]) for result in results) * 0.08
    cpu = sum(result["cpu"] for result in results)
    core = max(result["cpu"] / result["seconds"] for result in results)
    late_p95 = 1000 * float(np.percentile(late, 95)) if late else 0.0
    return {
        "streams": streams,
        "frames": sum(sum(result["frames"]) for result in results),
        "lag_ms": spread([lag for _, lag in lags]),
        "last_quarter_ms": spread([lag for at, lag in lags if end - (end - begin) / 4 <= at <= end]),
        "ms_per_frame": [round(float(np.mean(of_a_minute)), 2) for of_a_minute in zip(*minutes, strict=False)],
        "times_real_time": round(seconds / max(max(result["last"] for result in results), 0.001), 2),
        "busy": outcomes.count("busy"),
        "broken": dict(Counter(outcome for outcome in outcomes if outcome not in ("", "busy"))),
        "client": {
            "processes": len(results),
            "cpu_ms_per_stream_second": round(1000 * cpu / max(seconds, 0.08), 2),
            "busiest_core": round(core, 3),
            "late_p95_ms": round(late_p95, 1),
            "is_limit": late_p95 > LATE_MS or core > BUSY_CORE,
        },
    }


def unbroken(run: dict) -> bool:
    """Return whether all streams of a run lasted to its end."""
    return not run["busy"] and not run["broken"]


def holds(run: dict, max_lag: float) -> bool:
    """Return whether the server kept up: no stream broke, and the last quarter's p95 at most `max_lag` ms."""
    return unbroken(run) and run["last_quarter_ms"] is not None and run["last_quarter_ms"]["p95"] <= max_lag


async def find_limit(measure: Callable[[int], Awaitable[bool]], start: int = 1) -> int:
    """Return the most streams for which `measure(streams)` is true, by doubling, then bisecting; 0 if none are.

    Exact up to 16 streams, within a sixteenth above: every step costs a run.
    """
    good, bad = 0, None
    while bad is None or bad - good > max(1, good // 16):
        streams = max(start, 2 * good) if bad is None else (good + bad) // 2
        if await measure(streams):
            good = streams
        else:
            bad = streams
    return good
