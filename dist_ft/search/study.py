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
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from dist_ft.search.blocks import Block
from dist_ft.search.halving import Score
from dist_ft.search.keys import Candidate

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


C = TypeVar("C")


class Codes(Protocol[C]):
    """How candidates are written as parameters of an Optuna trial."""

    def params(self, candidate: C) -> dict[str, Any]:
        """Return a candidate's parameters."""
        ...

    def distributions(self, optuna: Any) -> dict[str, Any]:
        """Return what Optuna must know of each parameter."""
        ...

    def candidate(self, params: Mapping[str, Any]) -> C:
        """Return the candidate of a trial's parameters."""
        ...


class BlockCodes:
    """Blocks by where they begin and end."""

    def __init__(self, blocks: int) -> None:
        """Code blocks of a stack of `blocks` transformer blocks."""
        self._blocks = blocks

    def params(self, candidate: Block) -> dict[str, Any]:
        """Return where the block begins and ends."""
        return {"lo": candidate.lo, "hi": candidate.hi}

    def distributions(self, optuna: Any) -> dict[str, Any]:
        """Return the range of both."""
        ends = optuna.distributions.IntDistribution(0, self._blocks)
        return {"lo": ends, "hi": ends}

    def candidate(self, params: Mapping[str, Any]) -> Block:
        """Return the block."""
        return Block(params["lo"], params["hi"])


class KeyCodes:
    """Sets of values by their number and what they override."""

    def __init__(self, candidates: list[Candidate]) -> None:
        """Code these candidates."""
        self._candidates = candidates

    def params(self, candidate: Candidate) -> dict[str, Any]:
        """Return number and values in words."""
        return {"number": candidate.number, "values": candidate.describe()}

    def distributions(self, optuna: Any) -> dict[str, Any]:
        """Return all numbers and values."""
        kinds, candidates = optuna.distributions, self._candidates
        return {
            "number": kinds.IntDistribution(0, len(candidates) - 1),
            "values": kinds.CategoricalDistribution([c.describe() for c in candidates]),
        }

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        """Return the candidate of the number."""
        return self._candidates[params["number"]]


class SearchRecord(Generic[C]):
    """What every candidate scored, one Optuna trial each; only rank 0 has it."""

    def __init__(self, folder: Path, *, name: str, codes: Codes[C], total_steps: int) -> None:
        """Open the record in `folder`, or begin one.

        Args:
            folder: The search's folder.
            name: Of the study.
            codes: How candidates are written.
            total_steps: Length of a whole run.
        """
        optuna = import_optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        # It would announce every study and trial; the search says what it does itself.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._codes = codes
        self._distributions = codes.distributions(optuna)
        self._total_steps = total_steps
        _mend(folder / JOURNAL)
        self._storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        self._study: Study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        trials = self._study.get_trials(deepcopy=False)
        self._numbers = {codes.candidate(t.params): t.number for t in trials}

    def score(self, candidate: C, step: int) -> Score | None:
        """Return what `candidate` scored after `step` optimizer steps, or None."""
        if candidate not in self._numbers:
            return None
        trial = self._trial(candidate)
        if step not in trial.intermediate_values:
            return None
        return Score(trial.intermediate_values[step], trial.user_attrs[_LOSS.format(step)])

    def facts(self, candidate: C) -> dict[str, Any]:
        """Return what else is known of a candidate: what `record` was given last."""
        return dict(self._trial(candidate).user_attrs) if candidate in self._numbers else {}

    def record(self, candidate: C, step: int, *, score: Score, facts: Mapping[str, Any]) -> None:
        """Write a score down.

        Args:
            candidate: What was trained.
            step: Optimizer steps that it has been trained.
            score: What it has come to.
            facts: JSON-able values that belong to it.
        """
        trial = self._optuna.trial.Trial(self._study, self._trial_id(candidate))
        for name, value in {**facts, _LOSS.format(step): score.loss}.items():
            trial.set_user_attr(name, value)
        # The score comes last: a record that was cut short is as good as none.
        trial.report(score.value, step)

    def settle(self, candidate: C) -> None:
        """Write down that `candidate` goes no further: it was trained to the end or given up."""
        trial = self._trial(candidate)
        if trial.state.is_finished():
            return
        score = trial.intermediate_values.get(self._total_steps, math.nan)
        if not math.isnan(score):  # Optuna takes no such value for a result
            self._study.tell(trial.number, score)
        else:
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.PRUNED)

    def _trial(self, candidate: C) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[self._numbers[candidate]]

    def _trial_id(self, candidate: C) -> int:
        if candidate not in self._numbers:
            # One record in the journal: asking for enqueued parameters takes two, and a search
            # that is stopped between them would later hand one candidate's parameters to another.
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    state=self._optuna.trial.TrialState.RUNNING,
                    params=self._codes.params(candidate),
                    distributions=self._distributions,
                )
            )
            self._numbers[candidate] = len(self._study.get_trials(deepcopy=False)) - 1
        study = self._storage.get_study_id_from_name(self._study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(
            study, self._numbers[candidate]
        )


def _mend(journal: Path) -> None:
    """Cut off a last line that was never finished: Optuna would go on behind it and fail later."""
    if journal.is_file() and not (data := journal.read_bytes()).endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
