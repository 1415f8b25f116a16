import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.duration import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("3ep", 3, "ep"),
        ("0.5ep", 0.5, "ep"),
        (".5ep", 0.5, "ep"),
        ("500step", 500, "step"),
        (" 500 step ", 500, "step"),
        ("2e6tok", 2_000_000, "tok"),
        ("1.5e3step", 1500, "step"),
        ("0step", 0, "step"),
    ],
)
def test_parse_reads_number_and_unit(text: str, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "text",
    ["", "3", "ep", "-3ep", "3 epochs", "3steps", "10%", "3ep 4step", "1e", "nanep", "infep"],
)
def test_parse_refuses_what_has_no_number_or_unit(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 3ep, 500step or 2e6tok"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["1.5step", "0.1tok"])
def test_parse_refuses_parts_of_steps_and_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["1e999step", "1e999ep"])
def test_parse_refuses_what_is_not_finite(text: str) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3ep", 30),
        ("0.1ep", 1),
        ("0.11ep", 2),  # rounded up: a started step is made
        ("7step", 7),
        ("100tok", 1),
        ("101tok", 2),
        ("0tok", 0),
    ],
)
def test_steps_rounds_up(text: str, expected: int) -> None:
    assert Duration.parse(text).steps(steps_per_epoch=10, tokens_per_step=100) == expected


@given(epochs=st.integers(0, 1000), steps_per_epoch=st.integers(1, 10**6))
def test_whole_epochs_are_whole_steps(epochs: int, steps_per_epoch: int) -> None:
    duration = Duration(epochs, "ep")
    steps = duration.steps(steps_per_epoch=steps_per_epoch, tokens_per_step=1)
    assert steps == epochs * steps_per_epoch


@given(
    st.one_of(
        st.builds(Duration, st.integers(0, 10**12), st.sampled_from(["step", "tok"])),
        st.builds(Duration, st.floats(0, 1e6, allow_subnormal=False), st.just("ep")),
    )
)
def test_text_and_back(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration
