import hashlib
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dist_ft.data.manifest import canonical_json, fingerprint
from dist_ft.data.schema import shard_schema
from dist_ft.data.shard_file import ShardFile
from dist_ft.data.shards import ShardedDataset, ShardWriter, read_manifest, verify
from tests.helpers.datasets import TASK_SCHEMA, feature, make_dataset, write_folder

LENGTHS = [3, 9, 1, 17, 8, 5, 30, 2, 2, 4] * 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "t", lengths=LENGTHS)
    return tmp_path / "t"


def test_rows_read_back_as_written(folder: Path) -> None:
    dataset = ShardedDataset(folder, verify="hash")
    assert len(dataset) == len(LENGTHS)
    assert len(dataset.manifest.shards) > 3
    assert dataset.lengths.dtype == np.int32
    assert dataset.lengths.tolist() == LENGTHS
    assert dataset.loss_counts.tolist() == [n - 1 for n in LENGTHS]
    order = np.random.default_rng(0).permutation(len(LENGTHS))
    columns = dataset.take(np.concatenate([order, order[:3]]))
    for place, row in enumerate([*order, *order[:3]]):
        expected = feature(int(row), length=LENGTHS[row])
        for name, value in expected.items():
            found = columns[name][place]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == value, name


def test_rows_are_not_writable(folder: Path) -> None:
    row = ShardedDataset(folder, verify="size").take(np.array([3]))["input_ids"][0]
    assert isinstance(row, np.ndarray)
    assert not row.flags.writeable


