"""One run through everything at once, drawn from a seed: it comes to the same end."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed

from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_gradients import OwnedGradients
from dist_ft.optim.adamw import GroupAdamW
from dist_ft.train import loop, saving
from tests.faults.test_disk_full import limit_files
from tests.helpers.cluster import in_own_network, set_loopback, why_not
from tests.helpers.supervised import before, die, die_before, fingerprint, supervise
from tests.helpers.tiny_run import events, newest_checkpoint, write_recipe

CAN_CUT = why_not(slurm=False)
PLACES = [
    (DeepSpeedEngine, "_run", 30),
    (OwnedGradients, "backward", 30),
    (torch.distributed, "all_reduce", 60),
    (GroupAdamW, "step", 100),
    (loop, "enter_phase", 2),
    (saving, "write_rank_file", 3),
    (DeepSpeedEngine, "load_state", 1),
]


def _kill(draw: random.Random, _run: Path) -> None:
    owner, name, most = draw.choice(PLACES)
    die_before(owner, name, call=draw.randint(1, most))


def _stop(draw: random.Random, _run: Path) -> None:
    at = draw.randint(1, 16)
    before(
        DeepSpeedEngine,
        "_run",
        lambda call: os.kill(os.getpid(), signal.SIGSTOP) if call == at else None,
    )


def _cut_link(draw: random.Random, _run: Path) -> None:
    """Nothing that the ranks send arrives any more, and nobody is told; mended before they meet."""
    if CAN_CUT is not None:
        _stop(draw, _run)
        return
    at = draw.randint(1, 16)
    before(DeepSpeedEngine, "_run", lambda call: set_loopback("down") if call == at else None)


def _mend(_attempt: int) -> None:
    if CAN_CUT is None:
        set_loopback("up")


def _full_disk(draw: random.Random, _run: Path) -> None:
    """The disk is full from some step on; later the rank is killed."""
    full, end = draw.randint(1, 3), draw.randint(7, 9)

    def act(call: int) -> None:
        if call == full:
            limit_files(2000)
        if call == end:
            die()

    before(DeepSpeedEngine, "train_step", act)


def _flipped_byte(draw: random.Random, run: Path) -> None:
    """A byte of the newest checkpoint changes, then the rank is killed."""

    def flip(call: int) -> None:
        if call != 7:
            return
        file = draw.choice(sorted(newest_checkpoint(run).glob("*.safetensors")))
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        die()

    before(DeepSpeedEngine, "train_step", flip)


def _clock_jump(draw: random.Random, _run: Path) -> None:
    """The clock jumps by a day, forth or back; then the rank is killed."""
    original, jump = time.time, draw.choice([-1, 1]) * 86400.0
    time.time = lambda: original() + jump
    die_before(DeepSpeedEngine, "train_step", call=draw.randint(3, 8))


FAULTS: list[Callable[[random.Random, Path], None]] = [
    _kill, _full_disk, _stop, _flipped_byte, _cut_link, _clock_jump, _kill, _kill,
]  # fmt: skip


@pytest.mark.slow
def test_kills_hangs_cut_links_a_full_disk_flipped_bytes_and_clock_jumps_change_nothing(
    tmp_path: Path,
) -> None:
    if CAN_CUT is not None:
        warnings.warn(f"the link is not cut, a rank is stopped instead: {CAN_CUT}", stacklevel=1)
        _goes_through_everything(tmp_path)
        return
    in_own_network(lambda: _goes_through_everything(tmp_path))


def _goes_through_everything(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        train={"max_duration": "48step"},
        supervision={"timeout_s": 2, "slow_timeout_s": 20},
        evaluation={"every": None},
        checkpoint={"every": "4step", "ephemeral_every": "2step"},
    )
    oracle = supervise(recipe, ["name=oracle"])
    assert (oracle.code, oracle.said) == (0, [])
    run = tmp_path / "runs/tiny"

    def fault(attempt: int, rank: int) -> None:
        if attempt < len(FAULTS):
            draw = random.Random(f"chaos {attempt}")
            # A full disk of rank 0 would cost the record that this test reads.
            victim = 1 if FAULTS[attempt] is _full_disk else draw.randrange(2)
            if rank == victim:
                FAULTS[attempt](draw, run)

    outcome = supervise(recipe, fault=fault, max_restarts=len(FAULTS), between=_mend)
    assert outcome.code == 0, outcome.said
    assert len(outcome.said) == len(FAULTS), outcome.said
    assert fingerprint(run) == fingerprint(tmp_path / "runs/oracle")
    assert [e["step"] for e in events(run)][-1] == 48
    assert list((run / "checkpoints").glob(".damaged-*"))
    assert any(e["event"] == "checkpoint_failed" for e in events(run))
