"""What shows a run: report, watch and trackers, all from one tiny run that was interrupted."""

import base64
import dataclasses
import functools
import html
import html.parser
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

from dist_ft import cli
from dist_ft.launcher import supervisor
from dist_ft.recipe import load_recipe
from dist_ft.report import write_report
from dist_ft.report.page import report_folder
from dist_ft.report.raster import png_of
from dist_ft.report.record import read_run
from dist_ft.report.svg import Axes, Line, line_plot, ticks
from dist_ft.train import ending, finished, trackers
from dist_ft.train.recorder import Recorder
from dist_ft.train.trackers import make_trackers, numbers
from dist_ft.watch import Follower, dashboard, sparkline, watch
from tests.helpers.tiny_run import events, train, write_recipe

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was stopped, went on on two ranks and was evaluated."""
    folder = tmp_path_factory.mktemp("after")
    recipe = write_recipe(folder, logging={"every": 2, "groups_every": 4})
    train(recipe, stop_at=6, exit_code=ending.PREEMPTED)
    train(recipe, resume=True)
    finished.evaluate(folder / "runs" / "tiny")
    finished.analyse(folder / "runs" / "tiny")
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_report([run])


def test_a_run_is_not_used_with_another_tokenizer(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run.parents[1] / "model/tokenizer.json"
    before = file.read_text()
    content = json.loads(before)
    words = content["model"]["vocab"]
    words["ada"], words["love"] = words["love"], words["ada"]
    file.write_text(json.dumps(content))
    try:
        for command in ("export", "evaluate"):
            assert cli.main([command, str(run)]) == 2
            error = capsys.readouterr().err
            assert "is not the one that" in error
            assert "content_sha256" in error
    finally:
        file.write_text(before)


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run with its own model, raw files and shards, which may be spoilt."""
    root = tmp_path / "copy"
    shutil.copytree(run.parents[1], root, ignore=shutil.ignore_patterns("export", "report"))
    for file in (root / "recipe.yaml", root / "runs/tiny/recipe.json"):
        file.write_text(file.read_text().replace(str(run.parents[1]), str(root)))
    return root / "runs/tiny"


def _rename_label(run: Path) -> None:
    """Give the label "yes" another name, which also sorts before "no"."""
    file = run.parents[1] / "texts.jsonl"
    file.write_text(file.read_text().replace('"label": "yes"', '"label": "aye"'))


def _exported_labels(run: Path) -> dict[str, str]:
    assert cli.main(["export", str(run), "--task", "text"]) == 0
    found = json.loads((run / "export/text/config.json").read_text())["id2label"]
    shutil.rmtree(run / "export")
    return found


