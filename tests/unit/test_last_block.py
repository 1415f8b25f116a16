"""The last block of an encoder, run for the tokens that a head reads."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_ft.kernels.cpu_attention import attend
from dist_ft.kernels.first_token_attention import attend_from_first
from dist_ft.kernels.unpadded_attention import RowRuns
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.model.flat_rows import FlatRows
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.trunk import Trunk
from tests.helpers.tiny_models import tiny_config

CLASSIFIER = "AutoModelForSequenceClassification"
LABELLER = "AutoModelForTokenClassification"
ANSWERER = "AutoModelForQuestionAnswering"
# What their last projections are called.
HEADS = ("classifier", "qa_outputs")
# Their classifiers read the first token, and their blocks have BERT's form.
NARROW = ("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "electra", "ernie")
# Pre-norm, another attention, other parts, or the last token read.
WHOLE = ("distilbert", "modernbert", "mobilebert", "gpt2", "llama", "xlm-roberta-xl")


def _found(config: Any, *, kinds: tuple[str, ...] = (CLASSIFIER,)) -> tuple[MultiTaskModel, Trunk]:
    """A model with a head of two labels for each kind, and its trunk without padding."""
    heads = [HeadSpec(f"t{i}", kind, {"num_labels": 2}) for i, kind in enumerate(kinds)]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    trunk = Trunk.find(model, groups=find_layer_groups(model))
    assert "unpadded" not in trunk.check()
    trunk.flat = True
    return model, trunk


def _trunk(
    name: str, *, heads: tuple[str, ...] = (CLASSIFIER,), per_token: tuple[str, ...] = ()
) -> tuple[MultiTaskModel, Trunk, list[str]]:
    config: Any = tiny_config(name)
    config.pad_token_id = 0
    model, trunk = _found(config, kinds=heads)
    trunk.fit_to_heads(model, per_token=per_token)
    return model, trunk, list(trunk.forms)


def _inputs() -> dict[str, Tensor]:
    mask = (torch.arange(11)[None] < torch.tensor([11, 7, 7, 4, 1, 0])[:, None]).long()
    ids = torch.randint(3, 60, mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def _gradients(model: MultiTaskModel, task: str = "t0") -> dict[str, Tensor]:
    """The gradient of a loss over rows that have tokens, and under ``loss`` the loss."""
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    logits = model(task, _inputs())["logits"][:5]
    loss = (logits * torch.linspace(-1, 1, logits.shape[-1])).sin().sum()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()}


@pytest.mark.parametrize("name", NARROW)
def test_losses_and_gradients_stay(name: str) -> None:
    model, trunk, tasks = _trunk(name)
    assert tasks == ["t0"]
    rows = FlatRows.of(_inputs()["attention_mask"])
    trunk.prepare(rows)
    whole = _gradients(model)
    trunk.prepare(rows, task="t0")
    seen: list[int] = []
    assert trunk.last is not None
    trunk.last.sublayer.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    narrow = _gradients(model)
    assert seen == [5]  # one token of each row that has any
    assert narrow.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(narrow[key], value, rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("name", WHOLE)
def test_other_blocks_run_whole(name: str) -> None:
    model, trunk, tasks = _trunk(name)
    rows = FlatRows.of(_inputs()["attention_mask"])
    trunk.prepare(rows)
    whole = _gradients(model)
    trunk.prepare(rows, task="t0")
    if not tasks:  # to the bit
        assert all(torch.equal(v, whole[k]) for k, v in _gradients(model).items())
    else:  # what is admitted must be right whatever its form
        for key, value in _gradients(model).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=2e-6, msg=key)


def test_only_heads_that_read_first_tokens_are_let_in() -> None:
    heads = (CLASSIFIER, LABELLER, ANSWERER)
    model, trunk, tasks = _trunk("bert", heads=heads)
    assert tasks == ["t0"]
    rows = FlatRows.of(_inputs()["attention_mask"])
    trunk.prepare(rows)
    whole = model("t1", _inputs())["logits"]
    trunk.prepare(rows, task="t1")
    assert torch.equal(model("t1", _inputs())["logits"], whole)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_heads_that_treat_each_token_for_itself_get_no_padding(name: str) -> None:
    model, trunk, _ = _trunk(name, heads=(LABELLER, ANSWERER), per_token=("t0", "t1"))
    assert trunk.forms == {"t0": "tokens", "t1": "tokens"}
    rows = FlatRows.of(_inputs()["attention_mask"])
    mask = _inputs()["attention_mask"]
    for task, output in (("t0", "logits"), ("t1", "start_logits")):
        entered: list[int] = []
        head = next(m for n, m in model.heads[task].named_modules() if n in HEADS)
        handle = head.register_forward_pre_hook(
            lambda *call, entered=entered: entered.append(call[1][0].numel())
        )
        found: list[dict[str, Tensor]] = []
        for named in (None, task):
            trunk.prepare(rows, task=named)
            model.zero_grad(set_to_none=True)
            logits = model(task, _inputs())[output][mask.bool()]
            ramp = torch.linspace(-1, 1, len(logits)).view(-1, *[1] * (logits.dim() - 1))
            (logits * ramp).sin().sum().backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append(grads | {"logits": logits.detach()})
        handle.remove()
        assert entered[1] * mask.numel() == entered[0] * int(mask.sum())
        assert found[0].keys() == found[1].keys()
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=2e-6, msg=key)


def test_after_a_step_the_model_is_as_transformers_made_it() -> None:
    model, trunk, _ = _trunk("bert", heads=(LABELLER,), per_token=("t0",))
    plain = model("t0", _inputs())["logits"]
    trunk.prepare(FlatRows.of(_inputs()["attention_mask"]), task="t0")
    assert not torch.equal(model("t0", _inputs())["logits"][0], plain[1])
    trunk.prepare(None)
    assert torch.equal(model("t0", _inputs())["logits"], plain)


class _Neighbours(torch.nn.Linear):
    """Reads each token together with the next one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + super().forward(input.roll(-1, dims=1))


