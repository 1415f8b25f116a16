"""Step time between two hosts on a slow network, by ZeRO stage, trainable share and cache.

The hosts are network namespaces of this machine whose virtual Ethernet is shaped to 250 Mbit/s in
each direction by the kernel's token bucket (tc tbf). Each runs one rank of one thread; MiniLM-L6
fine-tunes in bf16. "half" freezes the embeddings, which are half of the parameters; "3 of 6" half
of the blocks besides; "head" everything but pooler and classifier. "small" is a model of as many
parameters as a prototype's that was measured on such a link: its milliseconds bound ours. "all" and
"half" take turns, in three rounds of five steps, the first of which does not count; the others take
five. Beside them, on the same link in the same run, DeepSpeed by itself
(`shaped/deepspeed_alone.py`), with all training and with the embeddings frozen. Needs root,
iproute2 and util-linux, and says so otherwise.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.ranks import free_port
from benchmarks.shaped.settings import (
    FREEZING,
    PAIRS,
    SMALL,
    alone_name,
    model_of,
    name_of,
    whole_of,
    write_small_model,
)
from benchmarks.training.own_run import prepare_shards, write_recipe
from benchmarks.training.workload import RANKS, Job, write_mixed
from tests.helpers.cluster import Cluster, running_cluster, why_not

MBIT_PER_S = 250
# Longest time that both ranks together may take, seconds; the cluster ends itself then.
PATIENCE_S = 1200
# Share, whether the frozen prefix is cached.
SETTINGS = (
    ("all", False), ("half", False), ("3 of 6", False), ("3 of 6", True), ("head", False),
    ("head", True), ("small, all", False), ("small, half", False),
)  # fmt: skip
STAGES = (1, 2, 3)
# A prototype's step on such a link, DeepSpeed with 6.3 million parameters: milliseconds with all of
# them training, and with half of them frozen.
PROTOTYPE = {1: (1557, 723), 2: (1607, 839), 3: (1606, 1176)}
COLUMNS = {
    "stage": "ZeRO stage",
    "share": "trains",
    "percent": "of parameters, %",
    "cache": "cached blocks",
    "sent_mb": "MB sent a step",
    "step_ms": "ms a step",
    "of_all": "of all training",
    "alone_ms": "DeepSpeed by itself, ms",
    "alone_of_all": "of all training",
    "alone_mb": "MB sent",
}


def write_recipes(folder: Path, *, settings: Sequence[tuple[int, str, bool]]) -> list[Path]:
    """Write a recipe for each setting, and prepare their data."""
    recipes = [
        write_recipe(
            Job(folder, 0, 100, model=model_of(folder, share)),
            name=name_of(stage, share, cached=cached),
            freezing=FREEZING[share],
            cache={"policy": "on" if cached else "off"},
            engine={"zero_stage": stage, "precision": "bf16"},
        )
        for stage, share, cached in settings
    ]
    for recipe in (recipes[0], recipes[-1]):  # one of each model, if there are two
        prepare_shards(recipe)
    return recipes


def measure(
    folder: Path, *, recipes: Sequence[Path], alone: Sequence[str], steps: int
) -> dict[str, Any]:
    """Return what rank 0 found, on a cluster that is up only for that.

    Args:
        folder: Holds the rows, and gets logs.
        recipes: To time.
        alone: Settings of DeepSpeed by itself, ``stage:share``.
        steps: To time of each.

    Raises:
        RuntimeError: If a rank failed, with the end of its log.
    """
    out, port = folder / "found.json", str(free_port())
    logs = [folder / f"node{n + 1}.log" for n in range(RANKS)]
    with running_cluster(folder / "cluster", slurm=False, most_s=PATIENCE_S) as cluster:
        for n in range(RANKS):
            _shape(cluster, f"node{n + 1}", folder=folder)
        started = [
            cluster.start_on(
                f"node{n + 1}", "env", f"RANK={n}", "LOCAL_RANK=0", f"WORLD_SIZE={RANKS}",
                "MASTER_ADDR=node1", f"MASTER_PORT={port}", "GLOO_SOCKET_IFNAME=eth0",
                sys.executable, "-m", "benchmarks.shaped.rank", "--out", str(out),
                "--steps", str(steps), "--alone", *alone, "--recipes", *_in_turn(recipes),
                cwd=folder, log=logs[n],
            )
            for n in range(RANKS)
        ]  # fmt: skip
        codes = [_wait(process) for process in started]
    if any(codes):
        ends = "\n".join(log.read_text()[-1500:] for log in logs)
        raise RuntimeError(f"the ranks ended with {codes}:\n{ends}")
    return json.loads(out.read_text())


def _in_turn(recipes: Sequence[Path]) -> list[str]:
    """Return arguments of `shaped.rank`: all and half of a stage, which are compared, as one."""
    key = {
        name_of(stage, share, cached=False): f"{stage} {pair}"
        for stage in STAGES
        for pair in PAIRS
        for share in pair
    }
    items: dict[str, list[str]] = {}
    for recipe in recipes:
        items.setdefault(key.get(recipe.stem, recipe.stem), []).append(str(recipe))
    return [os.pathsep.join(item) for item in items.values()]


def _shape(cluster: Cluster, node: str, *, folder: Path) -> None:
    """Limit what a node sends. The bucket holds two of the largest packets that TCP hands over."""
    words = f"tc qdisc add dev eth0 root tbf rate {MBIT_PER_S}mbit burst 128kb latency 50ms"
    log = folder / f"{node}.tc.log"
    if cluster.start_on(node, *words.split(), cwd=folder, log=log).wait(timeout=30):
        raise RuntimeError(f"tc cannot shape the link of {node}: {log.read_text()}")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Return a process's exit code, None if it took too long; the cluster's end ends it."""
    try:
        return process.wait(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return -1


def rows_of(
    found: Mapping[str, Any], *, settings: Sequence[tuple[int, str, bool]]
) -> list[dict[str, Any]]:
    """Return the table: medians over the steps."""
    runs = found["runs"]
    medians = {name: statistics.median(run["times"]) for name, run in runs.items()}
    return [
        {
            "stage": stage,
            "share": share,
            "percent": 100 * runs[name]["trainable_share"],
            "cache": runs[name]["cached_blocks"],
            "cached": cached,
            "sent_mb": runs[name]["sent_bytes"] / 1e6,
            "step_ms": 1000 * medians[name],
            "of_all": medians[name] / medians[name_of(stage, whole_of(share), cached=False)],
            **({} if cached else _alone(runs, medians, stage=stage, share=share)),
        }
        for stage, share, cached in settings
        for name in [name_of(stage, share, cached=cached)]
    ]


def _alone(
    runs: Mapping[str, Any], medians: Mapping[str, float], *, stage: int, share: str
) -> dict[str, float]:
    """Return the columns of DeepSpeed by itself, none if it was not timed."""
    name, whole = alone_name(stage, share), alone_name(stage, whole_of(share))
    if name not in runs:
        return {}
    return {
        "alone_ms": 1000 * medians[name],
        "alone_of_all": medians[name] / medians[whole],
        "alone_mb": runs[name]["sent_bytes"] / 1e6,
    }


def claims_of(rows: Sequence[Mapping[str, Any]], *, link_bits_per_s: float) -> list[Claim]:
    """Return what must hold; what a quick run leaves out does not."""
    by = {(r["stage"], r["share"], r["cached"]): r for r in rows}
    claims = [
        claim(
            "the link lets through no more than it should, Mbit/s",
            value=link_bits_per_s / 1e6,
            bound=1.1 * MBIT_PER_S,
            direction="at most",
        )
    ]
    claims += [c for stage in STAGES for c in _beside_prototype(by, stage=stage)]
    claims += [
        _beside_deepspeed(by, stage=stage, share=s) for stage in STAGES for p in PAIRS for s in p
    ]
    bare, cached = (by.get((3, "3 of 6", c)) for c in (False, True))
    gain = bare["step_ms"] / cached["step_ms"] if bare and cached else None
    claims.append(
        claim(
            "ZeRO-3, 3 of 6 frozen, step without cache over step with it",
            value=gain,
            bound=1.1,
            direction="at least",
        )
    )
    return claims


def _beside_prototype(
    by: Mapping[tuple[int, str, bool], Mapping[str, Any]], *, stage: int
) -> list[Claim]:
    """Return that half takes as small a share of all, and a model of its size no longer."""
    half = by.get((stage, "half", False), {})
    milliseconds = PROTOTYPE[stage]
    return [
        claim(
            f"ZeRO-{stage}, half of the parameters frozen, step of all training",
            value=half.get("of_all"),
            bound=milliseconds[1] / milliseconds[0],
            direction="at most",
        ),
        *(
            claim(
                f"ZeRO-{stage}, {share}, ms",
                value=by.get((stage, share, False), {}).get("step_ms"),
                bound=bound,
                direction="at most",
            )
            for share, bound in zip(SMALL, milliseconds, strict=True)
        ),
    ]


def _beside_deepspeed(
    by: Mapping[tuple[int, str, bool], Mapping[str, Any]], *, stage: int, share: str
) -> Claim:
    """Return that our step takes no longer than DeepSpeed's own."""
    row = by.get((stage, share, False), {})
    return claim(
        f"ZeRO-{stage}, {share} training, step of DeepSpeed's own",
        value=row["step_ms"] / row["alone_ms"] if "alone_ms" in row else None,
        bound=1.0,
        direction="at most",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    reason = why_not(slurm=False)
    if reason is not None:
        say(f"not measured: {reason}")
        return report([], claims=claims_of([], link_bits_per_s=float("nan")), packages=(),
                      options=options)  # fmt: skip
    stages, steps = ((2,), 2) if options.quick else (STAGES, 5)
    shares = (SETTINGS[0], SETTINGS[1], SETTINGS[3]) if options.quick else SETTINGS
    settings = [(stage, share, cached) for stage in stages for share, cached in shares]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_mixed(folder, rows=512)
        write_small_model(folder)
        recipes = write_recipes(folder, settings=settings)
        alone = [f"{s}:{x}" for s in stages for p in PAIRS for x in p if (x, False) in shares]
        found = measure(folder, recipes=recipes, alone=alone, steps=steps)
    rows = rows_of(found, settings=settings)
    say(markdown_table(rows, columns=COLUMNS))
    packages = ("torch", "deepspeed", "transformers", "dist-ft")
    claims = claims_of(rows, link_bits_per_s=found["link_bits_per_s"])
    return report(rows, claims=claims, packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
