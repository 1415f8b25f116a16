"""The columns of a shard: the base columns that every task has, and the types a task may add."""

from __future__ import annotations

import pyarrow as pa

BASE_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        # The number of tokens, as its own column: planning a batch never touches the tokens.
        pa.field("length", pa.int32()),
        # Loss terms in the row: 1 for classification, labelled tokens for token tasks.
        pa.field("loss_count", pa.int32()),
        # The row of the raw source it was made from, counted from 0.
        pa.field("source_row", pa.int64()),
    ]
)

# The fields of the raw row that encoding needs, as canonical JSON: only there if rows are to be
# augmented when they are read.
RAW_COLUMN = "raw"


def shard_schema(task_columns: pa.Schema, *, raw: bool = False) -> pa.Schema:
    """Returns the schema of a task's shards: the base columns, then the task's own.

    Args:
        task_columns: the task's columns.
        raw: whether the raw row is kept, too.

    Raises:
        ValueError: a task column has the name of a base column, comes twice, or has a type that
            shards don't hold.
    """
    kept = [pa.field(RAW_COLUMN, pa.string())] if raw else []
    seen = {*BASE_SCHEMA.names, *(field.name for field in kept)}
    for field in task_columns:
        if field.name in seen:
            raise ValueError(
                f"column {field.name!r} is already in the shard schema: give the task's column "
                f"another name than {', '.join(sorted(seen))}"
            )
        seen.add(field.name)
        column_kind(field)
    return pa.schema([*BASE_SCHEMA, *kept, *(pa.field(f.name, f.type) for f in task_columns)])


def column_kind(field: pa.Field) -> str:
    """Returns how a column is stored and read: "ragged", "scalar" or "string".

    Raises:
        ValueError: the type is none of number, list of numbers, string.
    """
    if pa.types.is_string(field.type):
        return "string"
    if _is_number(field.type):
        return "scalar"
    if pa.types.is_list(field.type) and _is_number(field.type.value_type):
        return "ragged"
    raise ValueError(
        f"column {field.name!r} has type {field.type}, but shards hold numbers, lists of numbers "
        "and strings: store a flag as int8 and a nested list as several flat lists"
    )


def _is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_float32(dtype) or pa.types.is_float64(dtype)
