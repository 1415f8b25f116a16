"""What may change when a run or a search goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.recipe import load_recipe
from dist_ft.search.candidates import SearchFolder
from dist_ft.train import trunk_passes
from dist_ft.train.run_folder import RunFolder
from tests.helpers.tiny_run import write_recipe

GAIN = "mixture={policy: bandit, reward: gain, every: 8}"
PLATEAU = "freezing={policy: plateau, first: 1}"


@pytest.mark.parametrize("decided", [GAIN, PLATEAU])
def test_when_it_is_scored_stays_where_scores_decide_what_trains(
    decided: str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path)
    bandit = "mixture={policy: bandit, every: 8}"
    for kind, folder in ((RunFolder, tmp_path / "run"), (SearchFolder, tmp_path / "search")):
        for chosen in (bandit, decided):
            at = folder / str(chosen == decided)
            before, after = (
                load_recipe(path, overrides=[chosen, f"evaluation.every={n}step"]).model_dump(
                    mode="json"
                )
                for n in (12, 6)
            )
            kind(at).start(before, resume=False)
            if chosen == bandit:
                kind(at).start(after, resume=True)
                continue
            with pytest.raises(ValueError, match=r"evaluation\.every \(was '12step', is '6step'\)"):
                kind(at).start(after, resume=True)


def test_what_ranks_candidates_stays_as_a_search_goes_on(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    before = load_recipe(path).model_dump(mode="json")
    after = load_recipe(path, overrides=["evaluation.decide_by=worst"]).model_dump(mode="json")
    for kind in (RunFolder, SearchFolder):
        kind(tmp_path / kind.__name__).start(before, resume=False)
    RunFolder(tmp_path / "RunFolder").start(after, resume=True)
    with pytest.raises(ValueError, match=r"evaluation\.decide_by \(was 'each', is 'worst'\)"):
        SearchFolder(tmp_path / "SearchFolder").start(after, resume=True)


def test_a_file_that_says_the_same_already_is_not_written_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("data.json", {"a": 1})
    before = (tmp_path / "data.json").stat().st_ino
    folder.write_json("data.json", {"a": 1})
    assert (tmp_path / "data.json").stat().st_ino == before
    folder.write_json("data.json", {"a": 2})
    assert (tmp_path / "data.json").read_text() == '{\n "a": 2\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"cut', b"\xff\xff"])
def test_a_decision_that_power_took_away_is_made_again(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "cache.json"
    if content is not None:
        path.write_bytes(content)
    assert trunk_passes._decided(path) is None
    path.write_text('{"step": 3}')
    assert trunk_passes._decided(path) == {"step": 3}