def test_the_labels_are_those_of_the_run_whatever_its_data_have_become(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {"0": "no", "1": "yes"}
    _rename_label(copied)
    assert _exported_labels(copied) == labels
    # A run of an older version does not say them; the shards that it was trained on do.
    (copied / "data.json").rename(copied / "kept")
    assert _exported_labels(copied) == labels
    shutil.rmtree(copied.parents[1] / "data")
    capsys.readouterr()
    assert cli.main(["export", str(copied), "--task", "text"]) == 2
    assert "does not say which labels task text has" in capsys.readouterr().err
    # Neither shards nor raw files: the folder is enough.
    (copied / "kept").rename(copied / "data.json")
    for file in copied.parents[1].glob("*.jsonl"):
        file.unlink()
    assert _exported_labels(copied) == labels


def test_a_run_is_scored_on_its_own_data_or_not_at_all(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied.parents[1]
    expected = {
        e["task"]: e["metrics"] for e in read_run(copied).latest() if e["split"] == "validation"
    }
    texts = (root / "texts.jsonl").read_text()
    _rename_label(copied)
    (root / "tagged.jsonl").rename(root / "elsewhere.jsonl")
    kept = copied / "data.json"
    for has_record in (True, False):
        if not has_record:
            kept.rename(copied / "kept")
        scores = finished.evaluate(copied)
        assert {task: body["validation"] for task, body in scores.items()} == expected
    (copied / "kept").rename(kept)
    # A new run on the edited file took the place of the shards.
    (root / "elsewhere.jsonl").rename(root / "tagged.jsonl")
    assert cli.main(["prepare", str(root / "recipe.yaml")]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(copied)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"{copied} was trained on other data" in error
    assert f"tasks.text.data.train = {root}/texts.jsonl (texts.jsonl was " in error
    assert "put back what it was trained on" in error
    (root / "texts.jsonl").write_text(texts)
    scores = finished.evaluate(copied)  # prepared again, as it was
    assert {task: body["validation"] for task, body in scores.items()} == expected
    shutil.rmtree(root / "data")
    (root / "texts.jsonl").unlink()
    assert cli.main(["evaluate", str(copied)]) == 2
    assert "texts.jsonl' matches no file: give" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_data_only(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied.parents[1]
    _rename_label(copied)
    before = (copied / "data.json").read_text()
    shards = (root / "data/text/train/manifest.json").read_text()
    for other in ([], [f"data_dir={root}/other"]):
        again = ["train", str(root / "recipe.yaml"), "--resume", *other]
        assert cli.main(again) == 2
        error = capsys.readouterr().err
        assert f"{copied} was trained on other data" in error
        assert f"tasks.text.data.train = {root}/texts.jsonl (texts.jsonl was " in error
        assert "labels (were no, yes; are aye, no)" in error
        assert (copied / "data.json").read_text() == before
        assert (root / "data/text/train/manifest.json").read_text() == shards
    (copied / "data.json").unlink()
    assert cli.main(again) == 2
    assert "was trained on other data of task text (dataset_id" in capsys.readouterr().err
    assert not (copied / "data.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nproc", "3"], "train.global_batch_size: 8 rows in micro-batches of 4 make 2 micro-"),
        (["--nproc", "2"], "holds a run already: go on with it by --resume"),
        (["--nproc", "2", "--resume", "seed=9"], "started with another recipe; what differs: seed"),
    ],
)
def test_the_launcher_says_once_what_all_ranks_would_find(
    words: list[str], expected: str, run: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(supervisor.Supervisor, "run", lambda _: pytest.fail("ranks are started"))
    recipe = str(run.parents[1] / "recipe.yaml")
    assert cli.main(["launch", *words[:2], "train", recipe, *words[2:]]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert expected in said[0]


class _Reader(html.parser.HTMLParser):
    """Checks that tags are closed in order, and remembers what there is."""

    void = frozenset({"meta", "link", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.links: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_the_record_says_what_the_report_needs(run: Path) -> None:
    found = events(run)
    start = next(e for e in found if e["event"] == "start")
    assert start["total_steps"] == 24
    assert start["mixture_plan"]["tasks"]["text"][-1] == 8
    assert sum(start["layer_groups"].values()) > 10_000
    assert start["kernels"] == json.loads((run / "env.json").read_text())["kernels"]
    assert start["kernels"]["attention"] == "by_run"
    steps = read_run(run).steps()
    assert sum(e["task_steps"] for e in steps) == 24
    assert sum(e["task_tokens"] for e in steps) == max(e["tokens"] for e in steps)
    assert all(e["task_tokens"] <= e["task_positions"] for e in steps)
    scored = [e for e in found if "intervals" in e]
    assert {e["task"] for e in scored} == {"text", "tags", "spans"}
    for event in scored:
        for name, (low, high) in event["intervals"].items():
            assert low <= high, name
            assert 0 <= event["metrics"][name] <= event["rows"]


def test_the_page_is_whole_and_needs_nothing_else(run: Path, page: Path) -> None:
    text = page.read_text()
    reader = _Reader()
    reader.feed(text)
    assert reader.stack == []
    # Every plot is in the page; the links are to copies of them and to nothing outside.
    files = sorted(p.name for p in (run / "report" / "plots").glob("*.svg"))
    assert reader.counts["svg"] == len(files)
    assert all(link.startswith(("plots/", "data:")) for link in reader.links)
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    for part in ("Faults and restarts", "from step-0000", "95 % interval", "f1 (decides)"):
        assert part in text
    for name in ("loss", "freeze-timeline", "freeze-gradient-norm", "freeze-drift", "throughput",
                 "memory", "phase-memory", "mixture", "padding", "scores-spans"):  # fmt: skip
        assert f"{name}.svg" in files


def test_every_plot_has_labels_and_units(run: Path) -> None:
    for file in (run / "report" / "plots").glob("*.svg"):
        root = ET.fromstring(file.read_text())
        assert root.attrib["aria-label"], file
        words = " ".join(t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text"))
        assert re.search(r"optimizer step|phase|mean confidence", words), file
        unit = r"GiB|MiB|tokens/s|share|0 to 1|per label|rate|L2|frozen"
        assert re.search(unit, words), (file, words)
        box = [float(v) for v in root.attrib["viewBox"].split()]
        for place in root.iter("{http://www.w3.org/2000/svg}circle"):
            assert 0 <= float(place.attrib["cx"]) <= box[2]
            assert 0 <= float(place.attrib["cy"]) <= box[3]


def test_every_plot_comes_as_a_picture_too(run: Path, page: Path) -> None:
    pytest.importorskip("resvg_py", reason="the extra [report] is not installed")
    drawn = list((run / "report" / "plots").glob("*.svg"))
    for file in drawn:
        picture = file.with_suffix(".png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        width, height = (int.from_bytes(picture[i : i + 4]) for i in (16, 20))
        box = [float(v) for v in ET.fromstring(file.read_text()).attrib["viewBox"].split()]
        assert (width, height) == (2 * box[2], 2 * box[3])
        assert f"plots/{file.stem}.png" in page.read_text()


def test_no_two_lines_of_a_plot_look_alike() -> None:
    looks = [Line("", []).look(place) for place in range(18)]
    assert len(set(looks)) == 18
    # A target is the thin line in the colour and the dashes of what was drawn.
    (drawn, dashes), thin = Line("", [], color=2).look(0), Line("", [], color=2, thin=True).look(7)
    assert thin == (f"{drawn} thin", dashes)


def test_the_page_begins_with_the_scores_that_decide(page: Path) -> None:
    text = page.read_text()
    first = text[text.index("<h3>Scores") : text.index("All metrics")]
    cells = re.findall(r"<td(?: class='n')?>(.*?)</td>", first)
    assert {"spans", "validation", "f1"} <= set(cells)
    assert len(re.findall("<tr>", first)) == 1 + 3  # a row for each task
    assert "<th scope='col'>baseline</th>" in first


def test_pictures_have_text_on_machines_without_fonts() -> None:
    pytest.importorskip("resvg_py", reason="the extra [report] is not installed")
    lines = [Line("a", [(0, 1.0), (1, 2.0)])]
    sizes = [
        len(png_of(plot))
        for label in ("", "a long label that is drawn")
        if (plot := line_plot("x", "t", lines, Axes(label, "")))
    ]
    assert sizes[1] > sizes[0] + 1000


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other<b>"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints", "report", "logs"))
    recipe = json.loads((other / "recipe.json").read_text())
    recipe["optim"]["lr"] = 0.5
    (other / "recipe.json").write_text(json.dumps(recipe))
    page = write_report([other, run])
    folder = page.parent
    assert folder == other / f"report-{run.name}"  # that of the one run alone stays what it is
    text = page.read_text()
    reader = _Reader()
    reader.feed(text)
    assert text.index("What differs") < text.index("Scores side by side")
    assert "<td>optim.lr</td><td class='n'>0.5</td><td class='n'>0.001</td>" in text
    assert "<b>" not in text
    assert "compare-loss-text.svg" in {p.name for p in (folder / "plots").iterdir()}
    for link in reader.links:
        assert link.startswith("data:") or (folder / link).is_file(), link


def test_as_many_runs_are_compared_as_a_pattern_of_the_shell_finds(tmp_path: Path) -> None:
    runs = [tmp_path / f"sweep-{number}" for number in range(300)]
    found = [report_folder(these) for these in (runs[:1], runs[:3], runs, runs[:-1])]
    assert found[0] == runs[0] / "report"
    assert found[1] == runs[0] / "report-sweep-1-sweep-2"
    assert len(set(found)) == len(found)
    for folder in found:  # a name may have 255 bytes
        folder.mkdir(parents=True)


@pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_page_without_complaint(width: int, page: Path, tmp_path: Path) -> None:
    # In a frame: the windows of newer browsers are 500 pixels wide at least.
    probe = (
        "<script>onload=()=>{const d=document.querySelector('iframe').contentDocument;"
        "document.title='W'+d.documentElement.scrollWidth+' '+"
        "[...d.querySelectorAll('svg')].filter(s=>s.getBoundingClientRect().height<80).length+' '+"
        "d.defaultView.getComputedStyle(d.body).backgroundColor}</script>"
    )
    frame = f"<iframe width={width} height=1900 frameborder=0 srcdoc='{{}}'></iframe>"
    copy = tmp_path / "framed.html"
    copy.write_text("<!doctype html>" + frame.format(html.escape(page.read_text())) + probe)
    done = subprocess.run(
        [str(BROWSER), "--no-sandbox", "--disable-gpu", "--headless", "--enable-logging=stderr",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width + 40},2000", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom",
         copy.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>W(\d+) (\d+) (.*)</title>", done.stdout)
    assert title is not None, done.stderr
    assert int(title[1]) <= width  # nothing sticks out to the side
    assert title[2] == "0"  # no plot has collapsed
    assert title[3] == "rgb(255, 255, 255)"


def test_watch_tells_of_faults_and_of_silence(tmp_path: Path) -> None:
    kept = {"step": 3, "time_s": 1.0}
    found = [
        {"event": "start", "total_steps": 9, **kept},
        {"event": "straggler", "rank": 1, "host": "node7", **kept},
    ]

    def shown(silent_s: float = 0.0) -> str:
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(dashboard("r", found, silent_s=silent_s))
        return console.export_text()

    assert "straggler  rank 1, host node7" in shown()
    assert "no event for" not in shown(silent_s=60.0)
    assert "no event for 10 min 00 s: is it alive?" in shown(silent_s=600.0)
    found.append({"event": "end", **kept})
    assert "no event for" not in shown(silent_s=600.0)
    path = tmp_path / "metrics.jsonl"
    assert Follower(path).silent_s() == 0.0
    path.touch()
    os.utime(path, (time.time() - 500, time.time() - 500))
    assert 499 < Follower(path).silent_s() < 600


def test_report_and_watch_say_alike_how_a_run_ended(copied: Path) -> None:
    found = events(copied)
    scored = next(e for e in found if e["event"] == "eval" and "intervals" in e)
    place = next(i for i, e in enumerate(found) if e["event"] == "stop")
    resumed = next(e for e in found if e["event"] == "resume")
    stopped = ("stopped by SIGTERM, can be resumed", "stopped, can be resumed")
    running = ("not ended: still running, or killed", "training")
    for record, expected in (
        (found[:place], running),
        (found[: place + 1], stopped),
        # Scores of a finished or stopped run are added to its record, and do not start it.
        ([*found[: place + 1], {**scored, "step": found[place]["step"]}], stopped),
        ([*found[: place + 1], resumed], running),
        (found, ("finished", "finished")),
    ):
        lines = "".join(json.dumps(event) + "\n" for event in record)
        (copied / "metrics.jsonl").write_text(lines)
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(dashboard("r", Follower(copied / "metrics.jsonl").refresh()))
        shown = console.export_text().splitlines()[0]
        assert (read_run(copied).outcome, expected[1] in shown) == (expected[0], True), shown


def test_watch_tells_what_went_wrong_though_a_resume_undid_its_step(tmp_path: Path) -> None:
    record = [
        {"event": "start", "step": 0, "time_s": 0.0, "total_steps": 9},
        {"event": "failure", "step": 7, "time_s": 1.0, "rank": 1, "reason": "was killed"},
        {"event": "resume", "step": 5, "time_s": 2.0, "path": "step-00000005"},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in record))
    follower = Follower(path)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(dashboard("r", follower.refresh(), everything=follower.events))
    shown = console.export_text()
    assert "failure" in shown
    assert "was killed" in shown


def test_watch_shows_a_run_and_follows_it(run: Path, tmp_path: Path, capsys: Any) -> None:
    watch(run, once=True)
    shown = capsys.readouterr().out
    for part in ("tiny", "finished", "24 of 24 steps", "spans", "tokens/s", "■■■■"):
        assert part in shown
    assert cli.main(["watch", str(tmp_path)]) == 2
    lines = (run / "metrics.jsonl").read_bytes()
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.refresh() == []
    # Whatever arrives, in whatever pieces, in the end all of it was read once.
    for cut in (1, len(lines) // 3, len(lines) // 2, len(lines)):
        path.write_bytes(lines[:cut])
        found = follower.refresh()
    assert found == read_run(run).events


def test_names_are_the_same_in_every_tracker(run: Path) -> None:
    found = {name for event in events(run) for name in numbers(event)}
    assert {"train/text/loss", "train/lr", "validation/spans/f1", "groups/drift/block.0",
            "phase/trainable_params", "checkpoint/bytes", "start/total_steps"} <= found  # fmt: skip
    step = next(e for e in events(run) if e["event"] == "step")
    assert "train/tokens_per_s" in numbers(step)
    assert all(isinstance(v, float) for v in numbers(step).values())


def test_a_tracker_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = [n for n in ("wandb", "mlflow", "trackio") if importlib.util.find_spec(n) is None]
    for name in missing:
        with pytest.raises(RuntimeError, match=rf"{name} is not installed: pip install"):
            make_trackers([name], folder=tmp_path, name="x", recipe={})
    path = write_recipe(tmp_path)
    with pytest.raises(ValueError, match=r"logging\.trackers"):
        load_recipe(path, overrides=["logging.trackers=[tensorbord]"])


def test_a_tracker_whose_server_is_away_keeps_no_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "TensorBoard", Mock(side_effect=OSError("no server")))
    make = functools.partial(
        make_trackers, ["tensorboard"], folder=tmp_path, name="tiny", recipe={}
    )
    with pytest.raises(OSError, match="no server"):
        make()
    assert make(goes_on=True) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_takes_a_whole_run(name: str, run: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the extra [{name}] is not installed")
    made = make_trackers([name], folder=tmp_path, name="tiny", recipe={"model": {"path": "m"}})
    recorder = Recorder(tmp_path / "metrics.jsonl", trackers=made)
    for event in read_run(run).events:
        fields = {k: v for k, v in event.items() if k not in ("event", "step", "time_s")}
        recorder.event(event["event"], step=event["step"], **fields)
    recorder.close()
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "metrics.jsonl"]
    assert sum(p.stat().st_size for p in written) > 1000
    if name == "tensorboard":
        reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        board = reader.EventAccumulator(str(tmp_path / "tensorboard"))
        board.Reload()
        drawn = [(s.step, s.value) for s in board.Scalars("train/text/loss")]
        expected = read_run(run).series("loss", task="text")
        assert [s for s, _ in drawn] == [s for s, _ in expected]
        assert [v for _, v in drawn] == pytest.approx([v for _, v in expected])


def test_plots_survive_odd_values() -> None:
    flat = line_plot("a", "flat", [Line("x<y", [(0, 2.0), (5, 2.0)])], Axes("step", "unit"))
    assert flat is not None
    ET.fromstring(flat.standalone())
    assert line_plot("a", "none", [Line("x", [])], Axes("step", "unit")) is None
    one = line_plot("a", "one", [Line("x", [(3, 0.0)])], Axes("step", "unit", log=True))
    assert one is not None
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert sparkline([1, 1, 1]) == "▁▁▁"
    assert sparkline([0.0, 1.0]) == "▁█"
    assert dataclasses.replace(one, slug="b").body == one.body


def test_the_analysis_says_what_the_run_did(run: Path, page: Path) -> None:
    body = json.loads((run / "analysis.json").read_text())
    tasks = body["tasks"]
    assert set(tasks) == {"text", "tags", "spans"}
    assert all(0 <= t["calibration"]["ece"] <= 1 for t in tasks.values())
    groups = {row["group"]: row for row in body["groups"]}
    # The schedule froze the embeddings and the lower blocks to the end or for a while.
    last = [e for e in events(run) if e["event"] == "phase"][-1]["trainable_groups"]
    for name, row in groups.items():
        assert (row["drift"] > 0) == (name in last), name
    assert all(0 < row["cka"] <= 1 + 1e-9 for row in groups.values() if "cka" in row)
    text = tasks["text"]
    [scores] = [e for e in read_run(run).latest() if e["task"] == "text"]
    matrix = text["confusion"]
    assert sum(map(sum, matrix)) == scores["rows"]
    right = sum(matrix[i][i] for i in range(len(matrix)))
    assert right / scores["rows"] == pytest.approx(scores["metrics"]["accuracy"])
    assert text["hardest"] == sorted(text["hardest"], key=lambda row: -row["loss"])
    found = text["attributions"]
    # What the words add is what tells the row from the one without them (completeness).
    added = found["probability"] - found["baseline_probability"]
    assert sum(found["values"]) == pytest.approx(added, abs=0.02)
    _forgetting_is_that_of_the_log(run, tasks)
    _noise_is_measured(run, tasks)
    html_text = page.read_text()
    assert "Most forgotten rows of text" in html_text
    assert "spans under noise" in html_text
    assert "Reliability of text" in html_text
    assert "CKA to the start" in html_text
    assert "Integrated gradients" in html_text


def _forgetting_is_that_of_the_log(run: Path, tasks: dict[str, Any]) -> None:
    """The bits in the log are the rows that the scores of the same event count."""
    assert tasks["spans"]["forgotten"] == {}  # an answer is more or less right
    for name, metric in (("text", "accuracy"), ("tags", None)):
        seen = [e for e in read_run(run).of("eval") if e["task"] == name and "correct" in e]
        assert [e["step"] for e in seen] == [12, 24]
        right = [
            np.unpackbits(np.frombuffer(base64.b64decode(e["correct"]), np.uint8))[: e["rows"]]
            for e in seen
        ]
        for event, rows in zip(seen, right, strict=True):
            if metric is not None:
                assert rows.mean() == pytest.approx(event["metrics"][metric])
        lost = np.flatnonzero((right[0] == 1) & (right[1] == 0))
        found = tasks[name]["forgotten"]
        assert found["evaluations"] == 2
        assert [row["row"] for row in found["rows"]] == lost.tolist()[:10]
        assert found["events"] == len(lost)


def _noise_is_measured(run: Path, tasks: dict[str, Any]) -> None:
    scores = {e["task"]: e for e in read_run(run).latest() if e["split"] == "validation"}
    for name, body in tasks.items():
        found = body["robustness"]
        # The rows as they are, read from their source and encoded anew, are those of the shards.
        clean = scores[name]["metrics"][found["metric"]]
        assert found["clean"] == pytest.approx(clean, abs=1e-6)
        kinds = {one["transform"]: one for one in found["under"]}
        assert len(kinds) == 5
        assert kinds["casing"]["changed_rows"] > 0
        # The tokenizer does not know letter case.
        assert kinds["casing"]["difference"] == pytest.approx(0, abs=1e-6)
        for one in found["under"]:
            low, high = one["interval"]
            assert low - 1e-9 <= one["difference"] <= high + 1e-9 or low == high == 0


def test_runs_are_compared_on_the_same_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--against", str(run)]) == 0
    table = capsys.readouterr().out
    # Against itself no resample differs, however wide the interval of the metric alone.
    rows = [line for line in table.splitlines() if " to " in line]
    assert len(rows) > 10
    assert all(row.count("+0.0000") == 3 for row in rows)
    assert "accuracy" in table


def test_runs_on_other_rows_with_the_same_numbers_are_not_compared(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, eval_data = [0], finished.eval_data

    def other_source(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        for data in eval_data(*args, **kwargs):
            if made[0] == 2:
                source = {"validation": {"sha256": "of another file"}}
                data.dataset.manifest = dataclasses.replace(data.dataset.manifest, source=source)
            yield data

    monkeypatch.setattr(finished, "eval_data", other_source)
    with pytest.raises(ValueError, match="has other validation rows"):
        finished.compare(run, run)
