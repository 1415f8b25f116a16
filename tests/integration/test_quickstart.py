"""The quickstart command, a few steps of it, and what it leaves, without dist_ft."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.train.finished import open_finished
from tests.helpers.tiny_run import events

ROOT = Path(__file__).parents[2]
TASKS = {
    "trec": "AutoModelForSequenceClassification",
    "wnut16": "AutoModelForTokenClassification",
    "disfl_qa": "AutoModelForQuestionAnswering",
}
# Runs where `import dist_ft` fails, as on a machine that never had it.
ELSEWHERE = """
import json, sys
sys.modules["dist_ft"] = None
import torch, transformers
folder, auto_class, pipe, attention = sys.argv[1:5]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = getattr(transformers, auto_class).from_pretrained(
    folder, attn_implementation=attention
).eval()
inputs = tokenizer("Who wrote the first program ?", return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
kept = [n for n in ("logits", "start_logits", "end_logits") if n in outputs]
if pipe == "question-answering":
    call = transformers.pipeline(pipe, model=folder, trust_remote_code=True)
    said = call(question="Who wrote it ?", context="Ada Lovelace wrote the program.")
else:
    said = transformers.pipeline(pipe, model=folder)("Ada Lovelace went to London .")
print(json.dumps({"said": str(said), "values": {n: outputs[n].float().tolist() for n in kept}}))
"""
PIPES = {"trec": "text-classification", "wnut16": "token-classification"}


@pytest.fixture(scope="module")
def run() -> Iterator[Path]:
    """The folder of a quickstart of twelve steps."""
    name = f"test-{os.getpid()}"
    folder = ROOT / "runs" / name
    short = ["train.max_duration=12step", "optim.schedule.warmup=2step"]
    command = ["bash", "launch/quickstart.sh", f"name={name}", *short]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False
    )
    try:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "entity F1" in done.stdout or "f1" in done.stdout
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_quickstart_leaves_record_report_and_exports(run: Path) -> None:
    found = events(run)
    assert len([e for e in found if e["event"] == "phase"]) >= 3
    assert {e["task"] for e in found if e["event"] == "eval"} == set(TASKS)
    assert any(e["event"] == "checkpoint" for e in found)
    assert (run / "report" / "index.html").stat().st_size > 1000
    _, parts, _, _ = open_finished(run)
    # The run is bf16, where another attention kernel rounds otherwise (1e-3).
    backbone: Any = parts.model.backbone
    attention: str = backbone.config._attn_implementation
    for task, auto_class in TASKS.items():
        pipe = PIPES.get(task, "question-answering")
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                ELSEWHERE,
                str(run / "export" / task),
                auto_class,
                pipe,
                attention,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answer = json.loads(done.stdout.splitlines()[-1])
        assert answer["said"]
        _same_values(parts, task, answer["values"])


@torch.no_grad()
def _same_values(parts: Any, task: str, values: dict[str, Any]) -> None:
    inputs = parts.tokenizer("Who wrote the first program ?", return_tensors="pt")
    outputs = parts.model.eval()(task, dict(inputs))
    for name, value in values.items():
        assert torch.allclose(outputs[name].float(), torch.tensor(value), atol=1e-5), (task, name)
