"""Augmented rows through the loader: the same for any world size, with right counts."""

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.augment import fields_of, make_cases, transforms
from dist_ft.data.augment.augmenter import Augmenter
from dist_ft.data.augment.noise import KeyboardTypos, PunctuationInsertion
from dist_ft.data.augment.words import WordDropout
from dist_ft.data.augmented import Augmentation, AugmentedReader
from dist_ft.data.collate import CollateSpec
from dist_ft.data.loader import BatchPlan, LengthPlan, MicroBatch, StepBatch, StepLoader
from dist_ft.data.prepare import PrepareSpec, RowFunctions, SplitPlan, prepare_split
from dist_ft.data.sampling import RoundRobin
from dist_ft.data.shards import ShardedDataset
from dist_ft.data.sources import SourceSpec

Row = dict[str, Any]
WINDOW = 12


def ids_of(text: str) -> list[int]:
    return [1 + ord(character) % 500 for character in text]


def encode_text(rows: list[Row]) -> list[Row]:
    return [
        {
            "input_ids": ids_of(row["text"]),
            "label": row["label"],
            "name": row["text"][:5],
            "loss_count": 1,
            "source_row": row["source_row"],
            "truncated_tokens": 0,
        }
        for row in rows
    ]


def encode_tagged(rows: list[Row]) -> list[Row]:
    return [
        {
            "input_ids": [len(token) for token in row["tokens"]],
            "labels": [ord(tag[0]) for tag in row["tags"]],
            "loss_count": len(row["tokens"]),
            "source_row": row["source_row"],
        }
        for row in rows
    ]


def encode_windows(rows: list[Row]) -> list[Row]:
    return [
        {
            "input_ids": ids_of(row["text"][start : start + WINDOW]),
            "label": start,
            "name": "x",
            "loss_count": 1,
            "source_row": row["source_row"],
        }
        for row in rows
        for start in range(0, len(row["text"]), WINDOW)
    ]


LABELLED = pa.schema([pa.field("label", pa.int32()), pa.field("name", pa.string())])
TAGGED = pa.schema([pa.field("labels", pa.list_(pa.int32()))])
SPECS = {
    "text": CollateSpec({"input_ids": 0}, scalar=("label",), targets=("label",), kept=("name",)),
    "tagged": CollateSpec({"input_ids": 0, "labels": -100}, targets=("labels",)),
    "windows": CollateSpec({"input_ids": 0}, scalar=("label",), targets=("label",)),
}
ENCODERS = {"text": encode_text, "tagged": encode_tagged, "windows": encode_windows}


def prepare(folder: Path, name: str, *, raw: bool = True) -> ShardedDataset:
    kind = "tagged" if name == "tagged" else "text"
    path = folder / f"{name}.jsonl"
    # Lone surrogates can't be written; the cases have none.
    path.write_text("".join(json.dumps(case) + "\n" for case in make_cases(kind, 60, seed=3)))
    required = ("tokens", "tags") if kind == "tagged" else ("text", "label")
    functions = RowFunctions(
        schema=TAGGED if kind == "tagged" else LABELLED,
        required_columns=required,
        split_key=str,
        dedupe_key=str,
        encode=ENCODERS[name],
    )
    plan = SplitPlan({"train": SourceSpec(path.name)}, base_dir=folder)
    spec = PrepareSpec(name, plan=plan, functions=functions, raw_columns=required if raw else ())
    prepared = prepare_split(spec, split="train", data_dir=folder / str(raw))
    return ShardedDataset(prepared.folder, verify="hash")


@pytest.fixture(scope="module")
def datasets() -> Iterator[dict[str, ShardedDataset]]:
    with tempfile.TemporaryDirectory() as folder:
        yield {name: prepare(Path(folder), name) for name in ENCODERS}


def augmentation(name: str) -> Augmentation:
    kind = "tagged" if name == "tagged" else "text"
    chosen = transforms(kind) if name != "windows" else [KeyboardTypos(share=0.5)]
    return Augmentation(Augmenter(chosen, fields=fields_of(kind)), ENCODERS[name])


def lists(column: Any) -> list[list[int]]:
    return [row.tolist() for row in column]


def make_loader(
    datasets: Mapping[str, ShardedDataset],
    *,
    rank: int = 0,
    world_size: int = 1,
    augmented: bool = True,
    layout: LengthPlan | None = None,
    micro: int = 3,
) -> StepLoader:
    return StepLoader(
        datasets,
        specs=SPECS,
        plan=BatchPlan(12, micro, 5, rank, world_size, layout),
        mixture=RoundRobin(len(datasets)),
        augmentation={name: augmentation(name) for name in datasets} if augmented else None,
    )


def content(micro: MicroBatch) -> tuple[Any, ...]:
    tensors = {**micro.inputs, **{f"target {k}": v for k, v in micro.targets.items()}}
    listed = {name: tensor.tolist() for name, tensor in tensors.items()}
    return micro.rows.tolist(), listed, micro.kept, micro.tokens


def loss_terms(batch: StepBatch) -> int:
    if batch.task != "tagged":
        return sum(len(m.rows) for m in batch.micro_batches if m.loss_weight)
    return sum(int((m.targets["labels"] != -100).sum()) for m in batch.micro_batches)