def test_manifest_counts(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.rows == len(LENGTHS)
    assert manifest.tokens == sum(LENGTHS)
    assert manifest.loss_count == sum(LENGTHS) - len(LENGTHS)
    assert (manifest.min_length, manifest.max_length) == (1, 30)
    ids = [i for r, n in enumerate(LENGTHS) for i in feature(r, length=n)["input_ids"]]
    assert manifest.max_token_id == max(ids)
    width, counts = (manifest.length_histogram[k] for k in ("width", "counts"))
    assert counts == np.bincount(np.array(LENGTHS) // width).tolist()
    for shard in manifest.shards:
        content = (folder / shard.file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
        assert shard.xxh3_128[:8] in shard.file
    assert manifest.dataset_id == json.loads((folder / "manifest.json").read_text())["dataset_id"]


def test_shards_open_as_a_hugging_face_dataset(folder: Path, tmp_path: Path) -> None:
    import datasets

    files = [str(folder / shard.file) for shard in read_manifest(folder).shards]
    opened = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(opened, datasets.Dataset)
    assert len(opened) == len(LENGTHS)
    for row in (0, 5, len(LENGTHS) - 1):
        assert opened[row] == feature(row, length=LENGTHS[row])


def test_a_shard_is_one_uncompressed_batch(folder: Path) -> None:
    for shard in read_manifest(folder).shards:
        reader = pa.ipc.open_file(folder / shard.file)
        assert reader.num_record_batches == 1
        # Values are read from their places in the file, so compressed ones are refused.
        batch = reader.get_batch(0)
        small = folder / "compressed.arrow"
        with pa.ipc.new_file(
            small, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
        ) as writer:
            writer.write_batch(batch)
        info = replace(shard, bytes=small.stat().st_size)
        with pytest.raises(ValueError, match=r"compressed\.arrow can't be read as an Arrow file"):
            ShardFile(small, info=info, schema=batch.schema)


def test_same_rows_give_the_same_dataset_id(tmp_path: Path, folder: Path) -> None:
    again = write_folder(tmp_path / "u" / "t", lengths=LENGTHS)
    assert again.dataset_id == read_manifest(folder).dataset_id
    other = write_folder(tmp_path / "v" / "t", lengths=[*LENGTHS[:-1], 5])
    assert other.dataset_id != again.dataset_id


def read_manifest_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep thousands of openings of one folder from reading its manifest thousands of times."""
    manifest = read_manifest(folder)
    monkeypatch.setattr("dist_ft.data.shards.read_manifest", lambda _: manifest)


def test_every_flipped_byte_of_a_shard_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "t", lengths=[3, 4], target_bytes=10**9)
    read_manifest_once(monkeypatch, tmp_path / "t")
    (shard,) = (tmp_path / "t").glob("*.arrow")
    content = shard.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x01
        shard.write_bytes(changed)
        with pytest.raises(ValueError, match=shard.name):
            ShardedDataset(tmp_path / "t", verify="hash")


def test_size_check_refuses_or_reads_flipped_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the hash a changed token id passes, but a damaged header must not kill the process.
    write_folder(tmp_path / "t", lengths=[3, 4, 6], target_bytes=10**9)
    read_manifest_once(monkeypatch, tmp_path / "t")
    (shard,) = (tmp_path / "t").glob("*.arrow")
    content = shard.read_bytes()
    refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x80
        shard.write_bytes(changed)
        try:
            ShardedDataset(tmp_path / "t", verify="size").take(np.arange(3))
        except ValueError:
            refused += 1
    assert refused > len(content) // 20


def damage_cut(shards: list[Path]) -> None:
    shards[1].write_bytes(shards[1].read_bytes()[:-1])


def damage_missing(shards: list[Path]) -> None:
    shards[1].unlink()


def damage_longer(shards: list[Path]) -> None:
    shards[1].write_bytes(shards[1].read_bytes() + b"x")


@pytest.mark.parametrize("damage", [damage_cut, damage_missing, damage_longer])
def test_size_check_names_the_file(folder: Path, damage: object) -> None:
    shards = sorted(folder.glob("*.arrow"))
    assert callable(damage)
    damage(shards)
    with pytest.raises(ValueError, match=rf"{shards[1].name}.*(missing|expected)"):
        ShardedDataset(folder, verify="size")


def test_swapped_shards_of_one_size_are_detected(tmp_path: Path) -> None:
    # Two shards of equal size but other rows: only the content tells them apart.
    write_folder(tmp_path / "t", lengths=[4] * 14 + [4, 8, 8, 4, 8, 4, 4] * 2, target_bytes=1)
    first, second = sorted((tmp_path / "t").glob("*.arrow"))[2:]
    assert first.stat().st_size == second.stat().st_size
    spare = tmp_path / "spare"
    shutil.move(first, spare)
    shutil.move(second, first)
    shutil.move(spare, second)
    with pytest.raises(ValueError, match=first.name):
        ShardedDataset(tmp_path / "t", verify="hash")


def rewrite_manifest(folder: Path, change: dict[str, object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content.update(change)
    content.pop("dataset_id")
    text = canonical_json({**content, "dataset_id": fingerprint(content)})
    (folder / "manifest.json").write_text(text)
    (folder / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_manifest_is_checked(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    outside = [{**shards[0], "file": "../shard-00000-aaaaaaaa.arrow"}, *shards[1:]]
    rewrite_manifest(folder, {"shards": outside})
    with pytest.raises(ValueError, match="same folder"):
        read_manifest(folder)
    rewrite_manifest(folder, {"shards": [*shards, shards[0]]})
    with pytest.raises(ValueError, match="more than once"):
        read_manifest(folder)
    rewrite_manifest(folder, {"shards": []})
    with pytest.raises(ValueError, match="no shards"):
        read_manifest(folder)
    rewrite_manifest(folder, {"shards": shards, "format_version": 99})
    with pytest.raises(ValueError, match="format_version 99"):
        read_manifest(folder)
    rewrite_manifest(folder, {"format_version": 1})
    read_manifest(folder)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"rows":80', '"rows":81'))
    with pytest.raises(ValueError, match="changed after it was written"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(ValueError, match="prepare the data first"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_every_flipped_byte_of_a_manifest_is_detected(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "t", lengths=[3, 4], target_bytes=10**9)
    path = tmp_path / "t" / name
    content = path.read_bytes()
    # The line's end behind the hash means nothing.
    for place in range(len(content.rstrip())):
        changed = bytearray(content)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="was changed after it was written"):
            read_manifest(tmp_path / "t")


def test_full_verify(folder: Path) -> None:
    largest = read_manifest(folder).max_token_id
    assert verify(folder, vocab_size=largest + 1).rows == len(LENGTHS)
    rows = [r for r, n in enumerate(LENGTHS) if largest in feature(r, length=n)["input_ids"]]
    place = rf"shard-\d+-\w+\.arrow, row {rows[0]} of .* the vocabulary has {largest} entries"
    with pytest.raises(ValueError, match=place):
        verify(folder, vocab_size=largest)


def test_writer_refuses_bad_features(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, schema=shard_schema(TASK_SCHEMA))
    good = feature(0, length=3)
    cases = [
        ({**good, "extra": 1}, "extra"),
        ({k: v for k, v in good.items() if k != "score"}, "score"),
        ({**good, "score": None}, "'score' has a null"),
        ({**good, "labels": [1, None, 2]}, "'labels' has a null"),
        ({**good, "labels": ["a", "b", "c"]}, "'labels' is not list"),
        ({**good, "loss_count": 2**40}, "'loss_count' is not int32"),
        ({**good, "loss_count": -1}, "loss_count"),
        ({**good, "length": 4}, "length"),
        ({**good, "input_ids": [], "length": 0}, "no tokens"),
        ({**good, "input_ids": [1, -2, 3]}, "negative token id"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            writer.add([good, bad])
    assert writer.close() == ()


def test_schema_refuses_clashes_and_unknown_types() -> None:
    with pytest.raises(ValueError, match="'length' is already"):
        shard_schema(pa.schema([pa.field("length", pa.int64())]))
    with pytest.raises(ValueError, match="'flag' has type bool"):
        shard_schema(pa.schema([pa.field("flag", pa.bool_())]))
    with pytest.raises(ValueError, match="'nested' has type list<item: list"):
        shard_schema(pa.schema([pa.field("nested", pa.list_(pa.list_(pa.int32())))]))


def open_files() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/fd").iterdir()]


def test_shards_are_closed_with_their_data_set(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "t", lengths=[5] * 70, target_bytes=1)
    shards = len(dataset.manifest.shards)
    before = len(open_files())
    del dataset
    assert len(open_files()) == before - shards


def test_more_shards_than_the_limit_of_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "t", lengths=[5] * 70, target_bytes=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Room for five of the ten shards; a limit is a number that no new file may reach.
    used = set(open_files())
    few = ([number for number in range(len(used) + 6) if number not in used][5], hard)
    raised = resource.setrlimit
    try:
        raised(resource.RLIMIT_NOFILE, few)
        assert len(ShardedDataset(tmp_path / "t", verify="size")) == 70
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        raised(resource.RLIMIT_NOFILE, few)
        monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
        with pytest.raises(ValueError, match=r"can't be opened .* raise the limit of open files"):
            ShardedDataset(tmp_path / "t", verify="size")
    finally:
        raised(resource.RLIMIT_NOFILE, (soft, hard))


def test_rows_out_of_range(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "t", lengths=[3, 4])
    for row in (-1, 2):
        with pytest.raises(ValueError, match=r"rows must lie in \[0, 2\)"):
            dataset.take(np.array([row]))
