"""`dist-ft kernels check`: what it finds on a CPU, and that it sees what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ft import cli
from dist_ft.kernels import checking
from dist_ft.kernels.cases import AttentionCase, DropoutCase, ScoringCase
from dist_ft.kernels.checking import check_kernels, paired_times
from dist_ft.kernels.ops import TABLE

CPU = torch.device("cpu")
HERE = {("attention", "by_run"), ("linear_cross_entropy", "chunked"), ("dropout", "by_byte")}


def test_a_cpu_run_says_what_is_right_and_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    assert cli.main(["kernels", "check", "--device", "cpu", "--no-time", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {r["op"] for r in rows} == set(TABLE)
    for row in rows:
        made = (row["op"], row["implementation"]) in HERE
        assert row["state"] == ("right" if made else "not measured"), row
        assert (row["error"] is not None) == made
        assert made or row["detail"].startswith("no GPU")
    printed = capsys.readouterr().out
    assert "not measured: anything on a GPU" in printed
    assert "flash_varlen" in printed


@pytest.mark.parametrize(
    ("case", "op"),
    [
        (ScoringCase, "linear_cross_entropy"),
        (AttentionCase, "attention"),
        (DropoutCase, "dropout"),
    ],
)
def test_a_wrong_gradient_ends_with_1(
    case: Any, op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = case.run

    def wrong(self: Any, name: str, *given: Tensor) -> Tensor:
        # Values as they should be, the first gradient of the wrong size.
        first = 1.01 * given[0] - 0.01 * given[0].detach()
        return right(self, name, first, *given[1:])

    monkeypatch.setattr(case, "run", wrong)
    assert cli.main(["kernels", "check", "--device", "cpu", "--no-time"]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if "  wrong  " in line]
    assert {line.split()[0] for line in bad} == {op}
    assert "gradient of" in bad[0]


def test_a_kernel_that_raises_or_gives_no_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(ScoringCase, "run", raises)
    monkeypatch.setattr(DropoutCase, "run", raises)
    right = AttentionCase.run
    monkeypatch.setattr(
        AttentionCase, "run", lambda self, name, *given: right(self, name, *given) * float("nan")
    )
    found = {f.op: f for f in check_kernels(CPU, timed=False) if f.state != "not measured"}
    assert {f.state for f in found.values()} == {"wrong"}
    assert "no kernel image is available" in found["linear_cross_entropy"].detail


def test_right_ones_are_timed_beside_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {op: operation.case for op, operation in TABLE.items()}
    monkeypatch.setitem(checking.TIMED, "cpu", small)
    for one in check_kernels(CPU):
        if one.state == "right":
            assert one.seconds is not None
            assert one.ratio is not None
            assert one.size == small[one.op].size


def test_what_does_not_fit_the_device_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 6 GiB")

    monkeypatch.setattr(AttentionCase, "reference", AttentionCase.eager)
    monkeypatch.setattr(AttentionCase, "eager", too_large)
    monkeypatch.setitem(checking.TIMED, "cpu", {op: o.case for op, o in TABLE.items()})
    found = [f for f in check_kernels(CPU) if f.implementation == "by_run"]
    assert {(f.state, f.seconds) for f in found} == {("right", None)}
    assert all("more memory" in f.detail for f in found)


def test_rounds_go_both_ways() -> None:
    order: list[str] = []

    def runner(name: str) -> Any:
        def run(given: Tensor) -> Tensor:
            order.append(name)
            return given.sum()

        return run

    given = [torch.ones(2, requires_grad=True)]
    functions = {"a": runner("a"), "b": runner("b")}
    times = paired_times(functions, given, rounds=2, warm_ups=1)
    assert order in (["a", "b", "b", "a", "a", "b"], ["b", "a", "a", "b", "b", "a"])
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_a_device_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["kernels", "check", "--device", "cuda"]) == 2
    assert "cuda is not there" in capsys.readouterr().err
