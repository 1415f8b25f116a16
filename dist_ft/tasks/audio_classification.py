"""Audio classification: one label for a clip, which shards hold as the model takes it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_ft.data.collate import CollateSpec
from dist_ft.tasks.base import NoGeneration, Row
from dist_ft.tasks.single_label import SingleLabel

Samples = npt.NDArray[np.float32]

# One token stands for 20 ms, the stride of wav2vec2, HuBERT and WavLM: clips are sorted by length
# and batches filled as texts are.
_TOKENS_PER_SECOND = 50
# What the convolutions of these models see of a clip at once; they can't run on less.
_LEAST_SECONDS = 0.025


@dataclass(frozen=True)
class AudioClassification(SingleLabel, NoGeneration):
    """The task type ``audio_classification``; a feature extractor takes the tokenizer's place.

    Attributes:
        name: name in the recipe.
        audio: column of the clip: the path of a sound file, its bytes (alone or as hub data sets
            hold them, under ``bytes``), numbers at the model's sampling rate, or ``array`` and
            ``sampling_rate``.
        label: column of the label.
        labels: label names in the order of their indices; found by ``scan`` if not given.
        max_seconds: what is used of a clip. A model that takes no attention mask sees shorter
            ones with silence up to it: its first layer is normalised over time, so a clip would
            otherwise depend on the clips beside it.
        metric: primary metric.
    """

    name: str
    audio: str = "audio"
    label: str = "label"
    labels: Sequence[str] | None = None
    max_seconds: float = 10.0
    metric: str | None = None

    type = "audio_classification"
    auto_class = "AutoModelForAudioClassification"

    @property
    def content(self) -> str:
        """Column of the clip."""
        return self.audio

    def schema(self) -> pa.Schema:
        """Returns the task's columns, without the base columns."""
        return pa.schema(
            [pa.field("input_values", pa.list_(pa.float32())), pa.field("labels", pa.int32())]
        )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Checks that what came with the model is a feature extractor for waveforms.

        Raises:
            ValueError: it is not.
        """
        if not hasattr(tokenizer, "zero_mean_unit_var_norm"):
            raise ValueError(
                f"tasks.{self.name}: audio classification needs a model of waveforms (wav2vec2, "
                f"HuBERT, WavLM ...) with its feature extractor, got {type(tokenizer).__name__}: "
                "use another model.path"
            )

    def encode(self, rows: list[Row], *, tokenizer: Any) -> list[Row]:
        """Returns one feature per raw row: the clip as the model's feature extractor makes it.

        Raises:
            ValueError: a clip cannot be read or is too short, or a label is not known.
        """
        self.check_tokenizer(tokenizer)
        return [self._feature(row, extractor=tokenizer) for row in rows]

    def collate_spec(self, tokenizer: Any, *, evaluation: bool) -> CollateSpec:
        """Returns the columns of a micro-batch and their padding."""
        del evaluation
        mask = ("attention_mask",) if tokenizer.return_attention_mask else ()
        return CollateSpec(
            ragged={"input_values": tokenizer.padding_value},
            scalar=("labels",),
            inputs=("input_values", *mask),
            targets=("labels",),
            mask_of="input_values",
        )

    def _feature(self, row: Row, *, extractor: Any) -> Row:
        rate = extractor.sampling_rate
        clip = read_audio(row.get(self.audio), rate=rate)
        if len(clip) < _LEAST_SECONDS * rate:
            raise ValueError(
                f"a clip has {len(clip)} samples, at {rate} Hz it needs {_LEAST_SECONDS} s"
            )
        most = round(self.max_seconds * rate)
        (samples,) = extractor(clip[:most], sampling_rate=rate)["input_values"]
        if not extractor.return_attention_mask:
            silence = (0, most - len(samples))
            samples = np.pad(samples, silence, constant_values=extractor.padding_value)
        return {
            "input_ids": [0] * _tokens(len(samples), rate),
            "input_values": np.asarray(samples, np.float32),
            "labels": self._label_index(row),
            "loss_count": 1,
            "source_row": row["source_row"],
            "truncated_tokens": _tokens(max(0, len(clip) - most), rate),
        }


def _tokens(samples: int, rate: int) -> int:
    return -(-samples * _TOKENS_PER_SECOND // rate)


def read_audio(value: Any, *, rate: int) -> Samples:
    """Returns a clip with its channels' mean, float32 [samples], full scale 1, at `rate` Hz.

    Raises:
        ValueError: it cannot be read.
        RuntimeError: the packages that read sound are not installed.
    """
    have = rate
    if isinstance(value, Mapping):
        if "array" in value:
            value, have = value["array"], value.get("sampling_rate", rate)
        else:
            value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, str | bytes):
            clip, have = _decoded(value)
        else:
            clip = np.asarray(value, np.float32)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"a clip cannot be read: {error}") from error
    if clip.ndim == 2:  # [samples, channels], as sound files have them
        clip = clip.mean(axis=1)
    if clip.ndim != 1 or not np.isfinite(clip).all():
        raise ValueError(
            f"a clip must be finite numbers [samples] or [samples, channels], got {clip.ndim} axes"
        )
    return clip if have == rate else _resampled(clip, have, rate)


def _decoded(value: str | bytes) -> tuple[Samples, int]:
    try:
        import soundfile
    except ImportError as error:
        raise RuntimeError(_missing("soundfile")) from error
    try:
        file = io.BytesIO(value) if isinstance(value, bytes) else value
        clip, rate = soundfile.read(file, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ValueError(str(error)) from error
    return np.asarray(clip, np.float32), rate


def _resampled(clip: Samples, have: int, rate: int) -> Samples:
    try:
        import soxr
    except ImportError as error:
        raise RuntimeError(_missing("soxr")) from error
    return soxr.resample(clip, have, rate)


def _missing(package: str) -> str:
    return (
        f"sound is read by the package {package}, which is not installed: "
        "pip install 'dist-ft[audio]'"
    )
