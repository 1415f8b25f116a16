"""Encoding raw rows into features, in this process or in several, always in the same order."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dist_ft.data.features import to_record_batch
from dist_ft.data.files import Row
from dist_ft.data.schema import RAW_COLUMN
from dist_ft.data.selection import BAD_ROW_ERRORS, RowFunctions

_TRUNCATED = "truncated_tokens"
# Batches that are under way or waiting to be fetched, for each process: memory stays bounded
# however far reading is ahead.
_BATCHES_PER_PROCESS = 2


@dataclass(frozen=True)
class EncodedBatch:
    """The features of a batch of raw rows.

    Attributes:
        features: the features, checked; None if there are none.
        refused: number in the source of each row that can't be encoded, and what is wrong.
        rows_truncated: features that lost tokens.
        tokens_dropped: how many they lost.
    """

    features: pa.RecordBatch | None
    refused: tuple[tuple[int, str], ...] = ()
    rows_truncated: int = 0
    tokens_dropped: int = 0


@dataclass(frozen=True)
class BatchEncoder:
    """Encodes batches of raw rows, finds the bad rows of a batch and counts truncation.

    Attributes:
        functions: the task's encoding.
        schema: the columns of the shards.
        source: what error messages call the source.
        raw_columns: columns of the raw rows to keep with the features; none by default.
    """

    functions: RowFunctions
    schema: pa.Schema
    source: str
    raw_columns: tuple[str, ...] = ()

    def encode(self, rows: list[Row]) -> EncodedBatch:
        """Returns the features of a batch.

        Raises:
            ValueError: the task's functions disagree, or a feature doesn't fit its schema.
        """
        if not rows:
            return EncodedBatch(None)
        refused: list[tuple[int, str]] = []
        try:
            features = self.functions.encode(rows)
        except BAD_ROW_ERRORS:
            features = self._one_by_one(rows, refused=refused)
        by_number = {row["source_row"]: row for row in rows}
        dropped = [feature.get(_TRUNCATED, 0) for feature in features]
        finished = [self._finished(feature, rows=by_number) for feature in features]
        return EncodedBatch(
            features=to_record_batch(finished, schema=self.schema) if finished else None,
            refused=tuple(refused),
            rows_truncated=sum(count > 0 for count in dropped),
            tokens_dropped=sum(dropped),
        )

    def _one_by_one(
        self, rows: list[Row], *, refused: list[tuple[int, str]]
    ) -> Sequence[Mapping[str, Any]]:
        features: list[Mapping[str, Any]] = []
        for row in rows:
            try:
                features.extend(self.functions.encode([row]))
            except BAD_ROW_ERRORS as error:
                refused.append((row["source_row"], str(error)))
        return features

    def _finished(self, feature: Mapping[str, Any], *, rows: Mapping[Any, Row]) -> dict[str, Any]:
        row = rows.get(feature.get("source_row"))
        if row is None:
            raise ValueError(
                f"encode() gave a feature the source_row {feature.get('source_row')}, which is "
                "no row of its batch: take it from the raw row's 'source_row'"
            )
        finished = {key: value for key, value in feature.items() if key != _TRUNCATED}
        finished["length"] = len(finished["input_ids"])
        if self.raw_columns:
            finished[RAW_COLUMN] = self._raw(row)
        return finished

    def _raw(self, row: Row) -> str:
        kept = {column: row[column] for column in self.raw_columns if column in row}
        try:
            return json.dumps(
                kept, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.source}, row {row['source_row'] + 1}: the columns "
                f"{', '.join(kept)} can't be kept as JSON for augmentation ({error}): convert them"
            ) from error


def encode_batches(
    batches: Iterable[list[Row]], *, encoder: BatchEncoder, processes: int = 1
) -> Generator[EncodedBatch, None, None]:
    """Yields the features of each batch, in the order of the batches.

    With several processes the encoder is inherited by fork, so the task's functions need not be
    picklable; only rows and finished features travel.

    Args:
        batches: raw rows; read a little ahead.
        encoder: encodes them.
        processes: how many processes encode; 1 is this one.

    Raises:
        ValueError: a batch can't be encoded.
        RuntimeError: an encoding process died.
    """
    if processes <= 1:
        yield from (encoder.encode(rows) for rows in batches)
        return
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    pending: deque[Future[tuple[bytes, EncodedBatch]]] = deque()
    try:
        for rows in batches:
            pending.append(pool.submit(_encode_in_worker, rows))
            if len(pending) > _BATCHES_PER_PROCESS * processes:
                yield _unpacked(*pending.popleft().result())
        while pending:
            yield _unpacked(*pending.popleft().result())
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that encodes data died, perhaps for want of memory: use fewer processes"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# Set in encoding processes only, at their start: what a forked process inherits need not travel.
_WORKER: dict[str, BatchEncoder] = {}


def _start_worker(encoder: BatchEncoder) -> None:
    # Threads of a tokenizer don't survive a fork, and the processes share the cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER["encoder"] = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent can't stop its processes, and they hold the lock that they inherited.
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(rows: list[Row]) -> tuple[bytes, EncodedBatch]:
    encoded = _WORKER["encoder"].encode(rows)
    if encoded.features is None:
        return b"", encoded
    # Arrow's own format, as pickling the lists of numbers would cost more than encoding them.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, encoded.features.schema) as writer:
        writer.write_batch(encoded.features)
    empty = EncodedBatch(None, encoded.refused, encoded.rows_truncated, encoded.tokens_dropped)
    return sink.getvalue().to_pybytes(), empty


def _unpacked(features: bytes, encoded: EncodedBatch) -> EncodedBatch:
    if not features:
        return encoded
    batch = pa.ipc.open_stream(features).read_next_batch()
    return EncodedBatch(batch, encoded.refused, encoded.rows_truncated, encoded.tokens_dropped)
