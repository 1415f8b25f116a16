"""Random samples through random transforms: labels, places and determinism."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.augment import (
    KINDS,
    augmenters,
    fields_of,
    fuzz,
    make_cases,
    transforms,
    violation,
)
from dist_ft.data.augment.augmenter import Augmenter
from dist_ft.data.augment.draws import Draws
from dist_ft.data.augment.pieces import Line, split_text

CASES = 200_000


@pytest.mark.slow
def test_fuzzed_samples_are_right() -> None:
    violations, statistics = fuzz(CASES, seed=20_24)
    assert violations == []
    assert sum(counts.samples for counts in statistics.values()) == CASES
    # A fuzz test in which nothing happens would pass, too.
    for kind, counts in statistics.items():
        assert counts.samples >= CASES // 3
        assert counts.changed > 0.6 * counts.samples
        assert set(counts.edits) == {t.name for t in transforms(kind)}
        assert min(counts.samples_by_transform.values()) > 1000
    assert statistics["tagged"].skipped["invalid_bio"] > 500
    assert statistics["context"].skipped["answer_not_at_its_place"] > 500


class Careless:
    """Ignores what is fixed and joined."""

    name = "careless"
    chance = 1.0

    def apply(self, line: Line, draws: Draws) -> int:
        place = draws.below(len(line.pieces))
        line.pieces = line.pieces[place:] + line.pieces[:place]
        return int(place > 0)


class Greedy(Careless):
    name = "greedy"

    def apply(self, line: Line, draws: Draws) -> int:
        place = draws.below(len(line.pieces))
        line.pieces[place] = line.pieces[place].renamed("qqq")
        return 1


@pytest.mark.parametrize("careless", [Careless(), Greedy()])
@pytest.mark.parametrize("kind", ["tagged", "context"])
def test_the_checks_see_careless_transforms(kind: str, careless: Careless) -> None:
    augmenter = Augmenter([careless], fields=fields_of(kind))
    seen = 0
    for row, sample in enumerate(make_cases(kind, 300, seed=1)):
        try:
            after, changes = augmenter.apply(sample, seed=0, epoch=0, row=row)
        except AssertionError:
            seen += 1
        else:
            seen += violation(kind, sample, after, changes=changes) is not None
    assert seen > 10


def digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_samples_do_not_depend_on_who_reads_them(kind: str, world_size: int) -> None:
    samples = list(make_cases(kind, 400, seed=5))
    expected = [
        augmenters(kind)[0].apply(sample, seed=3, epoch=2, row=row)[0]
        for row, sample in enumerate(samples)
    ]
    found: dict[int, Any] = {}
    for rank in reversed(range(world_size)):
        # Another process: its own objects, other rows in another order.
        augmenter = augmenters(kind)[0]
        for row in reversed(range(rank, 400, world_size)):
            found[row] = augmenter.apply(samples[row], seed=3, epoch=2, row=row)[0]
    assert digest(found[row] for row in range(400)) == digest(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_epoch_and_row_change_the_sample(kind: str) -> None:
    augmenter = augmenters(kind)[0]
    samples = list(make_cases(kind, 60, seed=6))

    def run(**change: int) -> str:
        key = {"seed": 0, "epoch": 0, "row": 0} | change
        return digest(augmenter.apply(sample, **key)[0] for sample in samples)

    assert len({run(), run(seed=1), run(epoch=1), run(row=1)}) == 4
    assert run() == run()


TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from(" .!?'\u3002\u4e2d\u0301\n")
    )
)


@given(TEXT)
def test_pieces_are_the_text(text: str) -> None:
    pieces = split_text(text)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.origin for piece in pieces] == list(range(len(pieces)))
    assert all(piece.text for piece in pieces)
    for piece in pieces:
        assert (piece.kind == "space") == piece.text.isspace()


@settings(max_examples=300, deadline=None)
@given(
    context=TEXT.filter(str.strip),
    data=st.data(),
    number=st.integers(0, 8),
    row=st.integers(0, 1000),
)
def test_answers_stay_at_their_place_in_any_text(
    context: str, data: st.DataObject, number: int, row: int
) -> None:
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(context) - 1))
        end = data.draw(st.integers(start + 1, len(context)))
        answers["text"].append(context[start:end])
        answers["answer_start"].append(start)
    sample = {"question": "why ?", "context": context, "answers": answers, "id": 1}
    augmenter = augmenters("context")[number]
    after, changes = augmenter.apply(sample, seed=0, epoch=0, row=row)
    assert violation("context", sample, after, changes=changes) is None
    assert changes.skipped is None


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(
        st.tuples(st.text(min_size=1), st.sampled_from(["O", "O", "B-PER", "I-PER", "B-LOC"])),
        min_size=1,
        max_size=12,
    ),
    number=st.integers(0, 8),
    row=st.integers(0, 1000),
)
def test_labels_stay_bio_with_any_words(
    words: list[tuple[str, str]], number: int, row: int
) -> None:
    tokens, tags = map(list, zip(*words, strict=True))
    sample = {"tokens": tokens, "tags": tags}
    augmenter = augmenters("tagged")[number]
    after, changes = augmenter.apply(sample, seed=0, epoch=0, row=row)
    assert violation("tagged", sample, after, changes=changes) is None
