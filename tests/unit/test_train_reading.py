"""How far reading has come: a bar on a terminal, lines elsewhere, estimates that are near."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from rich.console import Console as RichConsole

from dist_ft.data.sources import SourceSpec, open_source
from dist_ft.model.backbone import load_tokenizer
from dist_ft.recipe import load_recipe
from dist_ft.train import reading
from dist_ft.train.data import prepare_tasks
from dist_ft.train.parts import model_source
from dist_ft.train.reading import ReadingProgress
from tests.helpers.tiny_run import write_recipe


def test_lines_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(reading.time, "monotonic", lambda: now[0])
    said: list[str] = []
    with ReadingProgress("text/train", expected=lambda: 5000, say=said.append) as progress:
        for read in range(0, 3000, 100):
            progress(read)
            now[0] += 1.0
    assert said == [
        "text/train: 1,000 rows read, 100 rows/s, about 40 s left",
        "text/train: 2,000 rows read, 100 rows/s, about 30 s left",
    ]
    said.clear()
    with ReadingProgress("text/train", expected=lambda: None, say=said.append) as progress:
        for _ in progress.each(range(2500)):
            now[0] += 0.0051
    assert said == ["text/train: 2,000 rows read, 196 rows/s"]


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    terminal = RichConsole(file=screen, force_terminal=True, width=100)
    said: list[str] = []
    with ReadingProgress(
        "text/train", expected=lambda: 4, say=said.append, terminal=terminal
    ) as progress:
        progress(2)
        progress(8)  # more than was expected
    assert said == []
    assert "text/train" in screen.getvalue()
    assert "8 rows" in screen.getvalue()
    assert "rows/s" in screen.getvalue()


def test_estimates_are_near(tmp_path: Path) -> None:
    rows = [{"text": "word " * (1 + n % 50)} for n in range(20_000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = {
        name: open_source(SourceSpec(name), base_dir=tmp_path).estimate()
        for name in ("a.jsonl", "a.parquet", "a.json")
    }
    assert found["a.jsonl"] == pytest.approx(20_000, rel=0.01)
    assert found["a.parquet"] == 20_000
    assert found["a.json"] is None


def test_preparing_tells_what_it_reads(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    names: list[str] = []
    calls: list[int] = []

    class Noted(ReadingProgress):
        def __call__(self, read: int) -> None:
            calls.append(read)
            super().__call__(read)

    def noted(name: str, expected: reading.Callable[[], int | None]) -> ReadingProgress:
        assert expected() == 60
        names.append(name)
        return Noted(name, expected=expected, say=lambda _: None)

    tokenizer = load_tokenizer(model_source(recipe.model))
    prepare_tasks(recipe, tokenizer=tokenizer, say=lambda _: None, reading=noted)
    assert names[:3] == ["text, labels", "text/train", "text/validation"]
    assert calls[:3] == [0, 60, 60]


def test_a_row_whose_label_is_none_is_left_out_of_the_labels_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_recipe(tmp_path)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write(json.dumps({"text": "no label", "label": 1.5}) + "\n")
    body = yaml.safe_load(path.read_text())
    body["tasks"][0] |= {"on_error": "skip", "data": {"train": "texts.jsonl"}}
    body["tasks"] = body["tasks"][:1]
    path.write_text(yaml.safe_dump(body))
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(model_source(recipe.model))
    [prepared] = prepare_tasks(recipe, tokenizer=tokenizer, say=lambda _: None)
    assert prepared.state == {"labels": ["no", "yes"]}
    assert "left out 1 row: a label must be text" in caplog.text
    assert "line 61" in caplog.text
