"""Dropout by random bytes: its statistics, its gradient, and the modules that run it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_ft.kernels import cpu_dropout
from dist_ft.kernels.cpu_dropout import dropout, keep_mask
from dist_ft.model import dropout_modules
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.dropout import set_dropout
from dist_ft.model.dropout_modules import ByteDropout, find_dropouts, use_byte_dropout
from dist_ft.model.layer_groups import find_layer_groups
from tests.helpers.tiny_models import tiny_config


# Below a byte's step, on one, between two, near 1.
@pytest.mark.parametrize("p", [0.001, 0.0039, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_each_place_of_a_word_is_dropped_as_often_as_it_should_be(p: float) -> None:
    torch.manual_seed(0)
    rows = 500_000
    dropped = 1 - keep_mask((rows, 8), dropout=p).double()
    # Of a byte alone 0.1 would be 0.0977: 15 of these deviations of all.
    one, whole = ((p * (1 - p) / n) ** 0.5 for n in (rows, 8 * rows))
    assert torch.all((dropped.mean(0) - p).abs() <= 5 * one)
    assert abs(float(dropped.mean()) - p) <= 4 * whole
    # Neighbours, within a word and from word to word, are dropped independently.
    for first, second in ((dropped[:, :-1], dropped[:, 1:]), (dropped[:-1], dropped[1:])):
        both = float((first * second).mean())
        assert abs(both - p * p) <= 5 * (p * p * (1 - p * p) / first.numel()) ** 0.5 + 1e-7


@given(
    p=st.floats(0, 1, exclude_max=True),
    shape=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 99),
)
def test_a_mask_has_its_share_and_follows_the_seed(p: float, shape: list[int], seed: int) -> None:
    def draw() -> Tensor:
        torch.manual_seed(seed)
        return keep_mask(shape, dropout=p)

    kept = draw()
    assert (kept.dtype, kept.shape) == (torch.int8, torch.Size(shape))
    assert torch.equal(kept, draw())
    assert torch.all((kept == 0) | (kept == 1))
    count = kept.numel()
    # Bernstein's bound for a chance of 1e-9.
    bound = (2 * 21 * count * p * (1 - p)) ** 0.5 + 2 * 21 / 3
    assert abs(float(kept.sum(dtype=torch.int64)) - count * (1 - p)) <= bound


@given(
    p=st.floats(0.01, 0.99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradient_are_those_of_the_mask(
    p: float, dtype: torch.dtype, transposed: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(17, 23, generator=draw, dtype=torch.float64).to(dtype)
    x = (x.t() if transposed else x).requires_grad_()
    upper = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(dtype)
    torch.manual_seed(seed)
    found = dropout(x, p=p)
    (gradient,) = torch.autograd.grad(found, x, upper)
    torch.manual_seed(seed)
    kept = keep_mask(x.shape, dropout=p)  # the same whatever the type
    limit = {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2)
    for one, whole in ((found, x), (gradient, upper)):
        assert (one.dtype, one.shape) == (dtype, x.shape)
        # Half a unit in the last place: rounded once.
        torch.testing.assert_close(
            one.double(), whole.double() * kept / (1 - p), rtol=limit, atol=1e-7
        )


def _gradcheck() -> bool:
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()

    def seeded(value: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dropout(value, p=0.4)

    return torch.autograd.gradcheck(seeded, [x], raise_exception=False)


def test_gradcheck_holds_and_sees_a_wrong_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _gradcheck()
    right: Any = cpu_dropout._Dropout.backward

    def unscaled(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.saved_tensors[0], None

    def unmasked(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.scale, None

    def shifted(ctx: Any, gradient: Tensor) -> Any:
        return right(ctx, gradient.roll(1))[0], None

    for wrong in (unscaled, unmasked, shifted):
        with monkeypatch.context() as patch:
            patch.setattr(cpu_dropout._Dropout, "backward", staticmethod(wrong))
            assert not _gradcheck(), wrong


def test_only_a_byte_an_element_is_kept_for_the_backward() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dropout(torch.ones(1000, requires_grad=True), p=0.1)
    assert [t.nbytes for t in kept] == [1000]


def test_edges_are_torchs() -> None:
    x = torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True)
    assert dropout(x, p=0.0) is x
    for p in (1.0, 0.0):
        torch.testing.assert_close(dropout(x, p=p), F.dropout(x, p), equal_nan=True)
    assert torch.autograd.grad(dropout(x, p=1.0).nan_to_num().sum(), x)[0][0] == 0
    assert dropout(torch.empty(0, 3), p=0.1).shape == (0, 3)
    assert dropout(torch.ones(2, device="meta"), p=0.1).device.type == "meta"
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            dropout(x, p=p)
    # What is dropped of infinity is no number, and no number stays none: bad steps are seen.
    bad = dropout(torch.full((1000,), float("inf")), p=0.5)
    assert not bad.isfinite().any()
    assert bad.isnan().any()
    assert dropout(torch.full((1000,), float("nan")), p=0.5).isnan().all()


def test_an_upper_gradient_of_one_number_is_spread_as_torchs() -> None:
    x = torch.zeros(50, 50, requires_grad=True)
    dropout(x, p=0.5).sum().backward()
    assert x.grad is not None
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}


def _bert() -> Any:
    config = tiny_config("bert")
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {})]
    return build_model(config, heads=heads, dtype=torch.float32, seed=0)


def test_modules_keep_what_others_ask_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_modules, "FEWEST", 0)
    model = _bert().train()
    calls: list[float] = []

    def counted(x: Tensor, *, p: float) -> Tensor:
        calls.append(p)
        return dropout(x, p=p)

    monkeypatch.setattr(dropout_modules, "dropout", counted)
    names = list(model.state_dict())
    found = find_dropouts(model)
    use_byte_dropout(found)
    assert found
    assert find_dropouts(model) == []
    assert list(model.state_dict()) == names
    set_dropout(model, groups=find_layer_groups(model), probabilities={"hidden": 0.7, "head": 0.2})
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def run(one: Any) -> Tensor:
        torch.manual_seed(5)
        return one("a", inputs)["logits"]

    dropped = run(model)
    assert {0.7, 0.2} <= set(calls)
    count = len(calls)
    # A copy runs its own modules, at their rates.
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(again), dropped)
        assert all(isinstance(m, ByteDropout) for m in again.modules() if "Dropout" in repr(m)[:12])
    assert len(calls) == 3 * count
    assert torch.equal(run(model.eval()), run(_bert().eval()))
    assert len(calls) == 3 * count


def test_modules_in_place_of_another_class_or_forward_stay() -> None:
    class Other(nn.Dropout):
        pass

    wrapped = nn.Dropout(0.1)
    vars(wrapped)["forward"] = lambda x: x
    model = nn.Sequential(nn.Dropout(0.1, inplace=True), Other(), wrapped, nn.Dropout1d())
    assert find_dropouts(model) == []


def test_few_values_are_left_to_torch() -> None:
    few, many = torch.ones(100), torch.ones(dropout_modules.FEWEST)
    module = nn.Dropout(0.5)
    use_byte_dropout([module])
    for x, expected in (
        (few, lambda x: F.dropout(x, 0.5)),
        (many, lambda x: dropout(x, p=0.5)),
    ):
        torch.manual_seed(0)
        found = module(x)
        torch.manual_seed(0)
        assert torch.equal(found, expected(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_draws_the_mask_again(reentrant: bool) -> None:
    x = torch.randn(30, 40, requires_grad=True)

    def block(value: Tensor) -> Tensor:
        return dropout(value.sin(), p=0.3)

    def gradient(recompute: bool) -> Tensor:
        torch.manual_seed(2)
        out = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
        torch.rand(7)  # what came after the block
        out.square().sum().backward()
        assert x.grad is not None
        found, x.grad = x.grad, None
        return found

    assert torch.equal(gradient(recompute=True), gradient(recompute=False))
