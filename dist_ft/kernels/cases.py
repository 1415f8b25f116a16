"""Operations of the table on inputs of given sizes, by each implementation and by plain torch.

One definition serves the self-tests at the start of a run, ``dist-ft kernels check`` and
``benchmarks/kernels.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_ft.kernels import cpu_dropout, unpadded_attention
from dist_ft.kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    linear_cross_entropy,
    reference_linear_cross_entropy,
)

Shapes = Mapping[str, tuple[int, ...]]


class Case(Protocol):
    """An operation on inputs of one size."""

    @property
    def size(self) -> str:
        """The size in words."""
        ...

    @property
    def shapes(self) -> Shapes:
        """Shapes of the tensors that get a gradient, by name."""
        ...

    @property
    def spread(self) -> float:
        """Standard deviation of the values of those tensors."""
        ...

    def run(self, implementation: str, *given: Tensor) -> Tensor:
        """Return what an implementation of the table makes of tensors of these shapes."""
        ...

    def eager(self, *given: Tensor) -> Tensor:
        """Return what transformers would compute instead, to be timed."""
        ...

    def reference(self, *given: Tensor) -> Tensor:
        """Return what is right, by plain torch in the type of the tensors."""
        ...


@dataclass(frozen=True)
class AttentionCase:
    """Attention of rows of these lengths, each to itself; plain torch pads them.

    Attributes:
        lengths: tokens of each row.
        heads: of the queries.
        key_heads: of keys and values.
        head_size: values of a head.
        causal: whether a token sees those before it only.
        dropout: share of the weights that are dropped, each time others; for timing alone.
    """

    lengths: tuple[int, ...]
    heads: int
    head_size: int
    key_heads: int
    causal: bool = False
    dropout: float = 0.0

    @property
    def size(self) -> str:
        """The size in words."""
        kind = "causal, " if self.causal else ""
        heads = f"{self.heads}" + (f":{self.key_heads}" if self.key_heads != self.heads else "")
        return (
            f"{kind}{len(self.lengths)} rows, {sum(self.lengths)} tokens, {heads} heads of "
            f"{self.head_size}" + (f", dropout {self.dropout}" if self.dropout else "")
        )

    @property
    def rows(self) -> unpadded_attention.RowRuns:
        """The rows, neighbours of one length taken together."""
        return unpadded_attention.RowRuns.of(self.lengths)

    @property
    def shapes(self) -> Shapes:
        """Shapes of the flat queries, keys and values."""
        tokens = sum(self.lengths)
        few = (1, self.key_heads, tokens, self.head_size)
        return {"query": (1, self.heads, tokens, self.head_size), "key": few, "value": few}

    @property
    def spread(self) -> float:
        """Scores are then of about 1."""
        return 1.0

    def run(self, implementation: str, *given: Tensor) -> Tensor:
        """Return [1, tokens, heads, head size] by ``flash_varlen`` or ``by_run``."""
        flash = implementation == "flash_varlen"
        source = SimpleNamespace(rows=SimpleNamespace(runs=self.rows), flash=flash)
        module: Any = SimpleNamespace(row_source=source, is_causal=self.causal)
        query, key, value = given
        return unpadded_attention.unpadded_attention(
            module, query, key, value, None, dropout=self.dropout
        )[0]

    def torch_by_run(self, *given: Tensor) -> Tensor:
        """Return the same by torch's attention for each run of rows of one length."""
        options = {"dropout_p": self.dropout, "is_causal": self.causal}
        query, key, value = given
        return unpadded_attention.torch_by_run(
            query, key, value, self.rows, bias=None, options=options
        )

    def eager(self, *given: Tensor) -> Tensor:
        """Return the same from rows that are padded to the longest, with a mask."""
        longest = max(self.lengths)
        at = torch.arange(longest, device=given[0].device)
        there = at < torch.tensor(self.lengths, device=given[0].device)[:, None]
        mask = there[:, None, None]
        if self.causal:
            mask = mask & (at <= at[:, None])
        padded = [_padded(t[0].transpose(0, 1), there) for t in given]
        out = F.scaled_dot_product_attention(
            *padded,
            attn_mask=mask,
            dropout_p=self.dropout,
            enable_gqa=self.heads != self.key_heads,
        )
        return out.transpose(1, 2)[there][None]

    def reference(self, *given: Tensor) -> Tensor:
        """Return the same as `eager`."""
        return self.eager(*given)


def _padded(flat: Tensor, there: Tensor) -> Tensor:
    """Return [tokens, heads, head size] as [rows, heads, longest, head size]."""
    full = flat.new_zeros(*there.shape, *flat.shape[1:])
    return full.masked_scatter(there[..., None, None], flat).transpose(1, 2)


