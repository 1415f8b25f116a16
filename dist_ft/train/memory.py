"""What a run does when a device runs out of memory: the same step in smaller micro-batches.

Where the rank could stay in step, all ranks plan the step anew, at once. Where others were waiting
for it by then (see `dist_ft.engine.out_of_memory`), the ranks end, and start again from the last
checkpoint. Both ways the rows of the step, the loss over the global batch and the length of the run
stay: a micro-batch size only says how much is computed at once. The smaller size stands in the run
folder and holds until the recipe's own is changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.engine.base import StepResult
from dist_ft.train.console import Console
from dist_ft.train.evaluate import ScoringMemoryError
from dist_ft.train.loop import Run
from dist_ft.train.parts import Parts
from dist_ft.train.recorder import Recorder
from dist_ft.train.run_folder import RunFolder

NOTE = "micro_batch.json"


class ReplannedError(RuntimeError):
    """The ranks must start again: with smaller micro-batches they may go on."""

    # By which the launcher knows that the next attempt will be another one.
    exit_code = 76


@dataclass(frozen=True)
class Portion:
    """What a rank computes at once.

    Attributes:
        rows: Rows of a micro-batch, in the mean where a budget lays them out.
        tokens: Most tokens of a micro-batch, if there is a budget.
        evaluation: Rows of a micro-batch of an evaluation; None leaves them to the others.
    """

    rows: int
    tokens: int | None = None
    evaluation: int | None = None

    def smaller(self, *, longest: int) -> Portion | None:
        """Return about half of it, None if it can't be less.

        Its rows divide these, so that ranks and global batch still fit.

        Args:
            longest: Tokens of the longest row; no budget may be below.
        """
        rows = max((n for n in range(1, self.rows) if self.rows % n == 0), default=1)
        tokens = None if self.tokens is None else max(longest, self.tokens // 2)
        portion = Portion(rows, tokens, self.evaluation)
        return None if portion == self else portion

    def __str__(self) -> str:
        """Return it in words."""
        budget = "" if self.tokens is None else f", at most {self.tokens} tokens"
        scored = "" if self.evaluation is None else f", {self.evaluation} in an evaluation"
        return f"{self.rows} row{'s' if self.rows > 1 else ''}{budget}{scored}"


@dataclass
class FitMemory:
    """Lowers what is computed at once; the same on every rank.

    Attributes:
        folder: The run's.
        configured: What the recipe says.
        longest: Tokens of the longest training row.
        now: What holds.
    """

    folder: Path
    configured: Portion
    longest: int
    recorder: Recorder
    console: Console
    now: Portion = field(init=False)

    def __post_init__(self) -> None:
        """Begin with what the recipe says."""
        self.now = self.configured

    def resume(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the sizes that an earlier attempt had to come down to."""
        found = dist.broadcast_object(self._read() if dist.rank() == 0 else None)
        if found is None:
            return recipe
        self.now = found
        self.console.say(
            f"micro-batches of {self.now}, as a device ran out of memory with more; "
            "train.micro_batch_size (or evaluation.micro_batch_size) in the recipe sets it anew"
        )
        return self._applied(recipe)

    def _applied(self, recipe: Recipe) -> Recipe:
        sizes = {"micro_batch_size": self.now.rows, "micro_batch_tokens": self.now.tokens}
        scored = recipe.evaluation.model_copy(update={"micro_batch_size": self.now.evaluation})
        train = recipe.train.model_copy(update=sizes)
        return recipe.model_copy(update={"train": train, "evaluation": scored})

    def _read(self) -> Portion | None:
        """Return the portion that was noted for this recipe."""
        try:
            note = json.loads((self.folder / NOTE).read_text())
            configured, now = Portion(**note["configured"]), Portion(**note["now"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.console.say(f"WARNING: {self.folder / NOTE} cannot be read ({error}): left out")
            return None
        return now if configured == self.configured else None

    def replan(self, run: Run, result: StepResult) -> bool:
        """Return whether a refused step is to be done again, in smaller micro-batches.

        Every rank calls it, and hears of every other.

        Raises:
            RuntimeError: On every rank, if a single row does not fit.
        """
        lacked = dist.all_gather_object(result.lacked_memory)
        ranks = [rank for rank, what in enumerate(lacked) if what is not None]
        if not ranks:
            return False
        portion = self._smaller(ranks[0], str(lacked[ranks[0]]))
        before, self.now = self.now, portion
        if dist.rank() == 0:
            self._write()
        run.loader.replan(portion.rows, max_tokens=portion.tokens)
        self._tell(run.progress.step, ranks=ranks, before=before, why=str(lacked[ranks[0]]))
        return True

    def _smaller(self, rank: int, why: str) -> Portion:
        portion = self.now.smaller(longest=self.longest)
        if portion is None:
            raise RuntimeError(
                f"rank {rank} has no memory for a single row ({why}): lower the tasks' max_length, "
                "set model.activation_checkpointing, raise engine.zero_stage or use more devices"
            )
        return portion

    def _tell(self, step: int, *, ranks: list[int], before: Portion, why: str) -> None:
        self.recorder.event(
            "out_of_memory",
            step=step,
            ranks=ranks,
            why=why,
            micro_batch_size=self.now.rows,
            micro_batch_tokens=self.now.tokens,
            micro_batch_size_before=before.rows,
        )
        self.console.say(
            f"WARNING: step {step}: rank {', '.join(map(str, ranks))} ran out of memory ({why}); "
            f"from here on micro-batches of {self.now} instead of {before}, same rows in each step"
        )

    def _write(self) -> None:
        """Note what holds; whoever writes it at the same time writes the same."""
        body = {"configured": asdict(self.configured), "now": asdict(self.now)}
        aside = self.folder / f".{NOTE}-{dist.rank()}-{os.getpid()}"
        aside.write_text(json.dumps(body))
        aside.replace(self.folder / NOTE)

    @contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        """Turn memory that ran out where the ranks cannot stay in step into a fresh start.

        Raises:
            ReplannedError: On the rank that has no memory, once it has noted the smaller size; on
                the others when they find its note after it has left them.
            RuntimeError: If a single row does not fit.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            why = str(error).splitlines()[0]
            self._start_again(run, self._smaller(dist.rank(), why), why)
        except ScoringMemoryError as error:
            if not error.smaller:
                raise RuntimeError(
                    f"rank {dist.rank()} has no memory to score a single row ({error}): lower the "
                    "task's max_length, raise engine.zero_stage or use more devices"
                ) from None
            self._start_again(run, replace(self.now, evaluation=error.smaller), str(error))
        except RuntimeError as error:
            noted = self._read()
            if noted is None or noted == self.now:
                raise
            raise ReplannedError(
                f"another rank ran out of memory in step {run.progress.step}; the run goes on in "
                f"micro-batches of {noted}"
            ) from error

    def _start_again(self, run: Run, portion: Portion, why: str) -> NoReturn:
        before, self.now = self.now, portion
        self._write()
        raise ReplannedError(
            f"rank {dist.rank()} ran out of memory in step {run.progress.step} ({why}); the run "
            f"goes on from its last checkpoint in micro-batches of {self.now} instead of {before}: "
            "start it with --resume"
        ) from None


def fit_memory(
    recipe: Recipe, parts: Parts, *, folder: RunFolder, recorder: Recorder, console: Console
) -> FitMemory:
    """Return what lowers the micro-batches of a recipe's run."""
    train, scored = recipe.train, recipe.evaluation.micro_batch_size
    portion = Portion(train.micro_batch_size, train.micro_batch_tokens, scored)
    longest = max(int(t.datasets["train"].lengths.max()) for t in parts.tasks)
    return FitMemory(folder.root, portion, longest, recorder, console)
