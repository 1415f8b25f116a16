"""The record of a search: an Optuna study in a journal file, so that it can go on and be looked at.

Optuna keeps the record; which blocks are tried and how long is decided by ``halving``, because
Optuna's own successive halving is asynchronous: it lets the first trials of every rung pass and
depends on the order of the trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dist_ft.search.blocks import Block
from dist_ft.search.halving import Score

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

JOURNAL = "study.journal"
_LOSS = "loss after {} steps"


def import_optuna() -> ModuleType:
    """Return Optuna's module.

    Raises:
        RuntimeError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise RuntimeError(
            "dist-ft search needs Optuna: install it with pip install 'dist-ft[search]'"
        ) from error
    return optuna


class SearchRecord:
    """What every candidate scored, one Optuna trial each; only rank 0 has it."""

    def __init__(self, folder: Path, *, name: str, blocks: int, total_steps: int) -> None:
        """Open the record in `folder`, or begin one.

        Args:
            folder: The search's folder.
            name: Of the study.
            blocks: The number of transformer blocks.
            total_steps: Length of a whole run.
        """
        optuna = import_optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        # It would announce every study and trial; the search says what it does itself.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._ends = optuna.distributions.IntDistribution(0, blocks)
        self._total_steps = total_steps
        _mend(folder / JOURNAL)
        self._storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        self._study: Study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        self._numbers = {_block(t): t.number for t in self._study.get_trials(deepcopy=False)}

    def score(self, block: Block, step: int) -> Score | None:
        """Return what `block` scored after `step` optimizer steps, or None."""
        if block not in self._numbers:
            return None
        trial = self._trial(block)
        if step not in trial.intermediate_values:
            return None
        return Score(trial.intermediate_values[step], trial.user_attrs[_LOSS.format(step)])

    def facts(self, block: Block) -> dict[str, Any]:
        """Return what else is known of a block: what `record` was given last."""
        return dict(self._trial(block).user_attrs) if block in self._numbers else {}

    def record(self, block: Block, step: int, *, score: Score, facts: Mapping[str, Any]) -> None:
        """Write a score down.

        Args:
            block: The candidate.
            step: Optimizer steps that it has been trained.
            score: What it has come to.
            facts: JSON-able values that belong to it.
        """
        trial = self._optuna.trial.Trial(self._study, self._trial_id(block))
        for name, value in {**facts, _LOSS.format(step): score.loss}.items():
            trial.set_user_attr(name, value)
        # The score comes last: a record that was cut short is as good as none.
        trial.report(score.value, step)

    def settle(self, block: Block) -> None:
        """Write down that `block` goes no further: it was trained to the end or given up."""
        trial = self._trial(block)
        if trial.state.is_finished():
            return
        score = trial.intermediate_values.get(self._total_steps, math.nan)
        if not math.isnan(score):  # Optuna takes no such value for a result
            self._study.tell(trial.number, score)
        else:
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.PRUNED)

    def _trial(self, block: Block) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[self._numbers[block]]

    def _trial_id(self, block: Block) -> int:
        if block not in self._numbers:
            # One record in the journal: asking for enqueued parameters takes two, and a search
            # that is stopped between them would later hand one block's parameters to another.
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    state=self._optuna.trial.TrialState.RUNNING,
                    params={"lo": block.lo, "hi": block.hi},
                    distributions={"lo": self._ends, "hi": self._ends},
                )
            )
            self._numbers[block] = len(self._study.get_trials(deepcopy=False)) - 1
        study = self._storage.get_study_id_from_name(self._study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study, self._numbers[block])


def _mend(journal: Path) -> None:
    """Cut off a last line that was never finished: Optuna would go on behind it and fail later."""
    if journal.is_file() and not (data := journal.read_bytes()).endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _block(trial: FrozenTrial) -> Block:
    return Block(trial.params["lo"], trial.params["hi"])
