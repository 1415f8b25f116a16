"""What the timed benchmarks compute from their measurements, without timing anything."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from benchmarks import kernels, network, scaling, step, time_to_quality, trainer
from benchmarks.common import Claim
from benchmarks.shaped.settings import alone_name
from benchmarks.training.workload import Clock, Outcome, Score


def held(claims: list[Claim]) -> dict[str, bool]:
    return {c.name: c.holds for c in claims}


def outcome(seconds: float, *, loss: float = 1.0, accuracy: float = 0.5) -> Outcome:
    return Outcome(seconds, Score(loss, accuracy), [(seconds, accuracy)], steps=10)


def rounds(*seconds: float, losses: tuple[float, ...] = (0.9, 1.1)) -> list[Outcome]:
    return [outcome(s, loss=v) for s, v in zip(seconds, losses, strict=False)]


def test_a_clock_stands_still_while_the_model_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 50.0, 51.0, 90.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(lambda: Score(0.3, 0.8), every=2)
    clock.start()
    clock.step_ended(is_last=False)
    clock.step_ended(is_last=False)
    clock.step_ended(is_last=True)
    found = clock.outcome()
    assert found.curve == [(2.0, 0.8), (3.0, 0.8)]
    assert (found.seconds, found.steps) == (3.0, 3)


def test_a_run_that_ended_early_has_no_outcome() -> None:
    with pytest.raises(RuntimeError, match="last step"):
        Clock(lambda: Score(0, 0), every=None).outcome()


def trainer_rows(*, peer_loss: float) -> list[dict[str, Any]]:
    found: trainer.Found = {}
    for depth, times in zip(trainer.DEPTHS, (3.0, 4.0, 9.9), strict=True):
        found[depth, trainer.OWN] = rounds(1.0, 10.0)
        losses = (peer_loss - 0.1, peer_loss + 0.1)
        found[depth, "Trainer"] = rounds(times, 10 * times, losses=losses)
        found[depth, "Trainer, tuned"] = [outcome(1.5)]
    return trainer.rows_of(found, batch=64)


def test_ratios_are_within_a_round_and_a_peer_of_fewer_rounds_is_compared_with_its_own() -> None:
    rows = {(r["depth"], r["system"]): r for r in trainer_rows(peer_loss=1.0)}
    assert rows[3, "Trainer"]["times"] == 4.0
    assert (rows[0, "Trainer, tuned"]["times"], rows[0, "Trainer, tuned"]["runs"]) == (1.5, 1)
    assert rows[0, "Trainer, tuned"]["deviation"] is None


def test_the_claims_on_whole_runs_see_speed_and_loss() -> None:
    claims = held(trainer.claims_of(trainer_rows(peer_loss=1.0)))
    assert not claims.pop("64 rows, 5 of 6 frozen, x Trainer")
    assert all(claims.values())
    # Ours is 0.5 above, with a deviation of 0.2 between the two.
    worse = held(trainer.claims_of(trainer_rows(peer_loss=0.5)))
    assert sum("loss" in name and not holds for name, holds in worse.items()) == 3


def test_model_arithmetic_counts_weights_and_pairs_that_are_needed() -> None:
    config = BertConfig(hidden_size=4, intermediate_size=8, num_hidden_layers=3)
    weights = 2 * (4 * 16 + 2 * 32)
    expected = 6 * weights * 5 + 12 * 2 * 4 * (4 + 9) + 6 * 16 * 2
    # The last block: keys and values of 5 tokens, the rest of 2 rows, who see 2 and 3 tokens.
    expected += 6 * (2 * 16 * 5 + (2 * 16 + 2 * 32) * 2) + 12 * 4 * 5
    assert step.useful_flops(config, [2, 3]) == expected


def test_a_profile_accounts_for_the_whole_time() -> None:
    events = [
        ("aten::mm", False, 4.0),
        ("aten::copy_", True, 1.0),
        ("bench::communication", True, 2.0),
        ("aten::bernoulli_", False, 0.5),
        ("aten::sum", False, 0.5),
    ]
    found = step.shares(events, wall=10.0)
    assert found == {
        "GEMM": 0.4, step.PYTHON: pytest.approx(0.2), step.COMMUNICATION: 0.2, step.OPTIMIZER: 0.1,
        "dropout": 0.05, step.OTHER: 0.05,
    }  # fmt: skip
    rows = [{"shape": "a, b", "precision": "fp32", "rows": 1, "profile": found}]
    table, columns = step.profile_rows(rows)
    assert columns["0"] == "a fp32 x1"
    assert {row["kind"]: row["0"] for row in table}["GEMM"] == 40.0


def test_the_claim_on_mfu_takes_the_best_batch_of_each_precision() -> None:
    rows = [
        {"shape": step.BERT_BASE, "precision": "fp32", "mfu": 61.0},
        {"shape": step.BERT_BASE, "precision": "bf16", "mfu": 20.0},
        {"shape": step.BERT_BASE, "precision": "bf16", "mfu": 40.0},
        {"shape": step.MINILM, "precision": "bf16", "mfu": 99.0},
    ]
    fp32, bf16 = step.claims_of(rows)
    assert (fp32.holds, bf16.holds, bf16.value) == (True, False, 40.0)


def test_time_to_a_target_is_that_of_the_first_score_that_reaches_it() -> None:
    curve = [(1.0, 0.5), (2.0, 0.8), (3.0, 0.7)]
    assert time_to_quality.seconds_to(curve, target=0.7) == 2.0
    assert math.isinf(time_to_quality.seconds_to(curve, target=0.9))
    assert time_to_quality.target_of([0.8, 0.8], rows=100) == pytest.approx(0.76)
    assert time_to_quality.ratio([6.0, math.inf, 9.0], [1.0, 1.0, 3.0]) == 6.0
    assert time_to_quality.ratio([6.0], [math.inf]) is None


def test_time_to_quality_asks_more_of_the_default_than_of_the_tuned_peer() -> None:
    found = {
        time_to_quality.OWN: [outcome(1.0, accuracy=0.9)],
        **{p.name: [outcome(4.0, accuracy=0.9)] for p in time_to_quality.PEERS},
    }
    rows = time_to_quality.rows_of("trec", found, rows=100)
    assert {c.bound: c.holds for c in time_to_quality.claims_of(rows)} == {6.0: False, 3.0: True}
    size = time_to_quality.FULL
    schedule = time_to_quality.gradual(size)
    starts = [0, *(int(s.removesuffix("step")) for s in schedule["at"]), size.steps]
    assert starts == sorted(set(starts))
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    thawed = [i * schedule["groups_per_phase"] for i in range(len(lengths))]
    frozen = sum((time_to_quality.BLOCKS - t) * n for t, n in zip(thawed, lengths, strict=True))
    assert round(frozen / size.steps) == time_to_quality.FROZEN


def test_the_extrapolation_covers_the_clusters_and_a_frozen_half_sends_less() -> None:
    rows = scaling.extrapolate(clusters=(8, 1024))
    assert {r["ranks"] for r in rows} == {8, 1024}
    assert {(r["recipe"], r["stage"]) for r in rows} == set(scaling.EXTRAPOLATED)
    for name, _ in scaling.EXTRAPOLATED:
        whole, half = (
            next(r for r in rows if r["recipe"] == name and r["ranks"] == 1024 and pick(r))
            for pick in (lambda r: r["trains"] == 100, lambda r: r["trains"] < 100)
        )
        assert half["sent_mb"] < whole["sent_mb"]
        assert half["step_ms"] < whole["step_ms"]


def test_claims_on_scaling_that_were_not_measured_do_not_hold() -> None:
    row = {"kind": "ranks", "value": 2, "relative": 1.6}
    assert list(held(scaling.claims_of([row])).values()) == [True, False, False, False]


def shaped(
    times: dict[tuple[int, str, bool], float], *, alone: dict[tuple[int, str], float] | None = None
) -> list[dict[str, Any]]:
    runs: dict[str, Any] = {
        network.name_of(stage, share, cached=cached): {
            "times": [t, 9 * t, t], "trainable_share": 0.5, "cached_blocks": 0, "sent_bytes": 1e6,
        }
        for (stage, share, cached), t in times.items()
    }  # fmt: skip
    runs |= {
        alone_name(stage, share): {"times": [t], "trainable_share": 0.5, "sent_bytes": 2e6}
        for (stage, share), t in ({} if alone is None else alone).items()
    }
    return network.rows_of({"runs": runs}, settings=list(times))


def test_the_slow_network_is_compared_with_the_prototype_stage_by_stage() -> None:
    rows = shaped(
        {
            (2, "all", False): 2.0,
            (2, "half", False): 1.0,
            (3, "all", False): 2.0,
            (3, "half", False): 1.8,
            (3, "3 of 6", False): 1.2,
            (3, "3 of 6", True): 1.0,
            (3, "small, all", False): 1.6,
            (3, "small, half", False): 1.2,
        }
    )
    of_all = [r["of_all"] for r in rows]
    assert of_all == pytest.approx([1.0, 0.5, 1.0, 0.9, 0.6, 0.5, 1.0, 0.75])
    claims = network.claims_of(rows, link_bits_per_s=240e6)
    assert claims[0].holds
    assert claims[-1].holds
    found = held(claims)
    share = "ZeRO-{}, half of the parameters frozen, step of all training"
    # The first was not measured.
    assert [found[share.format(s)] for s in (1, 2, 3)] == [False, True, False]
    assert [found[f"ZeRO-3, small, {share}, ms"] for share in ("all", "half")] == [True, False]
    assert not network.claims_of(rows, link_bits_per_s=900e6)[0].holds


def test_the_slow_network_is_compared_with_deepspeed_by_itself_setting_by_setting() -> None:
    ours = {(2, "all", False): 2.0, (2, "half", False): 1.0, (2, "half", True): 1.0}
    rows = shaped(ours, alone={(2, "all"): 2.5, (2, "half"): 0.8})
    assert [r.get("alone_of_all") for r in rows] == [1.0, 0.8 / 2.5, None]
    found = held(network.claims_of(rows, link_bits_per_s=240e6))
    assert found["ZeRO-2, all training, step of DeepSpeed's own"]
    assert not found["ZeRO-2, half training, step of DeepSpeed's own"]
    assert not found["ZeRO-1, all training, step of DeepSpeed's own"]  # not measured


def test_without_root_the_slow_network_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(network, "why_not", lambda *, slurm: "needs root" if not slurm else None)
    assert network.main(["--check", "--json", str(tmp_path / "out.json")]) == 1
    assert "not measured: needs root" in capsys.readouterr().out


def test_kernel_claims_are_about_the_own_ones_and_what_was_not_measured_does_not_hold() -> None:
    rows: list[dict[str, Any]] = [
        {"by": "eager", "dtype": "float32", "time_ratio": 1.0, "memory_ratio": 1.0},
        {"by": "chunked", "dtype": "float32", "time_ratio": 1.2, "memory_ratio": 0.3},
        {"by": "torch chunked", "dtype": "float32", "time_ratio": 9.0, "memory_ratio": 9.0},
        {"by": "by_byte", "dtype": "float32", "size": "some", "time_ratio": 0.7},
    ]
    compiled = [{"target": t, "spills": int(t == "cuda:90")} for t in kernels.TARGETS]
    interpreted = [
        {"dtype": "float32", "state": "right", "error": 0.5},
        {"dtype": "bfloat16", "state": "not measured", "error": None},
    ]
    found = kernels.claims_of(rows, compiled, interpreted)
    assert list(held(found).values()) == [True, False, False, True, False, True, True, False]


PEAK = """
import torch
from types import SimpleNamespace
from benchmarks.kernels import Contest, peak_mib
def eager(given):
    return given.exp().sum()  # 40 MiB, kept for a gradient of 40
case = SimpleNamespace(size="", spread=1.0, shapes={"x": (10 * 2**20,)}, eager=eager)
contest = Contest("dropout_residual_norm", case, {})
print(peak_mib(contest, "eager", device=torch.device("cpu"), dtype=torch.float32))
"""


def test_the_peak_of_a_process_is_what_an_operation_holds_at_once() -> None:
    # As the benchmark does, in a process that has freed nothing it could use again.
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 79 < float(done.stdout) < 84
