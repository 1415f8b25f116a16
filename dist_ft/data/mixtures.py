"""Mixtures: the shares of the tasks in the steps of a run, by policy, and how to build one.

This module never imports torch.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dist_ft.data.block_mixture import BLOCK_STEPS, MIXTURE_ALGORITHM_VERSION, BlockMixture
from dist_ft.data.sampling import Mixture, RoundRobin

__all__ = [
    "MIXTURE_ALGORITHM_VERSION",
    "POLICIES",
    "BlockMixture",
    "annealed",
    "epochs_after",
    "examples_proportional",
    "fixed",
    "make_mixture",
    "temperature_scaled",
    "unimax",
]

_SHORTEST_BLOCK = 16

_Shares = list[list[float]]


def make_mixture(policy: str, *, rows: Sequence[int], seed: int = 0, **options: Any) -> Mixture:
    """Returns the mixture of a policy.

    Args:
        policy: a name in POLICIES, or "round_robin".
        rows: rows of each task's training data, in the recipe's task order.
        seed: the run's seed.
        options: arguments of the policy's function, see POLICIES.

    Raises:
        ValueError: the policy or an option is unknown, missing or out of range.
    """
    if not rows or min(rows) < 1:
        raise ValueError(f"a mixture needs tasks with at least 1 row each, got rows {list(rows)}")
    if policy != "round_robin" and policy not in POLICIES:
        raise ValueError(
            f"mixture policy {policy!r} is unknown: choose one of round_robin, "
            f"{', '.join(POLICIES)}"
        )
    _check_options(policy, options=options)
    if policy == "round_robin":
        return RoundRobin(len(rows))
    shares = POLICIES[policy](rows, **options)
    block_steps = BLOCK_STEPS
    if policy == "annealed":
        block_steps = _annealing_block(options["total_steps"])
    # Through JSON, so that it equals what a checkpoint gives back.
    described = json.loads(json.dumps({"type": policy, "rows": list(rows), "options": options}))
    return BlockMixture(shares, seed=seed, block_steps=block_steps, policy=described)


def examples_proportional(rows: Sequence[int], *, cap: int | None = None) -> _Shares:
    """Returns shares in proportion to the rows, of which at most `cap` count.

    Raffel et al. 2020 (T5), section 3.5.2.
    """
    return [_normalised(_capped(rows, cap=cap))]


def temperature_scaled(
    rows: Sequence[int], *, temperature: float = 2.0, cap: int | None = None
) -> _Shares:
    """Returns shares in proportion to rows ** (1 / temperature), of which at most `cap` rows count.

    Raffel et al. 2020 (T5), section 3.5.2: 1 is examples-proportional, more comes closer to equal.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"mixture.temperature must be positive, got {temperature}")
    return [_powers(_capped(rows, cap=cap), exponent=1 / temperature)]


def annealed(
    rows: Sequence[int],
    *,
    total_steps: int,
    start: float = 1.0,
    end: float = 0.2,
    cap: int | None = None,
) -> _Shares:
    """Returns, block by block, shares in proportion to rows ** exponent.

    The exponent goes from `start` (1: examples-proportional) to `end` over `total_steps` and stays
    there: Stickland and Murray 2019 (BERT and PALs), section 3, which has steps of an epoch.

    Raises:
        ValueError: `total_steps` is not positive or an exponent is negative.
    """
    if total_steps < 1 or min(start, end) < 0:
        raise ValueError(
            "mixture.total_steps must be at least 1 and start and end at least 0, got "
            f"{total_steps}, {start} and {end}"
        )
    counted = _capped(rows, cap=cap)
    block = _annealing_block(total_steps)
    # The middle of each block stands for the block.
    middles = (np.arange(-(-total_steps // block)) + 0.5) * block / total_steps
    exponents = [*(start + (end - start) * np.minimum(middles, 1)).tolist(), end]
    return [_powers(counted, exponent=exponent) for exponent in exponents]


def fixed(rows: Sequence[int], *, weights: Sequence[float]) -> _Shares:
    """Returns shares in proportion to given weights, one for each task.

    Raises:
        ValueError: there are more or fewer weights than tasks, or one is not positive.
    """
    if len(weights) != len(rows):
        raise ValueError(
            f"mixture.weights must have one weight for each of the {len(rows)} tasks, got "
            f"{len(weights)}"
        )
    return [_normalised(weights)]


def unimax(rows: Sequence[int], *, total_rows: int, max_epochs: float) -> _Shares:
    """Returns equal shares, except that no task gets more than `max_epochs` of its rows.

    Chung et al. 2023 (UniMax), algorithm 1, with rows as the unit of the budget. If the budget is
    more than `max_epochs` of all tasks together, shares are in proportion to the rows.

    Args:
        rows: rows of each task.
        total_rows: rows that the run uses: steps times global batch size.
        max_epochs: the most epochs of one task.

    Raises:
        ValueError: an argument is not positive.
    """
    if total_rows < 1 or not max_epochs > 0:
        raise ValueError(
            "mixture.total_rows must be at least 1 and max_epochs positive, got "
            f"{total_rows} and {max_epochs}"
        )
    budget = float(total_rows)
    given = [0.0] * len(rows)
    smallest_first = sorted(range(len(rows)), key=lambda task: rows[task])
    for done, task in enumerate(smallest_first):
        given[task] = min(max_epochs * rows[task], budget / (len(rows) - done))
        budget -= given[task]
    return [_normalised(given)]


# The functions that make shares from rows and options; their keyword arguments are the options.
POLICIES: dict[str, Callable[..., _Shares]] = {
    "examples_proportional": examples_proportional,
    "temperature": temperature_scaled,
    "annealed": annealed,
    "fixed": fixed,
    "unimax": unimax,
}


def epochs_after(
    mixture: Mixture, *, step: int, rows: Sequence[int], global_batch_size: int
) -> tuple[float, ...]:
    """Returns how many epochs of each task the steps before `step` use."""
    counts = mixture.steps_before(step)
    return tuple(n * global_batch_size / size for n, size in zip(counts, rows, strict=True))


def _check_options(policy: str, *, options: Mapping[str, Any]) -> None:
    known = {}
    if policy in POLICIES:
        known = dict(list(inspect.signature(POLICIES[policy]).parameters.items())[1:])
    unknown = [name for name in options if name not in known]
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if unknown or missing:
        raise ValueError(
            f"mixture policy {policy!r} takes the options {', '.join(known) or '(none)'}: "
            f"unknown {unknown}, missing {missing}"
        )


def _annealing_block(total_steps: int) -> int:
    # Short runs get short blocks, so that the shares change at least some thirty times.
    return min(BLOCK_STEPS, max(_SHORTEST_BLOCK, total_steps // 32))


def _capped(rows: Sequence[int], *, cap: int | None) -> list[int]:
    if cap is not None and cap < 1:
        raise ValueError(f"mixture.cap must be at least 1, got {cap}")
    return [size if cap is None else min(size, cap) for size in rows]


def _powers(rows: Sequence[int], *, exponent: float) -> list[float]:
    return _normalised([size**exponent for size in rows])


def _normalised(weights: Sequence[float]) -> list[float]:
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"the weights of a mixture must be positive, got {list(weights)}")
    total = math.fsum(weights)
    return [weight / total for weight in weights]
