import numpy as np
import pytest

from dist_ft.tasks.calibration import confusion_matrix, reliability


def test_the_error_is_the_mean_gap_of_the_bins() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.65, 0.65])
    found = reliability(confidence, np.array([1.0, 1, 1, 0, 0, 1]))
    assert [b["count"] for b in found["bins"]] == [2, 4]
    assert found["ece"] == pytest.approx((2 * 0.15 + 4 * 0.20) / 6)


def test_a_model_that_is_as_sure_as_right_has_no_error() -> None:
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.5, 1, 200_000)
    correct = (draw.uniform(size=200_000) < confidence).astype(float)
    assert reliability(confidence, correct)["ece"] < 0.01
    assert reliability(confidence, np.zeros(200_000))["ece"] == pytest.approx(0.75, abs=0.01)


def test_rows_of_the_matrix_are_what_is_right() -> None:
    found = confusion_matrix(np.array([0, 1, 1, 1]), np.array([0, 0, 0, 1]), classes=3)
    assert found == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
