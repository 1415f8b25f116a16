"""Attention over rows that follow each other without padding.

transformers' attention interface hands a model's queries, keys and values to one function. Given a
flat stream of rows, this one lets every token attend to its own row only, so the blocks of a model
need not be touched to run without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from dist_ft.kernels.cpu_attention import attend
from dist_ft.kernels.first_token_attention import attend_from_first
from dist_ft.kernels.row_groups import RowGroups

IMPLEMENTATION = "dist_ft_unpadded"

# Arguments of transformers' attention functions that change nothing here.
_IGNORED = {
    "is_causal", "position_ids", "position_embeddings", "cache_position",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache", "deterministic",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "token_type_ids",
}  # fmt: skip


@dataclass
class RowRuns:
    """Rows of a flat stream, neighbours of one length taken together.

    Attributes:
        runs: (rows, tokens of each) of each run, in the order of the stream.
    """

    runs: tuple[tuple[int, int], ...]
    _cu_seqlens: dict[torch.device, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> RowRuns:
        """Return the runs of rows of these lengths."""
        runs: list[tuple[int, int]] = []
        for length in lengths:
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        return cls(tuple(runs))

    @cached_property
    def groups(self) -> RowGroups:
        """The rows, those of near lengths to be taken together."""
        return RowGroups(tuple(n for rows, n in self.runs for _ in range(rows)))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(length for _, length in self.runs)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int64 [rows] on the CPU."""
        return torch.tensor(self.groups.lengths)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Return the first token of each row, then the number of tokens, int32 [rows + 1]."""
        if device not in self._cu_seqlens:
            ends = F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
            self._cu_seqlens[device] = ends.to(device, non_blocking=True)
        return self._cu_seqlens[device]


def register() -> None:
    """Make the implementation known to transformers under `IMPLEMENTATION`."""
    AttentionInterface.register(IMPLEMENTATION, unpadded_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Return nothing: a row's end is known from its length."""
    del args, kwargs


def unpadded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention of each row of a flat stream to itself.

    The rows are found in ``module.row_source.rows``, which who runs the model has put there, and in
    ``module.row_source.flash`` whether torch's variable-length flash attention runs them. A module
    of a `last_block` that runs for first tokens only is asked for nothing else.

    Args:
        module: the attention module of the model.
        query: [1, heads, tokens, head size].
        key: [1, key heads, tokens, head size]; key heads divide heads.
        value: [1, key heads, tokens, head size].
        attention_mask: must be None.
        scaling: factor of the scores; by default 1 / sqrt(head size).
        dropout: share of attention weights that are dropped.
        position_bias: added to the scores of each row, [1, heads, longest, longest] with the
            longest row's length; a shorter row gets its upper left corner.
        kwargs: what else transformers passes; a truth value of its own for `is_causal`.

    Returns:
        [1, tokens, heads, head size], and None for the weights.

    Raises:
        ValueError: the model wants something that is not supported, naming it.
    """
    source: Any = module.row_source
    rows: RowRuns = source.rows.runs
    if (kwargs.get("sliding_window") or rows.longest) >= rows.longest:
        kwargs.pop("sliding_window", None)  # every token sees its whole row
    wanted = sorted(k for k, v in kwargs.items() if v is not None and k not in _IGNORED)
    if attention_mask is not None or wanted:
        raise ValueError(
            f"{type(module).__name__} passes {wanted or 'a mask'} to its attention, which rows "
            "without padding do not support: set model.padding: padded"
        )
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
    if position_bias is not None and (causal or position_bias.shape[-1] < rows.longest):
        raise ValueError(
            f"{type(module).__name__} has a position bias of shape {tuple(position_bias.shape)}"
            f" for rows of {rows.longest} tokens{', and is causal' if causal else ''}, which "
            "rows without padding do not support: set model.padding: padded"
        )
    # Neither is expected, as `flash` would be False; but neither may be left out silently.
    if source.flash and position_bias is None and dropout == 0.0:
        return _flash(query, key, value, rows=rows, scaling=scaling, causal=causal), None
    if query.device.type == "cpu" and position_bias is None:
        q, k, v = query[0], key[0], value[0]
        last: Any = getattr(module, "last_block", None)
        if last is not None and last.rows is not None and not causal and len(q) == len(k):
            out = attend_from_first(q, k, v, lengths=rows.lengths, scale=scaling, dropout=dropout)
            return out[None], None
        out = attend(q, k, v, rows=rows.groups, scale=scaling, dropout=dropout, causal=causal)
        return out[None], None
    options = {"scale": scaling, "dropout_p": dropout, "is_causal": causal}
    return torch_by_run(query, key, value, rows, bias=position_bias, options=options), None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, rows: RowRuns, scaling: float | None, causal: bool
) -> Tensor:
    """Run torch's variable-length flash attention (no dropout, GPUs only)."""
    ends = rows.cu_seqlens(query.device)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = varlen_attn(
        q, k, v, ends, ends, rows.longest, rows.longest, scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


def torch_by_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: RowRuns,
    *,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Run torch's dense attention for each run of rows of one length; see `unpadded_attention`.

    Args:
        query: [1, heads, tokens, head size].
        key: [1, key heads, tokens, head size].
        value: as the key.
        rows: the rows.
        bias: added to the scores, [1, heads, longest, longest]; None for none.
        options: further arguments of `scaled_dot_product_attention`.
    """
    sizes = [count * length for count, length in rows.runs]
    # `split` and not slices: its backward concatenates, theirs would fill a whole tensor each.
    parts = zip(*(t[0].split(sizes, dim=1) for t in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    # torch's flash attention for CPUs is slower than the plain one for rows of fine-tuning's
    # lengths, and does not drop attention weights.
    with sdpa_kernel(SDPBackend.MATH) if query.device.type == "cpu" else nullcontext():
        for (count, length), part in zip(rows.runs, parts, strict=True):
            q, k, v = (t.unflatten(1, (count, length)).transpose(0, 1) for t in part)
            out = F.scaled_dot_product_attention(
                q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options,
                attn_mask=None if bias is None else bias[:, :, :length, :length].to(q.dtype),
            )  # fmt: skip
            outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]
