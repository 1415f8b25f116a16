"""What the study's results say: mean, spread and failures, and the difference to the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study.data import SETS
from benchmarks.study.strategies import BASELINE, STRATEGIES

COLUMNS = {
    "strategy": "strategy",
    **{name: name for name in SETS},
    "difference": "mean difference (95 %)",
    "failures": "failed",
    "cpu_s": "CPU seconds",
}
_RESAMPLES = 2000


def summarise(results: Sequence[Mapping[str, Any]], *, part: str) -> list[dict[str, Any]]:
    """Return a row of the table for each strategy with results.

    Scores are in percent. Time is the mean CPU time of a run and set, its start included: other
    jobs of the machine change it less than that of a clock. The difference is the mean over (set,
    seed) pairs of score minus the baseline's score of the same pair, its interval a bootstrap over
    these pairs (Efron 1979); pairs that only one of the two has are left out.
    """
    mine = [r for r in results if r["part"] == part]
    base = _scores(mine, BASELINE)
    rows: list[dict[str, Any]] = []
    for strategy in STRATEGIES:
        own = [r for r in mine if r["strategy"] == strategy]
        if not own:
            continue
        scores = _scores(mine, strategy)
        row: dict[str, Any] = {"strategy": strategy}
        for name in SETS:
            row[name] = _spread([s for (where, _), s in scores.items() if where == name])
        row["difference"] = _difference(scores, base) if strategy != BASELINE else None
        row["failures"] = f"{sum(r['failed'] for r in own)} of {len(own)}"
        times = [r["cpu_s"] for r in own if r["score"] is not None]
        row["cpu_s"] = round(statistics.mean(times), 1) if times else None
        rows.append(row)
    return rows


def _scores(results: Sequence[Mapping[str, Any]], strategy: str) -> dict[tuple[str, int], float]:
    return {
        (r["set"], r["seed"]): 100 * r["score"]
        for r in results
        if r["strategy"] == strategy and r["score"] is not None
    }


def _spread(scores: Sequence[float]) -> str | None:
    if not scores:
        return None
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def _difference(
    scores: Mapping[tuple[str, int], float], base: Mapping[tuple[str, int], float]
) -> str | None:
    pairs = np.array([scores[key] - base[key] for key in sorted(scores.keys() & base.keys())])
    if not len(pairs):
        return None
    draw = np.random.default_rng(0).integers(0, len(pairs), (_RESAMPLES, len(pairs)))
    low, high = np.percentile(pairs[draw].mean(1), [2.5, 97.5])
    return f"{pairs.mean():+.1f} ({low:+.1f} to {high:+.1f})"
