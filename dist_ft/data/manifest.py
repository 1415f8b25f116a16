"""The manifest of a prepared data set: what its shards hold and what they were made from.

A data set without a manifest doesn't exist: the manifest is written last and is the commit record.
`manifest.json` is canonical JSON (sorted keys, no spaces); `manifest.sha256` holds its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from dist_ft.data.sampling import ORDER_ALGORITHM_VERSION

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_HASH_NAME = "manifest.sha256"
_SHARD_NAME = re.compile(r"shard-\d{5}-[0-9a-f]{8}\.arrow")
_PREPARE_AGAIN = "prepare the data again"


@dataclass(frozen=True)
class ShardInfo:
    """What one shard file holds; lengths in tokens, size in bytes."""

    file: str
    bytes: int
    rows: int
    tokens: int
    loss_count: int
    min_length: int
    max_length: int
    max_token_id: int
    xxh3_128: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared split is.

    Attributes:
        task: the task's name.
        split: "train", "validation" or "test".
        schema: the columns of the shards.
        shards: the files, in row order.
        length_histogram: {"width": w, "counts": [...]}; counts[i] rows have a length in
            [i * w, (i + 1) * w) tokens.
        tokenizer: the tokenizer's fingerprint.
        preprocessing: {"version", "arguments", "rows_truncated", "tokens_dropped"}.
        source: fingerprints of the raw sources by split, and the fractions.
        selection: how many raw rows were read, dropped for which reason, and kept.
        input_fingerprint: sha256 of all that the rows depend on; equal means "need not be
            prepared again".
    """

    task: str
    split: str
    schema: pa.Schema
    shards: tuple[ShardInfo, ...]
    length_histogram: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    source: Mapping[str, Any]
    selection: Mapping[str, int]
    input_fingerprint: str

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def loss_count(self) -> int:
        """Number of loss terms."""
        return sum(shard.loss_count for shard in self.shards)

    @property
    def min_length(self) -> int:
        """Tokens of the shortest row."""
        return min(shard.min_length for shard in self.shards)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(shard.max_length for shard in self.shards)

    @property
    def max_token_id(self) -> int:
        """The largest token id; a model's vocabulary must be larger."""
        return max(shard.max_token_id for shard in self.shards)

    @property
    def dataset_id(self) -> str:
        """The sha256 of everything the manifest says, shard hashes included."""
        return fingerprint(self._body())

    def to_json(self) -> dict[str, Any]:
        """Returns the content of manifest.json."""
        body = self._body()
        return {**body, "dataset_id": fingerprint(body)}

    def _body(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "order_algorithm_version": ORDER_ALGORITHM_VERSION,
            "task": self.task,
            "split": self.split,
            "schema": {
                "arrow_base64": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
                "columns": {field.name: str(field.type) for field in self.schema},
            },
            "shards": [asdict(shard) for shard in self.shards],
            "totals": {
                "rows": self.rows,
                "tokens": self.tokens,
                "loss_count": self.loss_count,
                "min_length": self.min_length,
                "max_length": self.max_length,
                "max_token_id": self.max_token_id,
            },
            "length_histogram": dict(self.length_histogram),
            "tokenizer": dict(self.tokenizer),
            "preprocessing": dict(self.preprocessing),
            "source": dict(self.source),
            "selection": dict(self.selection),
            "input_fingerprint": self.input_fingerprint,
        }


def canonical_json(value: Any) -> str:
    """Returns the value as JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Returns the sha256 of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def differences(old: Any, new: Any, *, path: str = "") -> list[str]:
    """Returns where two JSON values differ, one "dotted.path: old -> new" each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(
                old.get(key, "(absent)"), new.get(key, "(absent)"), path=f"{path}.{key}".lstrip(".")
            )
        ]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_manifest(folder: Path, *, manifest: Manifest) -> None:
    """Writes manifest.json and its hash durably; the data set exists from then on."""
    text = canonical_json(manifest.to_json())
    # The hash goes first: when manifest.json appears, everything it needs is there.
    write_durably(folder / _HASH_NAME, content=hashlib.sha256(text.encode()).hexdigest() + "\n")
    write_durably(folder / MANIFEST_NAME, content=text)


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of a prepared folder, checked against its own hash.

    Raises:
        ValueError: there is no manifest, it was changed, has an unknown version, names a file
            outside of the folder or names a file twice.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no prepared data ({MANIFEST_NAME} is missing): prepare the data first"
        )
    raw = path.read_bytes()
    hash_path = folder / _HASH_NAME
    expected = hash_path.read_text().strip() if hash_path.is_file() else "(no manifest.sha256)"
    actual = hashlib.sha256(raw).hexdigest()
    if actual != expected:
        raise ValueError(
            f"{path} was changed after it was written (sha256 {actual}, expected {expected}): "
            f"{_PREPARE_AGAIN}"
        )
    return _parse(json.loads(raw), path=path)


def _parse(content: dict[str, Any], *, path: Path) -> Manifest:
    for key, known in (
        ("format_version", FORMAT_VERSION),
        ("order_algorithm_version", ORDER_ALGORITHM_VERSION),
    ):
        if content.get(key) != known:
            raise ValueError(
                f"{path} has {key} {content.get(key)!r}, this version reads {known}: "
                f"{_PREPARE_AGAIN} or use the version of dist_ft that wrote it"
            )
    body = {key: value for key, value in content.items() if key != "dataset_id"}
    if fingerprint(body) != content.get("dataset_id"):
        raise ValueError(f"{path} doesn't match its dataset_id: {_PREPARE_AGAIN}")
    shards = tuple(ShardInfo(**shard) for shard in content["shards"])
    _check_names([shard.file for shard in shards], path=path)
    plain = {f.name: content[f.name] for f in fields(Manifest) if f.name in content}
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["schema"]["arrow_base64"])))
    return Manifest(**{**plain, "shards": shards, "schema": schema})


def _check_names(names: Sequence[str], *, path: Path) -> None:
    if not names:
        raise ValueError(f"{path} names no shards: {_PREPARE_AGAIN}")
    for name in names:
        # The pattern has no separator, so a name can't lead out of the folder.
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"{path} names the shard {name!r}, but a shard is called "
                f"shard-<5 digits>-<8 hex digits>.arrow and lies in the same folder: "
                f"{_PREPARE_AGAIN}"
            )
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path} names the shards {twice} more than once: {_PREPARE_AGAIN}")


def write_durably(path: Path, *, content: str) -> None:
    """Writes a text file so that it has either its old or its new content, even after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: a rename is only safe after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
