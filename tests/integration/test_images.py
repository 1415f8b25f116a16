"""A ViT goes through gradual unfreezing under ZeRO-3 and the export."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from dist_ft.recipe import load_recipe
from dist_ft.recipe.errors import RecipeError
from dist_ft.tasks.image_classification import ImageClassification
from dist_ft.train import finished
from tests.helpers.tiny_run import check_unfroze_and_learnt, train, write_media_recipe

SIZE = 16


def _write(folder: Path) -> Path:
    """Save a tiny random ViT, light and dark images, and a recipe."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(folder / "model")
    size = {"height": SIZE, "width": SIZE}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder / "model")
    draw, rows = random.Random(1), []
    for index in range(80):
        light = draw.random() < 0.5
        image = Image.new("RGB", (20, 24))
        for x in range(20):
            for y in range(24):
                image.putpixel((x, y), (150 * light + draw.randrange(100),) * 3)
        path = folder / f"{index}.png"
        image.save(path)
        rows.append({"image": str(path), "label": "light" if light else "dark"})
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "tone",
        "type": "image_classification",
        "data": {"train": "images.jsonl", "validation": 0.25},
    }
    return write_media_recipe(folder, name="vit", task=task)


def test_a_vit_unfreezes_gradually_and_exports(tmp_path: Path) -> None:
    path = _write(tmp_path)
    train(path)
    run = tmp_path / "runs" / "vit"
    check_unfroze_and_learnt(run)

    [folder] = finished.export(run)
    image = str(tmp_path / "0.png")
    model: Any = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    task = ImageClassification(name="tone", labels=("dark", "light"))
    row = {"image": image, "label": "light", "source_row": 0}
    [feature] = task.encode([row], tokenizer=processor)
    spec = task.collate_spec(processor, evaluation=True)
    own = spec.arrays["pixel_values"].tensor([feature["pixels"]])
    theirs = processor(Image.open(image).convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(own, theirs, atol=0.02, rtol=0)  # two resizers: half a grey level
    _, parts, *_ = finished.open_finished(run)
    with torch.no_grad():
        expected = parts.model("tone", {"pixel_values": own}).logits
        torch.testing.assert_close(model(pixel_values=own).logits, expected)
    said = transformers.pipeline("image-classification", model=str(folder))(image)
    assert {one["label"] for one in said} == {"dark", "light"}


def test_images_are_read_from_all_that_data_sets_hold(tmp_path: Path) -> None:
    grey = [[0, 255], [255, 0]]
    path = tmp_path / "image.png"
    Image.fromarray(torch.tensor(grey, dtype=torch.uint8).numpy()).save(path)
    content = path.read_bytes()
    processor = transformers.ViTImageProcessor(size={"height": 2, "width": 2})
    task = ImageClassification(name="x", labels=("a", "b"))
    rows = [
        {"image": value, "label": "a", "source_row": 0}
        for value in (grey, str(path), content, {"bytes": content, "path": None})
    ]
    pixels = [f["pixels"].tolist() for f in task.encode(rows, tokenizer=processor)]
    assert pixels == [[0, 255, 255, 0] * 3] * 4
    with pytest.raises(ValueError, match="an image cannot be read"):
        task.encode([{**rows[0], "image": [[0, 999]]}], tokenizer=processor)


def test_keys_of_text_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path)
    changes = ["tasks.tone.max_length=9"]
    with pytest.raises(RecipeError, match=r"tasks\.tone\.max_length: is about text"):
        load_recipe(path, overrides=changes)
