"""The augmenter: a list of transforms for one kind of sample, and what it changed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dist_ft.data.augment.draws import Draws
from dist_ft.data.augment.lexicon import Lexicon
from dist_ft.data.augment.mentions import MentionTable
from dist_ft.data.augment.pieces import Line, make_segmenter
from dist_ft.data.augment.samples import Fields, Sample, SkippedSampleError

# Any change of what apply returns needs a new version: it is part of the loader's state, and the
# golden samples in tests/unit/test_augment.py hold it in place.
AUGMENT_ALGORITHM_VERSION = 1


class Transform(Protocol):
    """One way to change a sample."""

    @property
    def name(self) -> str:
        """Its name in the statistics."""
        ...

    @property
    def chance(self) -> float:
        """Chance of a sample to be worked on."""
        ...

    def apply(self, line: Line, draws: Draws) -> int:
        """Changes the line's pieces and returns the number of changes.

        Fixed pieces stay as they are, and joined ones behind the piece before them.
        """
        ...


@dataclass(frozen=True)
class Changes:
    """What was done to one sample.

    Attributes:
        edits: number of changes by transform; transforms that changed nothing are absent.
        skipped: why the sample was left alone, None if it wasn't.
    """

    edits: Mapping[str, int] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return bool(self.edits)


@dataclass
class AugmentStatistics:
    """What was done to many samples.

    Attributes:
        samples: samples seen.
        changed: samples with a change.
        edits: changes by transform.
        samples_by_transform: samples with a change of this transform.
        skipped: samples left alone, by reason.
    """

    samples: int = 0
    changed: int = 0
    edits: Counter[str] = field(default_factory=Counter)
    samples_by_transform: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, changes: Changes) -> None:
        """Counts one sample."""
        self.samples += 1
        self.changed += changes.changed
        self.edits.update(changes.edits)
        self.samples_by_transform.update(changes.edits.keys())
        if changes.skipped is not None:
            self.skipped[changes.skipped] += 1

    def merge(self, other: AugmentStatistics) -> None:
        """Counts what another one has counted."""
        self.samples += other.samples
        self.changed += other.changed
        self.edits.update(other.edits)
        self.samples_by_transform.update(other.samples_by_transform)
        self.skipped.update(other.skipped)

    def to_json(self) -> dict[str, Any]:
        """Returns the counts by name."""
        return {
            "samples": self.samples,
            "changed": self.changed,
            "edits": dict(sorted(self.edits.items())),
            "samples_by_transform": dict(sorted(self.samples_by_transform.items())),
            "skipped": dict(sorted(self.skipped.items())),
        }


class Augmenter:
    """Changes raw samples at random, as a pure function of (seed, epoch, row).

    Args:
        transforms: applied in this order; two of one name draw different numbers.
        fields: the columns, and what kind of sample they are.
        segmentation: how runs of Chinese characters become words: "characters" or "jieba".

    Raises:
        ValueError: there are no transforms, or the segmentation is unknown.
        RuntimeError: the segmentation's library is not installed.
    """

    def __init__(
        self,
        transforms: Sequence[Transform],
        *,
        fields: Fields,
        segmentation: str = "characters",
    ) -> None:
        if not transforms:
            raise ValueError(
                "augmentation needs at least one transform: list some, or leave it out"
            )
        self.fields = fields
        self._transforms = tuple(transforms)
        self._segmentation = segmentation
        self._segmenter = make_segmenter(segmentation)

    def apply(
        self, sample: Sample, *, seed: int, epoch: int, row: int
    ) -> tuple[Mapping[str, Any], Changes]:
        """Returns the augmented sample and what was changed; the sample itself stays as it is.

        Args:
            sample: a raw row.
            seed: the seed of the task's augmentation.
            epoch: epoch of the task's data: each one changes the row in another way.
            row: the row's number in its source.

        Returns:
            The very same object if nothing was changed.
        """
        try:
            lines = self.fields.lines(sample, segmenter=self._segmenter)
        except SkippedSampleError as reason:
            return sample, Changes(skipped=str(reason))
        edits: Counter[str] = Counter()
        for line in lines:
            for number, transform in enumerate(self._transforms):
                draws = Draws(seed, epoch, row, number, line.name)
                if transform.chance < 1 and draws.uniform() >= transform.chance:
                    continue
                if count := transform.apply(line, draws):
                    edits[transform.name] += count
        if not edits:
            return sample, Changes()
        return self.fields.rebuilt(sample, lines), Changes(edits)

    def describe(self) -> dict[str, Any]:
        """Returns all that the changes depend on, as JSON, for comparing on resume."""
        return {
            "version": AUGMENT_ALGORITHM_VERSION,
            "fields": _described(self.fields),
            "segmentation": self._segmentation,
            "transforms": [_described(transform) for transform in self._transforms],
        }


def _described(part: Any) -> dict[str, Any]:
    # What is not compared, the names of labels, belongs to the task, whose own are looked at.
    fields = [f for f in dataclasses.fields(part) if f.compare]
    content = {f.name: _json(getattr(part, f.name)) for f in fields}
    return {"type": type(part).__name__, **content}


def _json(value: Any) -> Any:
    if isinstance(value, Lexicon | MentionTable):
        return value.fingerprint
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
