"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from dist_ft.planning.cost import (
    COMPUTE_EFFICIENCY,
    HOST_UPDATE_BYTES_PER_S,
    LATENCY_S,
    LINK_EFFICIENCY,
    Cluster,
)
from dist_ft.planning.memory import FRAGMENTATION, FRAMEWORK_BYTES
from dist_ft.planning.phases import Schedule
from dist_ft.planning.settings import PhasePlan, Plan, changes
from dist_ft.planning.shape import ModelShape
from dist_ft.tables import make_console, print_table
from dist_ft.wording import counted

_MOST_ROWS = 12
# Kinds of memory and what they are called in the table.
_MEMORY_COLUMNS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "buffers": "buffers",
    "regularization": "start,\naverages",
}
_STAGES = {
    0: "everything on every rank",
    1: "optimizer partitioned",
    2: "optimizer and gradients partitioned",
    3: "weights partitioned too",
}


def show_plan(
    plan: Plan, *, shape: ModelShape, schedule: Schedule, cluster: Cluster, best: Plan | None
) -> None:
    """Print the plan of a recipe, its assumptions, and the cheapest setting that fits."""
    console = make_console()
    setting = plan.setting
    console.print(
        f"{shape.source}: {shape.numel / 1e6:,.1f} M parameters with heads; "
        f"{cluster.nodes} x {cluster.per_node} {cluster.hardware.name}, ZeRO-{setting.zero_stage} "
        f"({_STAGES[setting.zero_stage]}), {setting.precision}, micro-batch "
        f"{setting.micro_batch_size} x {setting.accumulation}"
        f"{f' x {setting.turns} turns' if setting.turns > 1 else ''}"
    )
    print_table(console, _memory_table(plan))
    console.print()
    print_table(console, _step_table(plan))
    peak = plan.peak
    verdict = "fits" if plan.fits else "does NOT fit"
    console.print(
        f"{verdict}: the largest phase ({peak.phase.label}) needs {_gib(peak.memory.total)} of "
        f"{_gib(plan.usable_bytes)} GiB a device; host {_gib(peak.memory.host)} GiB a rank; "
        f"a checkpoint {_gib(plan.checkpoint_bytes)} GiB on disk"
    )
    console.print(
        f"{counted(schedule.total_steps, 'step')}: {_duration(plan.run_s)}, "
        f"{plan.run_s * cluster.world_size / 3600:,.2f} device hours"
        f"{'' if schedule.epoch is None else f' ({schedule.epoch.basis})'}"
    )
    console.print(_advice(plan, best, cluster))
    console.print("assumptions:")
    for text in assumptions(shape, schedule, cluster):
        console.print(f"  - {text}")


def _memory_table(plan: Plan) -> Table:
    kinds = _memory_columns(plan)
    table = _table("GiB of each rank, by phase", [*(_MEMORY_COLUMNS[k] for k in kinds), "total"])
    for row in _rows(plan.phases, peak=plan.peak):
        if row is None:
            table.add_row("...")
            continue
        sizes = [*(getattr(row.memory, kind) for kind in kinds), row.memory.total]
        table.add_row(row.phase.label, *map(_gib, sizes))
    return table


def _step_table(plan: Plan) -> Table:
    table = _table(
        "a step of each rank, by phase",
        ["of the run", "trains M", "TFLOP", "sent GB", "seconds"],
    )
    for row in _rows(plan.phases, peak=plan.peak):
        table.add_row(*(_step_cells(row, plan) if row else ["..."]))
    return table