@settings(max_examples=25, deadline=None)
@given(
    step=st.integers(0, 300),
    world_size=st.integers(1, 9),
    layout=st.sampled_from([None, LengthPlan()]),
    micro=st.sampled_from([1, 3, 4]),
)
def test_augmented_steps_do_not_depend_on_world_size(
    datasets: dict[str, ShardedDataset],
    step: int,
    world_size: int,
    layout: LengthPlan | None,
    micro: int,
) -> None:
    one = make_loader(datasets, layout=layout, micro=micro).batch(step)
    ranks = [
        make_loader(datasets, rank=rank, world_size=world_size, layout=layout, micro=micro).batch(
            step
        )
        for rank in range(world_size)
    ]
    real = {m.index: content(m) for b in ranks for m in b.micro_batches if m.loss_weight}
    assert real == {m.index: content(m) for m in one.micro_batches}
    # The sum of the losses is divided by this number: it must count the augmented rows.
    assert {b.global_count for b in ranks} == {loss_terms(one)}
    assert {b.global_tokens for b in ranks} == {one.global_tokens}


def test_epochs_change_the_rows_and_repeats_do_not(datasets: dict[str, ShardedDataset]) -> None:
    reader = AugmentedReader(
        datasets["text"], augmentation=augmentation("text"), seed=1, task="text"
    )
    rows = np.arange(40)

    def read(epoch: int, **options: Any) -> list[list[int]]:
        found = (options.get("reader") or reader).read(rows, np.full(40, epoch))
        return lists(found.columns["input_ids"])

    assert read(0) == read(0)
    assert sum(a != b for a, b in zip(read(0), read(1), strict=True)) > 30
    other = AugmentedReader(
        datasets["text"], augmentation=augmentation("text"), seed=1, task="other"
    )
    assert read(0, reader=other) != read(0)
    # A row alone, in another order, twice, in two epochs at once: always the same.
    mixed = reader.read(np.array([7, 3, 7, 7]), np.array([1, 0, 0, 1]))
    expected = [read(1)[7], read(0)[3], read(0)[7], read(1)[7]]
    assert lists(mixed.columns["input_ids"]) == expected
    assert mixed.statistics.samples == 3
    assert np.asarray(mixed.columns["length"]).tolist() == [len(ids) for ids in expected]
    assert np.asarray(mixed.columns["source_row"]).tolist() == [7, 3, 7, 7]


def test_versions_of_rows_come_again(datasets: dict[str, ShardedDataset]) -> None:
    how = replace(augmentation("text"), variants=3)
    reader = AugmentedReader(datasets["text"], augmentation=how, seed=1, task="text")
    anew = AugmentedReader(datasets["text"], augmentation=augmentation("text"), seed=1, task="text")

    def read(epoch: int, *, reader: AugmentedReader = reader) -> list[list[int]]:
        found = reader.read(np.arange(40), np.full(40, epoch))
        return lists(found.columns["input_ids"])

    assert read(5) == read(2) == read(2, reader=anew)
    assert read(5) != read(5, reader=anew)
    assert read(2) != read(1)
    one = [after for _, _, after, _ in reader.compare(np.arange(3), epoch=4)]
    assert one == [after for _, _, after, _ in anew.compare(np.arange(3), epoch=1)]
    assert anew.variants_of(np.array([4])) is None

    loader = StepLoader(
        {"text": datasets["text"]},
        specs=SPECS,
        plan=BatchPlan(12, 3, 5),
        mixture=RoundRobin(1),
        augmentation={"text": how},
    )
    per_epoch = len(datasets["text"]) / 12
    for step in (0, int(4.5 * per_epoch), int(7.2 * per_epoch)):
        selected = loader.rows_of(step)
        epochs = dict(zip(selected.rows.tolist(), selected.epochs.tolist(), strict=True))
        for micro in loader.batch(step).micro_batches:
            assert micro.variants is not None
            assert micro.variants.tolist() == [epochs[row] % 3 for row in micro.rows.tolist()]
    state = loader.state_dict(1)
    assert loader.check_state(state) == 1
    with pytest.raises(ValueError, match="variants"):
        loader.check_state({**state, "augmentation": {"text": anew.describe()}})


def test_windows_of_a_row_belong_together(datasets: dict[str, ShardedDataset]) -> None:
    data = datasets["windows"]
    assert len(data) > 100
    rows = np.arange(len(data))
    reader = AugmentedReader(data, augmentation=augmentation("windows"), seed=1, task="w")
    found = reader.read(rows, np.zeros_like(rows))
    assert found.statistics.changed > 30
    whole: dict[int, list[int]] = {}
    for source, ids in zip(found.columns["source_row"], found.columns["input_ids"], strict=True):
        whole.setdefault(int(source), []).extend(np.asarray(ids).tolist())
    raw = data.take(rows, columns={"raw", "source_row"})
    for source, text in zip(raw["source_row"], raw["raw"], strict=True):
        sample = json.loads(str(text))
        expected, _ = augmentation("windows").augmenter.apply(
            sample, seed=reader._seed, epoch=0, row=int(source)
        )
        # Typing errors keep the length, so each window is that of the changed text.
        assert whole[int(source)] == ids_of(expected["text"])


