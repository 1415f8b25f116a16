"""Reading rows of prepared data with augmentation: raw row -> changed raw row -> encoded again.

The prepared features stay what the lengths and the plan of a step come from. A raw row is changed
as a pure function of (seed, epoch, row), so any process gets the same features for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_ft.data.augment.augmenter import Augmenter, AugmentStatistics, Changes
from dist_ft.data.files import Row
from dist_ft.data.micro_batches import MicroBatch, Part, place_of
from dist_ft.data.schema import RAW_COLUMN, column_kind
from dist_ft.data.shards import Columns, ShardedDataset

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Augmentation:
    """How the rows of one task are augmented.

    Attributes:
        augmenter: changes raw rows.
        encode: raw rows -> features, the same function that the data were prepared with.
        variants: epochs after which the changes repeat, so that what a model makes of the changed
            rows can be kept; None draws others in each epoch.
    """

    augmenter: Augmenter
    encode: Callable[[list[Row]], Sequence[Mapping[str, Any]]]
    variants: int | None = None

    def version(self, epochs: Int64Array) -> Int64Array:
        """Return the epoch whose changes rows of some epochs have, int64 [n]."""
        return epochs if self.variants is None else epochs % self.variants


@dataclass(frozen=True)
class AugmentedRows:
    """Rows as they are trained on.

    Attributes:
        columns: as `ShardedDataset.take` returns them.
        loss_counts: loss terms of each row, int64 [n].
        statistics: what was changed.
    """

    columns: Columns
    loss_counts: Int64Array
    statistics: AugmentStatistics

    def select(self, places: Int64Array) -> Columns:
        """Returns the columns of some of the rows, by their places among them."""
        chosen = places.tolist()
        return {
            name: values[places] if isinstance(values, np.ndarray) else [values[p] for p in chosen]
            for name, values in self.columns.items()
        }


class AugmentedReader:
    """Reads rows of a data set and augments them.

    Of a raw row that gives several features (windows), all are made from the same changed row. If
    the changed row would give another number of features, the raw row is left as it is, so that an
    epoch has no feature less or twice.

    Args:
        dataset: prepared with its raw rows.
        augmentation: the changes and the encoding.
        seed: the run's seed.
        task: the task's name; each task draws other changes.

    Raises:
        ValueError: the data were prepared without raw rows.
    """

    def __init__(
        self, dataset: ShardedDataset, *, augmentation: Augmentation, seed: int, task: str
    ) -> None:
        if RAW_COLUMN not in dataset.manifest.schema.names:
            raise ValueError(
                f"task {task!r} is augmented, but {dataset.folder} was prepared without raw rows: "
                "prepare the data again with augmentation"
            )
        self._dataset = dataset
        self._augmentation = augmentation
        digest = hashlib.blake2b(
            f"{seed}|{task}".encode(), digest_size=8, person=b"dist_ft.augment"
        ).digest()
        self._seed = int.from_bytes(digest, "little")
        self._number, self._count = _feature_numbers(dataset.scalar("source_row"))
        # Where each row has one loss term, changed rows have one, too. Otherwise a step's number of
        # loss terms is only known when all of its rows are changed.
        self.varying_loss_counts = bool((dataset.loss_counts != 1).any())

    def describe(self) -> dict[str, Any]:
        """Returns what the changes depend on, as JSON."""
        found = self._augmentation.augmenter.describe()
        variants = self._augmentation.variants
        return found if variants is None else {**found, "variants": variants}

    def variants_of(self, epochs: Int64Array) -> Int64Array | None:
        """Returns which of a fixed number of versions rows have, None if there is no such number.

        Args:
            epochs: the epoch of each row, int64 [n].
        """
        fixed = self._augmentation.variants is not None
        return self._augmentation.version(epochs) if fixed else None

    def number_versions(
        self, micro_batches: Sequence[MicroBatch], *, parts: Sequence[Part], epochs: Int64Array
    ) -> None:
        """Notes in micro-batches which version of each row they have, if versions come again.

        Args:
            micro_batches: of a step.
            parts: where their rows are among the step's.
            epochs: the epoch of each of the step's rows, int64.
        """
        versions = self.variants_of(epochs)
        for part, micro_batch in zip(parts, micro_batches, strict=True):
            micro_batch.variants = None if versions is None else versions[part.places]

    def read(
        self, rows: Int64Array, epochs: Int64Array, *, columns: Collection[str] | None = None
    ) -> AugmentedRows:
        """Returns columns of the rows as they are in an epoch.

        Args:
            rows: row numbers, int64 [n].
            epochs: the epoch of each row, int64 [n].
            columns: the columns to read, all but the raw row by default.

        Raises:
            ValueError: a row can't be read or encoded.
        """
        statistics = AugmentStatistics()
        try:
            versions = self._augmentation.version(epochs)
            features = self._features(rows, versions, statistics=statistics)
        except ValueError as error:
            place = place_of(rows, dataset=self._dataset)
            raise ValueError(f"augmenting {place}: {error}") from error
        names = set(self._dataset.manifest.schema.names) - {RAW_COLUMN}
        taken = self._dataset.take(rows, columns=names if columns is None else columns)
        for field in self._dataset.manifest.schema:
            if field.name in taken:
                values: Any = taken[field.name]
                for place, feature in features.items():
                    values[place] = _value(feature[field.name], field=field)
        loss_counts = self._dataset.loss_counts[rows].astype(np.int64)
        for place, feature in features.items():
            loss_counts[place] = feature["loss_count"]
        return AugmentedRows(taken, loss_counts, statistics)

    def compare(
        self, rows: Int64Array, *, epoch: int
    ) -> Iterator[tuple[int, Row, Mapping[str, Any], Changes]]:
        """Yields row of the source, raw row before and after, and what was changed, for each row.

        Args:
            rows: row numbers, int64 [n].
            epoch: the epoch whose changes are shown.
        """
        raw = self._dataset.take(rows, columns={RAW_COLUMN, "source_row"})
        (version,) = self._augmentation.version(np.array([epoch])).tolist()
        sources = np.asarray(raw["source_row"]).tolist()
        for source, text, count in zip(
            sources, raw[RAW_COLUMN], self._count[rows].tolist(), strict=True
        ):
            before = json.loads(str(text))
            after, changes = self._augmentation.augmenter.apply(
                before, seed=self._seed, epoch=version, row=source
            )
            if changes.changed:
                (features,) = self._encoded([{**after, "source_row": 0}])
                if reason := self._refusal(features, expected=count):
                    after, changes = before, Changes(skipped=reason)
            yield source, before, after, changes

    def _features(
        self, rows: Int64Array, epochs: Int64Array, *, statistics: AugmentStatistics
    ) -> dict[int, dict[str, Any]]:
        """Returns the new features of the rows that were changed, by place."""
        raw = self._dataset.take(rows, columns={RAW_COLUMN, "source_row"})
        sources = np.asarray(raw["source_row"]).tolist()
        samples: dict[tuple[int, int], str] = {}
        for source, epoch, text in zip(sources, epochs.tolist(), raw[RAW_COLUMN], strict=True):
            samples.setdefault((source, epoch), str(text))
        counts = dict(zip(sources, self._count[rows].tolist(), strict=True))
        made = self._changed(samples, counts=counts, statistics=statistics)
        numbers = self._number[rows].tolist()
        places = enumerate(zip(sources, epochs.tolist(), numbers, strict=True))
        return {
            place: made[source, epoch][number]
            for place, (source, epoch, number) in places
            if (source, epoch) in made
        }

    def _changed(
        self,
        samples: Mapping[tuple[int, int], str],
        *,
        counts: Mapping[int, int],
        statistics: AugmentStatistics,
    ) -> dict[tuple[int, int], list[dict[str, Any]]]:
        """Returns the features of the raw rows (source row, epoch) that were changed."""
        changed: list[Row] = []
        made: list[tuple[tuple[int, int], Changes]] = []
        for (source, epoch), text in samples.items():
            sample, changes = self._augmentation.augmenter.apply(
                json.loads(text), seed=self._seed, epoch=epoch, row=source
            )
            if changes.changed:
                # A number of its own: two epochs of one row may meet in a step.
                changed.append({**sample, "source_row": len(changed)})
                made.append(((source, epoch), changes))
            else:
                statistics.add(changes)
        encoded = self._encoded(changed)
        kept = {}
        for (key, changes), features in zip(made, encoded, strict=True):
            reason = self._refusal(features, expected=counts[key[0]])
            statistics.add(Changes(skipped=reason) if reason else changes)
            if reason is None:
                kept[key] = [{**feature, "source_row": key[0]} for feature in features]
        return kept

    def _encoded(self, rows: list[Row]) -> list[list[dict[str, Any]]]:
        features: list[list[dict[str, Any]]] = [[] for _ in rows]
        for feature in self._augmentation.encode(rows) if rows else ():
            length = len(feature["input_ids"])
            features[feature["source_row"]].append({**feature, "length": length})
        return features

    def _refusal(self, features: Sequence[Mapping[str, Any]], *, expected: int) -> str | None:
        """Returns why changed features can't be used, None if they can."""
        if len(features) != expected:
            return "other_number_of_features"
        if any(feature["length"] == 0 for feature in features):
            return "no_tokens"
        if not self.varying_loss_counts and any(f["loss_count"] != 1 for f in features):
            return "other_loss_count"
        return None


def _feature_numbers(source_rows: np.ndarray) -> tuple[Int64Array, Int64Array]:
    """Returns each feature's number among those of its raw row, and how many these are."""
    # Features of one raw row follow each other.
    starts = np.flatnonzero(np.diff(source_rows, prepend=-1))
    counts = np.diff(starts, append=len(source_rows))
    return np.arange(len(source_rows)) - np.repeat(starts, counts), np.repeat(counts, counts)


def columns_of(features: Sequence[Mapping[str, Any]], *, schema: pa.Schema) -> Columns:
    """Returns features that are in no shard as `ShardedDataset.take` would; but for ``length``."""
    found: Columns = {}
    for field in schema:
        if field.name != "length":
            values = [_value(feature[field.name], field=field) for feature in features]
            found[field.name] = np.array(values) if column_kind(field) == "scalar" else values
    return found


def _value(value: Any, *, field: Any) -> Any:
    if column_kind(field) == "ragged":
        return np.asarray(value, dtype=field.type.value_type.to_pandas_dtype())
    return value
