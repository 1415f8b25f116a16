"""One rank of `network.py`: step times of several recipes, and of DeepSpeed by itself.

Run once on each host with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; rank 0 writes JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.shaped.deepspeed_alone import DeepSpeedAlone
from benchmarks.shaped.settings import alone_name
from benchmarks.stepping import Stepper, step_seconds

PAYLOAD_BYTES = 8 * 2**20
LINK = "eth0"
# Of recipes that are timed in turn.
ROUNDS = 3


def sent_bytes() -> int:
    """Return what this network namespace has sent through its link since it was made."""
    # Not from /sys, which shows the links of the namespace that it was mounted in.
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == LINK:
            return int(counters.split()[8])
    raise RuntimeError(f"no link {LINK} in /proc/self/net/dev: start this by benchmarks/network.py")


def link_bits_per_s() -> float:
    """Return what a plain all-reduce of two ranks gets, bit/s in each direction."""
    payload = torch.zeros(PAYLOAD_BYTES // 4)
    dist.all_reduce(payload)
    began = time.perf_counter()
    dist.all_reduce(payload)
    # Each of two ranks sends half of it to be added up and half of the sums.
    return 8 * PAYLOAD_BYTES / (time.perf_counter() - began)


def time_recipes(recipes: Sequence[Path], *, steps: int) -> dict[str, dict[str, object]]:
    """Return the times of recipes' steps by name; several are timed in turn, in rounds.

    A shaped link is not the same from minute to minute; what is compared must share its minutes.
    """
    steppers = {r.stem: Stepper(r, folder=r.with_suffix(".run"), steps=steps) for r in recipes}
    reports = {name: stepper.train() for name, stepper in steppers.items()}
    in_turn = len(recipes) > 1
    found = _time(
        {n: functools.partial(_settled, s) if in_turn else s.seconds for n, s in steppers.items()},
        rounds=ROUNDS if in_turn else 1,
    )
    for stepper in steppers.values():
        stepper.close()
    return {
        name: {
            **found[name],
            "trainable_share": r.trainable_params / (r.trainable_params + r.frozen_params),
            "cached_blocks": r.cached_blocks,
        }
        for name, r in reports.items()
    }


def time_deepspeed(folder: Path, *, stage: int, share: str, steps: int) -> dict[str, object]:
    """Return the times of DeepSpeed's own steps with a share of the parameters training."""
    alone = DeepSpeedAlone(folder, stage=stage, share=share, steps=steps)
    found = _time({share: functools.partial(step_seconds, alone.one, alone.batches)}, rounds=1)
    alone.close()
    return {**found[share], "trainable_share": alone.trainable_share, "cached_blocks": 0}


def _time(
    passes: Mapping[str, Callable[[], list[float]]], *, rounds: int
) -> dict[str, dict[str, object]]:
    """Return step times and what a step sent, after a pass of each that fills caches.

    Of several that take turns, the first step of a pass does not count: it waits for no weights.
    """
    for seconds in passes.values():
        seconds()
    times: dict[str, list[float]] = {name: [] for name in passes}
    sent: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, seconds in passes.items():
            before = sent_bytes()
            done = seconds()
            sent[name].append((sent_bytes() - before) / len(done))
            times[name] += done[1:] if rounds > 1 else done
    return {
        name: {"times": times[name], "sent_bytes": statistics.mean(sent[name])} for name in passes
    }


def _settled(stepper: Stepper) -> list[float]:
    """Return the times of a pass; its last weights have arrived before another begins."""
    times = stepper.seconds()
    _ = stepper.run.engine.module
    return times


def main() -> None:
    """Time each recipe and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--alone", nargs="*", default=[], help="stage:share of DeepSpeed's own")
    parser.add_argument("--recipes", nargs="+", required=True, help="those of an item in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"link_bits_per_s": link_bits_per_s()}
    runs: dict[str, dict[str, object]] = {}
    for together in options.recipes:
        paths = [Path(path) for path in together.split(os.pathsep)]
        runs |= time_recipes(paths, steps=options.steps)
    for setting in options.alone:
        stage, _, share = setting.partition(":")
        runs[alone_name(int(stage), share)] = time_deepspeed(
            options.out.parent, stage=int(stage), share=share, steps=options.steps
        )
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(found | {"runs": runs}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
