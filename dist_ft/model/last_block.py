"""The last block of an encoder, run for the tokens that a head reads only.

A classifier on BERT and its kin reads the first token of each row. Of the last block all that the
other tokens have to give is their keys and values; their queries, the attention they pay, and the
sublayers behind it are computed for nobody, forward and backward: five sixths of the block's matrix
products. Where the blocks below are frozen and cached, that is most of a step.

Four hooks cut those tokens off, and the forward of the transformers class runs unchanged: the query
projection gets the first tokens (and its output is put back among zeros, as models reshape it), the
attention answers these queries, and the sublayer behind the attention gets the first tokens of what
attention returns and of what is added to it. What the head sees of other tokens is zero.

`find` looks for a block of that form; which tasks' heads read first tokens only,
`dist_ft.model.head_inputs` says.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_ft.model.flat_rows import FlatRows

# What the projection of queries is called in attention modules.
_QUERIES = ("query", "q_proj", "q_lin", "q")
# The sublayer behind the attention, which adds what went into the block.
_ARGUMENTS = ["hidden_states", "input_tensor"]


@dataclass
class LastBlock:
    """The last block of a trunk, in the form that BERT gave it.

    Attributes:
        block: the block.
        query: its projection of queries.
        sublayer: what follows its attention, called with hidden states and what is added to them.
        rows: the micro-batch that runs so; None runs the block as transformers made it.
    """

    block: nn.Module
    query: nn.Module
    sublayer: nn.Module
    rows: FlatRows | None = None

    @classmethod
    def find(cls, block: nn.Module) -> LastBlock | None:
        """Return `block` with its hooks in place, which do nothing yet; None for other forms."""
        queries = [m for n, m in block.named_modules() if n.rpartition(".")[2] in _QUERIES]
        sublayers = [m for m in block.modules() if _takes_both(m)]
        if len(queries) != 1 or not sublayers:
            return None
        found = cls(block, queries[0], sublayers[0])
        found.query.register_forward_pre_hook(found._select)
        found.query.register_forward_hook(found._put_back)
        found.sublayer.register_forward_pre_hook(found._select)
        for module in block.modules():
            vars(module)["last_block"] = found  # where the attention finds it
        return found

    def _select(self, module: nn.Module, args: Any) -> Any:
        del module
        if self.rows is None:
            return None
        return tuple(self.rows.pick_firsts(a) for a in args)

    def _put_back(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        del module, args
        if self.rows is None:
            return None
        everywhere = output.new_zeros(1, self.rows.tokens, output.shape[2])
        return everywhere.index_copy(1, self.rows.firsts, output)


def _takes_both(module: nn.Module) -> bool:
    return list(inspect.signature(module.forward).parameters) == _ARGUMENTS
