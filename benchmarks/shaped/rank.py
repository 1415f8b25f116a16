"""One rank of `network.py`: step times of several recipes, and of DeepSpeed by itself.

Run once on each host with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; rank 0 writes JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.shaped.deepspeed_alone import DeepSpeedAlone, alone_name
from benchmarks.stepping import Stepper, step_seconds

PAYLOAD_BYTES = 8 * 2**20
LINK = "eth0"


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


def time_recipe(recipe: Path, *, folder: Path, steps: int) -> dict[str, object]:
    """Return the times of a recipe's steps."""
    stepper = Stepper(recipe, folder=folder, steps=steps)
    report = stepper.train()
    found = _time(stepper.seconds)
    stepper.close()
    total = report.trainable_params + report.frozen_params
    return {
        **found,
        "trainable_share": report.trainable_params / total,
        "cached_blocks": report.cached_blocks,
    }


def time_deepspeed(folder: Path, *, stage: int, share: str, steps: int) -> dict[str, object]:
    """Return the times of DeepSpeed's own steps, with the embeddings frozen or not."""
    alone = DeepSpeedAlone(folder, stage=stage, freeze_embeddings=share == "half", steps=steps)
    found = _time(functools.partial(step_seconds, alone.one, alone.batches))
    alone.close()
    return {**found, "trainable_share": alone.trainable_share, "cached_blocks": 0}


def _time(seconds: Callable[[], list[float]]) -> dict[str, object]:
    """Return step times and what they sent, after a pass that allocates and fills the cache."""
    seconds()
    before = sent_bytes()
    times = seconds()
    return {"times": times, "sent_bytes": (sent_bytes() - before) / len(times)}


def main() -> None:
    """Time each recipe and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--alone", nargs="*", default=[], help="stage:share of DeepSpeed's own")
    parser.add_argument("--recipes", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"link_bits_per_s": link_bits_per_s()}
    runs = {
        recipe.stem: time_recipe(recipe, folder=recipe.with_suffix(".run"), steps=options.steps)
        for recipe in options.recipes
    }
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
