"""Features on their way into a shard: Python rows -> checked record batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dist_ft.data.schema import column_kind


def to_record_batch(features: Sequence[Mapping[str, Any]], *, schema: pa.Schema) -> pa.RecordBatch:
    """Returns features as a record batch, each with exactly the columns of the schema.

    Raises:
        ValueError: a column is missing, unknown, null or doesn't fit its type; a row has no tokens,
            or a negative token id or loss count.
    """
    names = set(schema.names)
    for feature in features:
        if feature.keys() != names:
            raise ValueError(
                f"a feature has the columns {sorted(feature)}, but the task's schema with the base "
                f"columns has {sorted(names)}: encode() and schema() must agree"
            )
    arrays = []
    for field in schema:
        try:
            array = pa.array([feature[field.name] for feature in features], type=field.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(f"column {field.name!r} is not {field.type}: {error}") from error
        flat = array.flatten() if column_kind(field) == "ragged" else array
        if array.null_count or flat.null_count:
            raise ValueError(f"column {field.name!r} has a null: every feature needs a value")
        arrays.append(array)
    batch = pa.record_batch(arrays, schema=schema)
    _check_values(batch)
    return batch


def _check_values(batch: pa.RecordBatch) -> None:
    ids, lengths = batch.column("input_ids"), batch.column("length").to_numpy()
    source_rows = batch.column("source_row")
    if not np.array_equal(np.diff(ids.offsets.to_numpy()), lengths):
        raise ValueError("column 'length' is not the number of input_ids: encode() is wrong")
    if int(lengths.min()) < 1:
        raise ValueError(f"source row {source_rows[int(lengths.argmin())]} has no tokens")
    if int(ids.flatten().to_numpy().min()) < 0:
        raise ValueError("column 'input_ids' has a negative token id: check the tokenizer")
    if int(batch.column("loss_count").to_numpy().min()) < 0:
        raise ValueError("column 'loss_count' is negative: encode() is wrong")
