"""Accelerators as the planner knows them: memory, arithmetic and links."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One accelerator and what connects it.

    Attributes:
        name: As on the command line.
        memory_bytes: Of one device.
        half_flops: Dense bf16/fp16 multiply-adds count two, per second.
        single_flops: The same in fp32 (TF32 is not assumed: torch leaves it off by default).
        memory_bytes_per_s: Between the device's memory and its cores.
        node_bytes_per_s: From a device to the others of its node, one direction.
        network_bytes_per_s: Of one device's share of the network, one direction.
        host_bytes_per_s: To host memory, one direction; what optimizer offload pays.
    """

    name: str
    memory_bytes: int
    half_flops: float
    single_flops: float
    memory_bytes_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    host_bytes_per_s: float


_GIB = 2**30
# Vendors' data sheets: dense, without sparsity; links are one direction. The network is one
# 400 Gbit/s adapter per device in SXM machines, one of 100 Gbit/s in the others.
HARDWARE: dict[str, Hardware] = {
    h.name: h
    for h in (
        Hardware("h200-141g", 141 * 10**9, 989e12, 67e12, 4.8e12, 450e9, 50e9, 55e9),
        Hardware("h100-80g", 80 * _GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9, 55e9),
        Hardware("a100-80g", 80 * _GIB, 312e12, 19.5e12, 2.0e12, 300e9, 25e9, 25e9),
        Hardware("a100-40g", 40 * _GIB, 312e12, 19.5e12, 1.55e12, 300e9, 25e9, 25e9),
        Hardware("l40s-48g", 48 * 10**9, 362e12, 91e12, 0.86e12, 25e9, 12.5e9, 25e9),
        Hardware("a10-24g", 24 * 10**9, 125e12, 31e12, 0.6e12, 25e9, 12.5e9, 25e9),
        Hardware("rtx4090-24g", 24 * 10**9, 165e12, 82e12, 1.0e12, 25e9, 12.5e9, 25e9),
        Hardware("v100-32g", 32 * _GIB, 125e12, 15.7e12, 0.9e12, 150e9, 12.5e9, 12e9),
        Hardware("t4-16g", 16 * 10**9, 65e12, 8.1e12, 0.3e12, 12e9, 6e9, 12e9),
        # One core of a server: fused multiply-adds of 8 fp32 at 3 GHz; ranks share its memory.
        Hardware("cpu-8g", 8 * _GIB, 1e11, 1e11, 1e10, 5e9, 1.2e9, 5e9),
    )
}


def find_hardware(name: str) -> Hardware:
    """Return the accelerator of a name.

    Raises:
        ValueError: If it is not known.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    meant = difflib.get_close_matches(name, HARDWARE, n=1)
    remedy = f"did you mean {meant[0]}?" if meant else "use one of them"
    raise ValueError(f"--gpu: must be one of {', '.join(HARDWARE)}, got {name!r}: {remedy}")
