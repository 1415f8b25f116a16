"""Combinations of software, hardware and settings that others have met as hangs or wrong errors.

Each is a rule over a `Situation`, with the remedy and where it was reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dist_ft.doctor.findings import Finding, Status
from dist_ft.doctor.situation import Situation, version_of

_GIB = 2**30
# NCCL takes some 10 MB for each pair of GPUs and channel; 64 MB is docker's default.
_LITTLE_SHM_BYTES = _GIB
# Shards, libraries and logs; and gloo keeps a socket to every other rank, in each of a few groups.
_OWN_FILES, _SOCKETS_OF_A_RANK = 512, 4
_NETWORK_DISKS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "ceph", "fuse.sshfs")


@dataclass(frozen=True)
class Known:
    """A combination that is known to be bad.

    Attributes:
        name: What it is about.
        found: Returns what of it is the case, in words, or None.
        remedy: What to do.
        source: Where it was reported.
        status: How bad it is.
    """

    name: str
    found: Callable[[Situation], str | None]
    remedy: str
    source: str
    status: Status = "note"


def _torchrun_restarts(s: Situation) -> str | None:
    shared = s.environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"
    if "TORCHELASTIC_RUN_ID" in s.environment and shared:
        return "after an in-place restart ranks read addresses of the attempt before"
    return None


def _interrupted_compilation(s: Situation) -> str | None:
    if s.stale_locks:
        return f"{s.stale_locks[0]} is left of one that was killed: loading the op hangs"
    return None


def _little_shared_memory(s: Situation) -> str | None:
    if len(s.gpus) > 1 and s.shm_bytes < _LITTLE_SHM_BYTES:
        return f"/dev/shm has {s.shm_bytes / 2**20:.0f} MiB for {len(s.gpus)} GPUs"
    return None


def _rtx_40_peers(s: Situation) -> str | None:
    consumer = [name for name in s.gpus if "RTX 40" in name]
    off = s.environment.get("NCCL_P2P_DISABLE") == "1"
    old = s.driver and version_of(s.driver) < version_of("550.40.07")
    if len(consumer) > 1 and old and not off:
        return f"{len(consumer)} x {consumer[0]} with driver {s.driver}: NCCL hangs"
    return None


def _peers_switched_off(s: Situation) -> str | None:
    linked = [gpu for gpu in s.gpus if any(n in gpu for n in ("A100", "H100", "H200"))]
    if len(linked) > 1 and s.environment.get("NCCL_P2P_DISABLE") == "1":
        return f"NCCL_P2P_DISABLE=1 with {len(linked)} x {linked[0]}: NVLink is not used"
    return None


def _old_kernel(s: Situation) -> str | None:
    if s.kernel and version_of(s.kernel) < version_of("5.5"):
        return f"Linux {s.kernel}: processes have been seen to hang below 5.5"
    return None


def _other_cuda_toolkit(s: Situation) -> str | None:
    if s.toolkit and s.cuda and s.toolkit.split(".")[0] != s.cuda.split(".")[0]:
        return f"nvcc {s.toolkit}, torch is built for CUDA {s.cuda}: DeepSpeed compiles no ops"
    return None


def _kernels_on_a_network_disk(s: Situation) -> str | None:
    kind = s.file_systems.get("triton", "")
    if kind in _NETWORK_DISKS and s.gpus:
        return f"compiled kernels are kept on {kind}: slow ends, stale file handles"
    return None


def _little_locked_memory(s: Situation) -> str | None:
    if s.infiniband and s.memlock_bytes is not None:
        return f"InfiniBand, but ulimit -l is {s.memlock_bytes // 1024} KiB: ibv_reg_mr fails"
    return None


def _unknown_interface(s: Situation) -> str | None:
    names = [n for n in s.environment.get("GLOO_SOCKET_IFNAME", "").split(",") if n]
    unknown = [name for name in names if name not in s.interfaces]
    if unknown:
        there = ", ".join(sorted(s.interfaces))
        return f"GLOO_SOCKET_IFNAME={','.join(names)}: there are {there}"
    return None


def _two_nccls(s: Situation) -> str | None:
    found = [name for name in s.packages if name.startswith("nvidia-nccl-cu")]
    if len(found) > 1:
        return f"{' and '.join(sorted(found))} are both installed: undefined symbol: nccl..."
    return None


def _flash_attention_of_another_torch(s: Situation) -> str | None:
    if s.flash_attention_error:
        return f"flash_attn can't be imported: {s.flash_attention_error}"
    return None


def _few_files(s: Situation) -> str | None:
    ranks = int(s.environment.get("WORLD_SIZE", "1"))
    if s.open_files < _OWN_FILES + _SOCKETS_OF_A_RANK * ranks:
        return f"ulimit -n is {s.open_files}, with {ranks} ranks"
    return None


KNOWN: tuple[Known, ...] = (
    Known(
        "torchrun",
        _torchrun_restarts,
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or --max-restarts=0, or dist-ft launch",
        "pytorch/pytorch#135712",
    ),
    Known(
        "interrupted compilation",
        _interrupted_compilation,
        "remove that file, if nothing is being compiled",
        "pytorch/pytorch#189245",
    ),
    Known(
        "shared memory",
        _little_shared_memory,
        "start the container with --shm-size=8g or --ipc=host",
        "NVIDIA/nccl#290, pytorch/torchtitan#853",
    ),
    Known(
        "GPUs without peer access",
        _rtx_40_peers,
        "export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1, or update the driver to 550.40.07",
        "NVIDIA/nccl-tests#117, accelerate's check_cuda_p2p_ib_support",
    ),
    Known(
        "NVLink",
        _peers_switched_off,
        "unset NCCL_P2P_DISABLE: it is for GPUs without peer access",
        "NCCL user guide, environment variables",
    ),
    Known(
        "Linux kernel",
        _old_kernel,
        "if ranks hang, take a newer kernel",
        "modelscope/ms-swift#283, accelerate's check_os_kernel",
    ),
    Known(
        "CUDA toolkit",
        _other_cuda_toolkit,
        "install the toolkit of torch's CUDA, or export DS_SKIP_CUDA_CHECK=1; only needed where "
        "engine.deepspeed asks for a compiled op",
        "deepspeedai/DeepSpeed#3223",
    ),
    Known(
        "kernel cache",
        _kernels_on_a_network_disk,
        "export TRITON_CACHE_DIR=/tmp/triton-$USER, on a local disk",
        "deepspeedai/DeepSpeed#5205, pytorch/pytorch#173679",
    ),
    Known(
        "locked memory",
        _little_locked_memory,
        "ulimit -l unlimited (docker: --ulimit memlock=-1; Slurm: PropagateResourceLimits)",
        "NVIDIA/nccl-tests#206",
    ),
    Known(
        "network interface",
        _unknown_interface,
        "name one of them; gloo knows no patterns such as ^docker, which NCCL does",
        "aws-samples/aws-do-eks#51",
        "broken",
    ),
    Known(
        "NCCL twice",
        _two_nccls,
        "pip uninstall the one that torch was not built for (torch.version.cuda)",
        "pytorch/pytorch#186591",
    ),
    Known(
        "flash-attn",
        _flash_attention_of_another_torch,
        "pip uninstall flash-attn (torch's own is used), or build it for this torch",
        "Dao-AILab/flash-attention#836",
    ),
    Known(
        "open files",
        _few_files,
        "ulimit -n 65536",
        "pytorch/pytorch#165532",
    ),
)


def known_problems(situation: Situation) -> Iterator[Finding]:
    """Yield every known bad combination that is the case here; one line if there is none.

    Args:
        situation: What is the case.
    """
    bad = [(known, text) for known in KNOWN if (text := known.found(situation)) is not None]
    for known, text in bad:
        remedy = f"{known.remedy} ({known.source})"
        yield Finding(known.name, text, known.status, remedy)
    if not bad:
        yield Finding("known bad combinations", f"none of {len(KNOWN)}")
