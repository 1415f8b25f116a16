"""A wav2vec2 goes through gradual unfreezing under ZeRO-3 and the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from dist_ft.data.collate import collate
from dist_ft.recipe import load_recipe
from dist_ft.recipe.errors import RecipeError
from dist_ft.tasks.audio_classification import AudioClassification, read_audio
from dist_ft.train import finished
from tests.helpers.tiny_run import check_unfroze_and_learnt, train, write_media_recipe

RATE = 16_000


def _tone(pitch: float, *, seconds: float, rate: int = RATE) -> Any:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def _write(folder: Path) -> Path:
    """Save a tiny random wav2vec2, low and high tones of several lengths and rates, a recipe."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 4, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    assert config.layerdrop > 0  # what ranks would draw apart, and the run must turn off
    assert config.apply_spec_augment
    transformers.Wav2Vec2Model(config).save_pretrained(folder / "model")
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    extractor.save_pretrained(folder / "model")
    draw, rows = np.random.default_rng(1), []
    for index in range(80):
        high, rate = index % 2 == 0, RATE if index % 4 else 8_000
        pitch = draw.uniform(1500, 2000) if high else draw.uniform(200, 400)
        tone = _tone(pitch, seconds=draw.uniform(0.05, 0.12), rate=rate)
        path = folder / f"{index}.wav"
        soundfile.write(path, tone + 0.05 * draw.standard_normal(len(tone)), rate)
        rows.append({"audio": str(path), "label": "high" if high else "low"})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "pitch",
        "type": "audio_classification",
        "max_seconds": 0.1,
        "data": {"train": "clips.jsonl", "validation": 0.25},
    }
    return write_media_recipe(folder, name="wav2vec2", task=task)


def test_a_wav2vec2_unfreezes_gradually_and_exports(tmp_path: Path) -> None:
    train(_write(tmp_path))
    run = tmp_path / "runs" / "wav2vec2"
    check_unfroze_and_learnt(run)

    [folder] = finished.export(run)
    model: Any = transformers.AutoModelForAudioClassification.from_pretrained(folder)
    extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(folder)
    task = AudioClassification(name="pitch", labels=("high", "low"), max_seconds=0.1)
    paths = [tmp_path / "0.wav", tmp_path / "1.wav", tmp_path / "2.wav"]
    rows = [{"audio": str(path), "label": "low", "source_row": 0} for path in paths]
    features = task.encode(rows, tokenizer=extractor)
    columns: Any = {
        key: [np.asarray(f[key]) for f in features] for key in ("input_values", "labels")
    }
    spec = task.collate_spec(extractor, evaluation=True)
    own, _ = collate(columns, spec)
    clips = [read_audio(str(path), rate=RATE)[: RATE // 10] for path in paths]
    assert len({len(clip) for clip in clips}) > 1
    theirs = extractor(clips, sampling_rate=RATE, padding=True, return_tensors="pt")
    torch.testing.assert_close(own["input_values"], theirs["input_values"], atol=1e-6, rtol=1e-5)
    assert torch.equal(own["attention_mask"], theirs["attention_mask"].long())

    _, parts, *_ = finished.open_finished(run)
    with torch.no_grad():
        logits = model(**theirs).logits
        torch.testing.assert_close(parts.model("pitch", own).logits, logits)
        alone = model(**extractor(clips[0], sampling_rate=RATE, return_tensors="pt")).logits
        torch.testing.assert_close(alone, logits[:1], atol=1e-5, rtol=1e-4)
    pipe = transformers.pipeline("audio-classification", model=str(folder))
    assert {one["label"] for one in pipe(clips[0])} == {"high", "low"}


def test_clips_are_read_from_all_that_data_sets_hold(tmp_path: Path) -> None:
    path, tone = tmp_path / "tone.flac", _tone(440, seconds=0.05)
    soundfile.write(path, np.stack([tone, tone], axis=1), RATE)
    content = path.read_bytes()
    pair = {"array": tone.tolist(), "sampling_rate": RATE}
    for value in (str(path), content, {"bytes": content, "path": None}, pair, tone.tolist()):
        np.testing.assert_allclose(read_audio(value, rate=RATE), tone, atol=1e-4)
    half = read_audio({"array": tone, "sampling_rate": RATE}, rate=RATE // 2)
    assert len(half) == len(tone) // 2
    for value in (b"no sound", [[[0.0]]], [float("nan")], None, "no such file"):
        with pytest.raises(ValueError, match="a clip "):
            read_audio(value, rate=RATE)


def test_a_model_without_a_mask_sees_clips_of_one_length() -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor()
    task = AudioClassification(name="x", labels=("a", "b"), max_seconds=0.1)
    rows = [
        {"audio": _tone(440, seconds=seconds), "label": "a", "source_row": 0}
        for seconds in (0.05, 0.2)
    ]
    short, long = task.encode(rows, tokenizer=extractor)
    assert [len(f["input_values"]) for f in (short, long)] == [1600, 1600]
    assert np.all(short["input_values"][800:] == 0)
    assert [f["truncated_tokens"] for f in (short, long)] == [0, 5]
    assert task.collate_spec(extractor, evaluation=True).inputs == ("input_values",)
    with pytest.raises(ValueError, match="a clip has 160 samples"):
        task.encode([{**rows[0], "audio": _tone(1, seconds=0.01)}], tokenizer=extractor)
    with pytest.raises(ValueError, match="needs a model of waveforms"):
        task.encode(rows, tokenizer=transformers.ViTImageProcessor())


def test_keys_of_text_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path)
    changes = ["tasks.pitch.max_length=9", "regularization.cutoff={share: 0.1}"]
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides=changes)
    assert "tasks.pitch.max_length: is about text" in str(error.value)
    assert "regularization.cutoff: changes words, and task pitch has audio" in str(error.value)
