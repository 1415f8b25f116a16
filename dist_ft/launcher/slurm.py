"""Writes the script of a Slurm job, and submits it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

JOB = Path(__file__).with_name("job.sh")
# slurmctld looks at the clock only every 30 to 60 s, so the lead is that plus the time to save.
LEAD_S = 180
_CLOCK_S = 60
# To import, to load and to take some steps: who is asked to stop before has done nothing.
_START_S = 120
# What Slurm takes if --signal names no time.
_SIGNAL_S = 60
_NO_LIMIT = ("UNLIMITED", "INFINITE")
_TIME = re.compile(r"((?P<days>\d+)-)?(?P<parts>\d+(:\d+){0,2})")


@dataclass(frozen=True)
class SlurmJob:
    """A job to be written.

    Attributes:
        name: Of the job.
        nodes: How many.
        gpus_per_node: 0 trains on the CPUs.
        cpus_per_node: Cores of a node for the job.
        time: Limit in Slurm's form, for example 8:00:00.
        each: One list of overrides for each task of an array; empty for a single job.
        options: More lines for sbatch, for example ``--partition=long``.
    """

    name: str
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int = 8
    time: str | None = None
    each: Sequence[str] = ()
    options: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: Naming the option.
        """
        for option, value, least in (
            ("--nodes", self.nodes, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
            ("--cpus-per-node", self.cpus_per_node, 1),
        ):
            if value < least:
                raise ValueError(f"{option} must be at least {least}, got {value}: change it")
        bad = [option for option in self.options if not option.startswith("--")]
        if bad:
            raise ValueError(f"--sbatch takes an option of sbatch like --partition=long, got {bad}")
        self._check_time()

    def _check_time(self) -> None:
        """Check that the limit leaves time to train before the signal comes.

        Raises:
            ValueError: If it does not, or is no limit.
        """
        limit = self._last("--time", self.time)
        if limit is None or limit.upper() in _NO_LIMIT:
            return  # the partition's, which only the cluster knows; the job notices it, too
        seconds = _seconds(limit)
        signal = self._last("--signal", f"B:USR1@{LEAD_S}") or ""
        at = re.search(r"@(\d+)", signal)
        lead = int(at[1]) if at else _SIGNAL_S
        least = lead + _CLOCK_S + _START_S
        if 0 < seconds < least:  # 0 is no limit to Slurm
            raise ValueError(
                f"--time must be at least {-(-least // 60)} minutes, got {limit!r}: the signal to "
                f"save comes {lead} to {lead + _CLOCK_S} s before the limit, and a job that has "
                f"not trained by then is requeued in vain; raise it, or with saves that are quick "
                f"shorten the lead: --sbatch=--signal=B:USR1@60"
            )

    def _last(self, name: str, value: str | None) -> str | None:
        """Return the value of an option as sbatch takes it: the last one counts."""
        for option in self.options:
            if match := re.match(rf"{name}[= ](.+)", option):
                value = match[1]
        return value

    def script(self, words: Sequence[str], *, python: str = sys.executable) -> str:
        """Return the script that trains `words`: the recipe and its overrides."""
        lines = ["#!/usr/bin/env bash", *(f"#SBATCH {line}" for line in self._header())]
        lines += [
            "# Saves and requeues itself when it is pre-empted or its time is up; settings: see",
            f"# {JOB}",
            f'export PYTHON="${{PYTHON:-{python}}}"',
        ]
        if self.gpus_per_node:
            lines.append(f'export NPROC="${{NPROC:-{self.gpus_per_node}}}"')
        lines.append(f"set -- {shlex.join(words)}")
        if self.each:
            lines.append('case "$SLURM_ARRAY_TASK_ID" in')
            for index, overrides in enumerate(self.each):
                lines.append(f'  {index}) set -- "$@" {shlex.join(shlex.split(overrides))} ;;')
            lines.append("esac")
        lines.append(f'exec bash {shlex.quote(str(JOB))} "$@"')
        return "\n".join(lines) + "\n"

    def _header(self) -> list[str]:
        lines = [
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={self.cpus_per_node}",
        ]
        if self.gpus_per_node:
            lines.append(f"--gpus-per-node={self.gpus_per_node}")
        if self.time is not None:
            lines.append(f"--time={self.time}")
        if self.each:
            lines.append(f"--array=0-{len(self.each) - 1}")
        log = "%x-%A_%a" if self.each else "%x-%j"
        return [
            *lines,
            "--requeue",
            "--open-mode=append",
            f"--output={log}.log",
            f"--signal=B:USR1@{LEAD_S}",
            *self.options,
        ]


def _seconds(limit: str) -> int:
    """Return the seconds of a limit in one of Slurm's forms.

    They are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.

    Raises:
        ValueError: If it is none.
    """
    match = _TIME.fullmatch(limit)
    if match is None:
        raise ValueError(f"--time must be like 30 (minutes), 8:00:00 or 2-00:00:00, got {limit!r}")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        hours += 24 * int(match["days"])
    else:
        hours, minutes, seconds = ([0, *parts, 0] if len(parts) < 3 else parts)[:3]
    return 3600 * hours + 60 * minutes + seconds


def submit(script: Path, *, times: int) -> list[str]:
    """Submit a script, each time after the one before has ended; return the job ids.

    Raises:
        RuntimeError: If there is no sbatch here, or it refuses.
    """
    jobs: list[str] = []
    for _ in range(times):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        command = ["sbatch", "--parsable", *after, str(script)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise RuntimeError(
                f"there is no sbatch on this machine: submit {script} where there is one"
            ) from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"sbatch refused {script}: {error.stderr.strip()}") from None
        jobs.append(done.stdout.strip().partition(";")[0])
    return jobs