@dataclass(frozen=True)
class ScoringCase:
    """A linear layer and the cross-entropy of its outputs, every seventh row without a label.

    Attributes:
        rows: tokens.
        width: hidden size.
        classes: size of the vocabulary.
        label_smoothing: share of the target that all classes get alike.
    """

    rows: int
    width: int
    classes: int
    label_smoothing: float = 0.0

    @property
    def size(self) -> str:
        """The size in words."""
        return f"{self.rows} tokens, hidden {self.width}, vocabulary {self.classes}"

    @property
    def shapes(self) -> Shapes:
        """Shapes of the hidden states and the weights."""
        return {"hidden": (self.rows, self.width), "weight": (self.classes, self.width)}

    @property
    def spread(self) -> float:
        """Logits are then of about 2, as a model's.

        Those of wider ones leave probabilities that fp32 can hardly hold, and a CPU takes ten times
        as long to multiply them.
        """
        return (2 / self.width**0.5) ** 0.5

    def labels(self, device: torch.device) -> Tensor:
        """Return the labels, int64 [rows]."""
        labels = 31 * torch.arange(self.rows, device=device) % self.classes
        labels[::7] = IGNORE_INDEX
        return labels

    def run(self, implementation: str, *given: Tensor) -> Tensor:
        """Return the mean loss by ``chunked``."""
        del implementation
        labels = self.labels(given[0].device)
        total = linear_cross_entropy(
            given[0], given[1], labels, label_smoothing=self.label_smoothing
        )
        return total / self.rows

    def eager(self, *given: Tensor) -> Tensor:
        """Return the mean loss from whole logits."""
        labels = self.labels(given[0].device)
        total = reference_linear_cross_entropy(
            given[0], given[1], labels, label_smoothing=self.label_smoothing
        )
        return total / self.rows

    def reference(self, *given: Tensor) -> Tensor:
        """Return the same as `eager`."""
        return self.eager(*given)


@dataclass(frozen=True)
class NormCase:
    """Dropout, residual sum and layer normalisation.

    Attributes:
        rows: tokens.
        width: hidden size.
        p: probability of a value to be dropped.
    """

    rows: int
    width: int
    p: float
    eps: float = 1e-5

    @property
    def size(self) -> str:
        """The size in words."""
        return f"{self.rows} tokens, hidden {self.width}, dropout {self.p}"

    @property
    def shapes(self) -> Shapes:
        """Shapes of hidden states, residual, weights and bias."""
        whole, row = (self.rows, self.width), (self.width,)
        return {"hidden": whole, "residual": whole, "weight": row, "bias": row}

    @property
    def spread(self) -> float:
        """Hidden states are of about 1."""
        return 1.0

    def run(self, implementation: str, *given: Tensor) -> Tensor:
        """Return [rows, width] by ``triton``; the mask is the same each time."""
        del implementation
        from dist_ft.kernels.triton_dropout_norm import dropout_residual_norm

        hidden, residual, weight, bias = given
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return dropout_residual_norm(hidden, residual, weight, bias, p=self.p, eps=self.eps)

    def eager(self, *given: Tensor) -> Tensor:
        """Return the same with torch's operations, whose dropout draws another mask."""
        from dist_ft.kernels.dropout_norm import reference_dropout_residual_norm

        hidden, residual, weight, bias = given
        return reference_dropout_residual_norm(
            hidden, residual, weight, bias, p=self.p, eps=self.eps
        )

    def reference(self, *given: Tensor) -> Tensor:
        """Return the same as `run` with torch's operations, under the kernels' mask."""
        from dist_ft.kernels.triton_dropout_norm import draw_seed, keep_mask

        hidden, residual, weight, bias = given
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seed = draw_seed(self.p)
        kept = keep_mask(self.rows, self.width, p=self.p, seed=seed, device=hidden.device)
        dropped = hidden * kept.to(hidden.dtype) / (1 - self.p)
        return F.layer_norm(dropped + residual, (self.width,), weight, bias, self.eps)


@dataclass(frozen=True)
class DropoutCase:
    """Dropout alone.

    Attributes:
        rows: tokens.
        width: hidden size.
        p: probability of a value to be dropped.
        seed: of the mask; None draws another each time and is for timing alone.
    """

    rows: int
    width: int
    p: float
    seed: int | None = 0

    @property
    def size(self) -> str:
        """The size in words."""
        return f"{self.rows} tokens, hidden {self.width}, dropout {self.p}"

    @property
    def shapes(self) -> Shapes:
        """Shape of the hidden states."""
        return {"hidden": (self.rows, self.width)}

    @property
    def spread(self) -> float:
        """Hidden states are of about 1."""
        return 1.0

    def run(self, implementation: str, *given: Tensor) -> Tensor:
        """Return [rows, width] by ``by_byte``."""
        del implementation
        if self.seed is None:
            return cpu_dropout.dropout(given[0], p=self.p)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return cpu_dropout.dropout(given[0], p=self.p)

    def eager(self, *given: Tensor) -> Tensor:
        """Return the same by torch, which draws another mask."""
        return F.dropout(given[0], self.p)

    def reference(self, *given: Tensor) -> Tensor:
        """Return the same as `run` with a seed by torch's operations, under the same mask."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed or 0)
            kept = cpu_dropout.keep_mask((self.rows, self.width), dropout=self.p)
        return given[0] * kept.to(given[0]) / (1 - self.p)


def inputs(case: Case, *, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return normal numbers for a case, the same on every device, that want gradients."""
    shapes: Sequence[tuple[int, ...]] = tuple(case.shapes.values())
    return [
        (case.spread * random(*shape, seed=seed)).to(device, dtype).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]


def random(*shape: int, seed: int) -> Tensor:
    """Return normal numbers, float32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
