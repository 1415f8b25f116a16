"""Checkpoints as other versions of the package write them."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash


def write_as_another_version(checkpoint: Path) -> None:
    """Give a checkpoint the manifest of a later format: another number, and a valid digest."""
    file = checkpoint / "manifest.json"
    manifest = {**json.loads(file.read_text()), "format_version": 2}
    del manifest["xxh3"]
    body = json.dumps(manifest, sort_keys=True).encode()
    file.write_text(json.dumps({**manifest, "xxh3": xxhash.xxh3_128_hexdigest(body)}))