def _table(title: str, names: Sequence[str]) -> Table:
    """Return an empty table of a phase and figures, which never wrap."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD,
        show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("phase", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    return table


def _memory_columns(plan: Plan) -> list[str]:
    """Return the kinds of memory that are shown: regularization only where it takes some."""
    unused = {"regularization"} if not any(p.memory.regularization for p in plan.phases) else set()
    return [name for name in _MEMORY_COLUMNS if name not in unused]


def _rows(phases: tuple[PhasePlan, ...], *, peak: PhasePlan) -> list[PhasePlan | None]:
    if len(phases) <= _MOST_ROWS:
        return list(phases)
    shown: list[PhasePlan | None] = [*phases[:4], None]
    if peak not in phases[:4] and peak not in phases[-4:]:
        shown += [peak, None]
    return [*shown, *phases[-4:]]


def _step_cells(row: PhasePlan, plan: Plan) -> list[str]:
    traffic = row.traffic
    flops = row.flops.total * plan.setting.micro_batches
    return [
        row.phase.label,
        f"{100 * row.phase.share:.0f} %",
        f"{row.trained / 1e6:,.1f}",
        f"{flops / 1e12:,.2f}",
        f"{(traffic.reduced + traffic.gathered) / 1e9:,.2f}",
        f"{row.time.total_s:,.3g}",
    ]


def _advice(plan: Plan, best: Plan | None, cluster: Cluster) -> str:
    if best is None:
        return (
            "no setting of ZeRO stage, micro-batch size, recomputation and offload fits on "
            f"{cluster.world_size} devices: take more or larger ones, or freeze more"
        )
    keys = changes(plan.setting, best.setting)
    if not keys:
        return "no other setting that fits is quicker"
    text = " ".join(f"{key}={value}" for key, value in keys.items())
    return (
        f"cheapest setting that fits: {text} ({_duration(best.run_s)}, "
        f"{_gib(best.peak.memory.total)} GiB a device)"
    )


def assumptions(shape: ModelShape, schedule: Schedule, cluster: Cluster) -> list[str]:
    """Return what the numbers of a plan rest on, a sentence each."""
    hardware = cluster.hardware
    return [
        f"shape: {shape.source}; every row is padded to max_length, and every position that can "
        "have a label has one (real batches are shorter)",
        "activations: what autograd keeps in one micro-batch, traced on the meta device with "
        "the kernels of the device; temporary memory of single operations is not counted; blocks "
        "are counted with padding (without, a CPU in bf16 keeps more of attention, in fp32)",
        "optimizer: AdamW, fp32 masters and moments; gradients in the training precision",
        "regularization: starting weights (L2-SP, mixout) and averages are cut over the ranks like "
        "the optimizer; while averages are scored, the trained weights are beside them",
        f"{FRAMEWORK_BYTES / 2**30:.0f} GiB for the CUDA context on a GPU, and {FRAGMENTATION:.0%} "
        "of the device lost to fragmentation",
        f"roofline: {hardware.half_flops / 1e12:,.0f} TFLOP/s in bf16/fp16 "
        f"({hardware.single_flops / 1e12:,.3g} in fp32) reached to {COMPUTE_EFFICIENCY:.0%}; "
        f"{cluster.link_bytes_per_s / 1e9:,.3g} GB/s a device "
        f"{'over the network' if cluster.nodes > 1 else 'inside the node'} reached to "
        f"{LINK_EFFICIENCY:.0%}; {LATENCY_S * 1e6:.0f} us of latency a collective and doubling of "
        "ranks; rings; nothing overlaps; offloaded state is updated at "
        f"{HOST_UPDATE_BYTES_PER_S / 1e9:.0f} GB/s a rank",
        "time: steps only; evaluation, checkpoints, phase changes and data loading come on top",
        *schedule.assumptions,
        *shape.notes,
    ]


def plan_json(plan: Plan, *, shape: ModelShape, schedule: Schedule, cluster: Cluster,
              best: Plan | None) -> dict[str, Any]:  # fmt: skip
    """Return a plan as JSON; bytes, seconds and counts as whole numbers or floats."""
    return {
        "model": shape.source,
        "parameters": shape.numel,
        "world_size": cluster.world_size,
        "hardware": cluster.hardware.name,
        "setting": asdict(plan.setting),
        "total_steps": schedule.total_steps,
        "run_s": plan.run_s,
        "fits": plan.fits,
        "usable_bytes": plan.usable_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "phases": [
            {
                "phase": p.phase.label,
                "share": p.phase.share,
                "trainable_params": p.trained,
                "memory_bytes": {**asdict(p.memory), "total": p.memory.total},
                "flops_per_micro_batch": asdict(p.flops),
                "traffic_bytes_per_step": asdict(p.traffic),
                "step_s": asdict(p.time),
            }
            for p in plan.phases
        ],
        "cheapest": None if best is None else changes(plan.setting, best.setting),
        "cheapest_run_s": None if best is None else best.run_s,
        "assumptions": assumptions(shape, schedule, cluster),
    }


def _gib(count: int) -> str:
    value = count / 2**30
    return f"{value:,.2f}" if value >= 0.01 or not count else f"{value:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
