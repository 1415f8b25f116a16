"""The chunked loss equals that of whole logits, in value and gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ft.kernels import linear_cross_entropy as module
from dist_ft.kernels.linear_cross_entropy import (
    chunk_rows,
    linear_cross_entropy,
    reference_linear_cross_entropy,
)


def _case(
    dtype: torch.dtype, *, rows: int = 150, classes: int = 300, bias: bool, weighted: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    """Hidden states, weights and labels, a third of them none; and the other arguments."""
    draw = torch.Generator().manual_seed(rows)
    hidden = torch.randn(2, rows // 2, 24, generator=draw).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(classes, 24, generator=draw)).to(dtype).requires_grad_()
    labels = torch.randint(classes, hidden.shape[:-1], generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < 0.3] = -100
    more: dict[str, Any] = {}
    if bias:
        more["bias"] = torch.randn(classes, generator=draw).to(dtype).requires_grad_()
    if weighted:
        more["token_weights"] = torch.rand(labels.shape, generator=draw)
    return [hidden, weight, labels], more


def _run(function: Any, given: list[Tensor], more: dict[str, Any], **options: Any) -> list[Tensor]:
    loss = function(*given, **more, **options)
    leaves = [t for t in (*given, *more.values()) if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(0.37 * loss, leaves)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bf16 rounds each gradient once more, and adds those of the weights chunk by chunk.
    [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_it_equals_the_loss_of_whole_logits(
    dtype: torch.dtype, tolerance: float, *, bias: bool, weighted: bool, label_smoothing: float
) -> None:
    given, more = _case(dtype, bias=bias, weighted=weighted)
    found = _run(linear_cross_entropy, given, more, label_smoothing=label_smoothing)
    expected = _run(reference_linear_cross_entropy, given, more, label_smoothing=label_smoothing)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert len(found) == 3 + bias
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == dtype
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def test_bf16_is_as_near_to_the_truth_as_whole_logits() -> None:
    """Against float64, for as many chunks as there ever are."""
    given, more = _case(torch.bfloat16, rows=3000, bias=True, weighted=True)
    exact = [t.detach().double().requires_grad_() for t in given[:2]]
    precise = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in more.items()}
    truth = _run(reference_linear_cross_entropy, [*exact, given[2]], precise)
    found = _run(linear_cross_entropy, given, more)
    eager = _run(reference_linear_cross_entropy, given, more)
    for ours, theirs, right in zip(found, eager, truth, strict=True):
        error, usual = (float((t - right).norm() / right.norm()) for t in (ours, theirs))
        assert error <= 1.5 * usual + 1e-6


class _Again(torch.autograd.Function):
    """Runs the operation anew for each backward pass, of which gradcheck needs several."""

    @staticmethod
    def forward(ctx: Any, function: Any, *given: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*given)
        return function(*given)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        given = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            loss = ctx.function(*given)
        return (None, *torch.autograd.grad(loss, given, grad_outputs))


def _gradcheck() -> bool:
    given, more = _case(torch.float64, rows=140, classes=11, bias=True, weighted=True)
    hidden, weight, labels = given
    bias = more.pop("bias")

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, bias=b, label_smoothing=0.2, **more)

    inputs = [t.detach()[..., :4].requires_grad_() for t in (hidden, weight)]
    return torch.autograd.gradcheck(lambda *t: _Again.apply(loss, *t), (*inputs, bias))


def test_gradcheck() -> None:
    assert _gradcheck()


@pytest.mark.parametrize("broken", ["smoothing", "weights", "accumulation"])
def test_gradcheck_sees_a_broken_backward(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slope_of, add = module._loss_to_slope, module._add_gradients

    def slope(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        loss = slope_of(logits.clone(), labels, **options)
        changed = {"smoothing": {"label_smoothing": 0.0}, "weights": {"token_weights": None}}
        slope_of(logits, labels, **options | changed.get(broken, {}))
        return loss

    def forget(*args: Any, gradients: Any, part: slice) -> None:
        add(*args, gradients=(gradients[0], gradients[1].zero_()), part=part)

    monkeypatch.setattr(module, "_loss_to_slope", slope)
    if broken == "accumulation":  # only the last of several chunks is left
        monkeypatch.setattr(module, "_add_gradients", forget)
    with pytest.raises(RuntimeError, match="Jacobian"):
        _gradcheck()


def test_rows_without_a_label_are_dropped_and_none_may_be_left() -> None:
    given, more = _case(torch.float32, bias=False, weighted=False)
    hidden, weight, labels = given
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    found = _run(linear_cross_entropy, given, more)
    assert all(t.isfinite().all() for t in found)
    assert not found[1][labels == -100].any()
    nothing = _run(linear_cross_entropy, [hidden, weight, torch.full_like(labels, -100)], more)
    assert [float(t.abs().sum()) for t in nothing] == [0.0, 0.0, 0.0]


def test_only_wanted_gradients_are_made() -> None:
    (hidden, weight, labels), _ = _case(torch.float32, bias=False, weighted=False)
    frozen = weight.detach()
    loss = linear_cross_entropy(hidden, frozen, labels)
    assert loss.grad_fn is not None
    kept: Any = vars(loss.grad_fn)["gradients"]
    assert [g is None for g in kept] == [False, True, True]
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels).grad_fn is None


def test_a_second_backward_pass_is_refused() -> None:
    given, _ = _case(torch.float32, bias=False, weighted=False)
    loss = linear_cross_entropy(*given)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Run the forward pass again"):
        loss.backward()


def test_other_shapes_are_refused() -> None:
    (hidden, weight, labels), _ = _case(torch.float32, bias=False, weighted=False)
    with pytest.raises(ValueError, match=r"labels must be of shape \(2, 75\)"):
        linear_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="token_weights must be of shape"):
        linear_cross_entropy(hidden, weight, labels, token_weights=torch.ones(3))


def test_chunks_hold_an_eighth_of_the_rows() -> None:
    assert [chunk_rows(n) for n in (0, 1, 64, 512, 513, 4096)] == [64, 64, 64, 64, 65, 512]