def test_another_number_of_windows_leaves_the_row(datasets: dict[str, ShardedDataset]) -> None:
    data = datasets["windows"]
    longer = Augmentation(
        Augmenter([PunctuationInsertion()], fields=fields_of("text")), encode_windows
    )
    rows = np.arange(len(data))
    found = AugmentedReader(data, augmentation=longer, seed=1, task="w").read(rows, 0 * rows)
    stored = data.take(rows)
    refused = found.statistics.skipped["other_number_of_features"]
    assert 5 < refused < found.statistics.samples - 5
    same: dict[int, set[bool]] = {}
    for place, source in enumerate(np.asarray(stored["source_row"]).tolist()):
        equal = np.array_equal(
            found.columns["input_ids"][place],
            stored["input_ids"][place],
        )
        same.setdefault(source, set()).add(equal)
    # Of a row that was left alone, every window is as it was.
    assert sum(found == {True} for found in same.values()) >= refused


def test_loss_terms_follow_the_words(datasets: dict[str, ShardedDataset]) -> None:
    data = datasets["tagged"]
    dropping = Augmentation(
        Augmenter([WordDropout(share=0.5)], fields=fields_of("tagged")), encode_tagged
    )
    rows = np.arange(len(data))
    found = AugmentedReader(data, augmentation=dropping, seed=1, task="t").read(rows, 0 * rows)
    lengths = [len(ids) for ids in found.columns["input_ids"]]
    assert found.loss_counts.tolist() == lengths
    assert sum(lengths) < data.lengths.sum()


def test_one_loss_term_stays_one(datasets: dict[str, ShardedDataset]) -> None:
    def counting(rows: list[Row]) -> list[Row]:
        return [{**f, "loss_count": 1 + f["source_row"] % 2} for f in encode_text(rows)]

    wrong = replace(augmentation("text"), encode=counting)
    reader = AugmentedReader(datasets["text"], augmentation=wrong, seed=1, task="t")
    found = reader.read(np.arange(30), np.zeros(30, dtype=np.int64))
    assert found.loss_counts.tolist() == [1] * 30
    assert found.statistics.skipped["other_loss_count"] > 5


def test_resume_and_prefetch_are_exact(datasets: dict[str, ShardedDataset]) -> None:
    loader = make_loader(datasets)
    steps = loader.iterate(40)
    for step, batch in enumerate(itertools.islice(steps, 5), start=40):
        expected = make_loader(datasets).batch(step)
        assert [content(m) for m in batch.micro_batches] == [
            content(m) for m in expected.micro_batches
        ]
        assert batch.augmentation is not None
        assert batch.augmentation.samples > 0
    steps.close()


def test_state_says_how_rows_are_augmented(datasets: dict[str, ShardedDataset]) -> None:
    plain, augmented = make_loader(datasets, augmented=False), make_loader(datasets)
    assert "augmentation" not in plain.state_dict(3)
    assert plain.batch(0).augmentation is None
    state = json.loads(json.dumps(augmented.state_dict(3)))
    assert augmented.check_state(state) == 3
    with pytest.raises(ValueError, match=r"augmentation: .* -> \(absent\)"):
        plain.check_state(state)


def test_errors_name_the_rows(datasets: dict[str, ShardedDataset]) -> None:
    def failing(rows: list[Row]) -> list[Row]:
        raise ValueError(f"no way to encode {len(rows)} rows")

    loader = StepLoader(
        {"text": datasets["text"]},
        specs=SPECS,
        plan=BatchPlan(4, 2, seed=0),
        mixture=RoundRobin(1),
        augmentation={"text": replace(augmentation("text"), encode=failing)},
    )
    with pytest.raises(
        ValueError, match=r"task 'text', step 0: augmenting rows .*shard-00000-.* no way to encode"
    ):
        loader.batch(0)


def test_data_must_have_raw_rows(tmp_path: Path) -> None:
    data = prepare(tmp_path, "text", raw=False)
    with pytest.raises(ValueError, match=r"task 'text' is augmented.*prepared without raw rows"):
        make_loader({"text": data})
    with pytest.raises(ValueError, match=r"names the tasks \['other'\]"):
        StepLoader(
            {"text": data},
            specs=SPECS,
            plan=BatchPlan(4, 2, seed=0),
            mixture=RoundRobin(1),
            augmentation={"other": augmentation("text")},
        )


def test_fillers_are_as_prepared(datasets: dict[str, ShardedDataset]) -> None:
    batch = make_loader({"text": datasets["text"]}, micro=12, rank=1, world_size=2).batch(0)
    (filler,) = batch.micro_batches
    stored = datasets["text"].take(filler.rows)["input_ids"]
    assert filler.loss_weight == 0
    assert torch.equal(filler.inputs["input_ids"][0], torch.as_tensor(np.array(stored[0])).long())
    assert batch.augmentation is not None
    assert batch.augmentation.samples == 0