_Neighbours.__module__ = "torch.nn.neighbours"


def test_a_head_that_reads_neighbours_gets_padded_rows() -> None:
    config: Any = tiny_config("bert")
    model, trunk = _found(config, kinds=(LABELLER,))
    model.heads["t0"].classifier = _Neighbours(config.hidden_size, 2)
    trunk.fit_to_heads(model, per_token=("t0",))
    assert not trunk.forms


class _Pooler(torch.nn.Module):
    """Reads the first token, and all of them as far as a gate is open."""

    def __init__(self, gate: float, module: str) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.tensor(gate))
        type(self).__module__ = module

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, 0] + self.gate * hidden_states.mean(1)


# The gradient shows an open gate; of a closed one, as it is not from a library that is known.
@pytest.mark.parametrize(("gate", "module"), [(1.0, "torch.nn.pooler"), (0.0, "mine")])
def test_a_head_that_reads_or_may_read_all_tokens_is_found_out(gate: float, module: str) -> None:
    model, trunk = _found(tiny_config("bert"))
    backbone: Any = model.backbone
    backbone.pooler = _Pooler(gate, module)
    trunk.fit_to_heads(model)
    assert not trunk.forms


def test_a_task_whose_outputs_show_hidden_states_is_not_let_in() -> None:
    config: Any = tiny_config("bert")
    config.output_hidden_states = True
    model, trunk = _found(config)
    trunk.fit_to_heads(model)
    assert not trunk.forms


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    q, k, v = (torch.randn(2, 5, 4) for _ in range(3))
    v[:, 0] = float("nan")
    out = attend_from_first(q, k, v, lengths=torch.tensor([3, 2]))
    assert out[0].isnan().all()
    assert out[3].isfinite().all()


def test_the_model_is_left_as_it_was() -> None:
    model, trunk, _ = _trunk("bert")
    config: Any = model.backbone.config
    assert trunk.last is not None
    assert trunk.last.rows is None
    assert config._attn_implementation != "dist_ft_unpadded"
    assert not any(p.grad is not None for p in model.parameters())
    assert not model.training


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_first_tokens_get_what_they_would_get(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(sum(lengths))
    leaves = [torch.randn(2, sum(lengths), 4, dtype=dtype) for _ in range(3)]
    rows = RowRuns.of(lengths)
    firsts = rows.lengths.cumsum(0) - rows.lengths
    upper = torch.randn(len(lengths), 2, 4, dtype=dtype)
    found: list[list[Tensor]] = []
    for narrow in (False, True):
        q, k, v = (t.clone().requires_grad_() for t in leaves)
        out = (
            attend_from_first(q, k, v, lengths=rows.lengths, scale=0.7)
            if narrow
            else attend(q, k, v, rows=rows.groups, scale=0.7)
        )
        assert not narrow or out.count_nonzero() <= out[firsts].numel()
        (out[firsts] * upper).sum().backward()
        found.append([out[firsts].detach(), *(t.grad for t in (q, k, v) if t.grad is not None)])
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_dropped_probabilities_are_those_of_the_gradient() -> None:
    q, k, v = (torch.randn(2, 9, 4, dtype=torch.float64).requires_grad_() for _ in range(3))

    def run(*leaves: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask each time
        return attend_from_first(*leaves, lengths=torch.tensor([4, 2, 3]), dropout=0.4)

    assert torch.autograd.gradcheck(run, (q, k, v))
