"""The trunk: a model's main stack of blocks, run without padding and from any block on.

Two things happen between the embeddings and the heads, for any transformers model whose blocks take
and return hidden states:

- Padding is dropped before the first block and put back after the last one. Embeddings, heads and
  losses see padded tensors as always; the blocks, where the work is, see tokens only.
- The blocks below a boundary are left out, and what they would return is given instead: the frozen
  prefix has been computed before.

Both are done by hooks and stand-ins, so that the forward of the transformers class runs unchanged.
`check` compares each with the plain forward before it is used, as nothing else could say for any
architecture that it is right.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.kernels import unpadded_attention
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.flat_rows import FlatRows
from dist_ft.model.head_inputs import Form, laid_out, pad_outputs, reads_only
from dist_ft.model.last_block import LastBlock
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.model.probe import MISFITS, SAME, rows_of_many_lengths, undisturbed
from dist_ft.model.relative_positions import handed_on, limit_length, modules_with_bias
from dist_ft.model.stacks import group_modules
from dist_ft.model.stand_ins import NoEmbedding, Places, SkippedBlock


@dataclass
class Trunk:
    """The blocks of a model, or of the encoder of an encoder-decoder, bottom to top.

    Attributes:
        whole: the backbone.
        root: the part of it whose forward runs embeddings and blocks.
        blocks: the blocks.
        group_names: names of the blocks' layer groups.
        embeddings: modules below the first block that hold parameters.
        widths: the size of the hidden states that those return which return any.
        width: size of the hidden states between blocks, known after `check`.
        flat: whether the blocks run without padding.
        flash: whether their attention then is torch's variable-length flash attention.
        still: whether dropout between the embeddings and the first block is off: they are frozen,
            and what they return is to be the same each time.
        rows: the micro-batch that runs, or ran last: its backward may run blocks again.
        forms: what the heads of tasks get of the last block's output, if not all of it.
        last: the last block, if it can run for the tokens that heads read only.
        may_narrow: whether it does.
    """

    whole: nn.Module
    root: nn.Module
    blocks: tuple[nn.Module, ...]
    group_names: tuple[str, ...]
    embeddings: tuple[nn.Module, ...]
    widths: dict[nn.Module, int] = field(default_factory=dict)
    width: int = 0
    flat: bool = False
    flash: bool = False
    still: bool = False
    rows: FlatRows | None = None
    forms: dict[str, Form] = field(default_factory=dict)
    last: LastBlock | None = None
    may_narrow: bool = True
    captured: dict[int, Tensor] = field(default_factory=dict)
    _form: Form = "padded"
    _capture: frozenset[int] = frozenset()
    _others: tuple[Any, ...] | None = None
    _held: list[nn.Module] = field(default_factory=list)
    _places: Places = field(init=False)
    _skips: dict[nn.Module, SkippedBlock] = field(default_factory=dict)
    _empty: dict[nn.Module, NoEmbedding] = field(default_factory=dict)
    _attention: dict[int, tuple[Any, str | None]] = field(default_factory=dict)

    @classmethod
    def find(cls, model: MultiTaskModel, *, groups: Sequence[LayerGroup]) -> Trunk:
        """Return the trunk of `model` with its hooks in place; they do nothing yet.

        Raises:
            ValueError: the blocks are not modules of one list, each used for one layer group.
        """
        blocks = [g for g in groups if g.kind == "block"]
        stack = blocks[0].name.rpartition(".")[0].rpartition(".")[0] if blocks else ""
        blocks = [g for g in blocks if g.name.rpartition(".")[0].rpartition(".")[0] == stack]
        found = [group_modules(model, g.parameters) for g in blocks]
        if not blocks or any(len(modules) != 1 for modules in found):
            raise ValueError("its blocks are not one module each")
        below = groups[: groups.index(blocks[0])]
        paths = {module: path for path, module in model.named_modules()}
        modules = tuple(modules[0] for modules in found)
        root = _root(model, path=paths[modules[0]], stack=stack)
        embeddings = [m for g in below for m in group_modules(model, g.parameters)]
        trunk = cls(model.backbone, root, modules, tuple(g.name for g in blocks), tuple(embeddings))
        trunk._install()
        return trunk

    def _install(self) -> None:
        unpadded_attention.register()
        self.root.register_forward_pre_hook(self._hold)
        self._places = Places(self.root)
        self._skips = {block: SkippedBlock(block) for block in self.blocks}
        for index, block in enumerate(self.blocks):
            for module in modules_with_bias(block):
                limit_length(module, self._longest)
            block.register_forward_pre_hook(self._before_block(index), with_kwargs=True)
            block.register_forward_hook(self._after_block(index))
            for module in block.modules():
                vars(module)["row_source"] = self
        for config in self._own_configs():
            self._attention[id(config)] = (config, config._attn_implementation)

    def _own_configs(self) -> list[Any]:
        """Return the configurations that say which attention runs, none of them used elsewhere.

        The encoder and decoder of some models read one object: the encoder then gets a copy.
        """
        inside = set(self.root.modules())
        outside = {
            id(getattr(m, "config", None))
            for m in self.whole.modules()
            if m is not self.whole and m not in inside
        }
        found: dict[int, Any] = {}
        for module in inside:
            config: Any = getattr(module, "config", None)
            if config is None or not hasattr(config, "_attn_implementation"):
                continue
            if id(config) not in found:
                found[id(config)] = copy.copy(config) if id(config) in outside else config
            vars(module)["config"] = found[id(config)]
        return list(found.values())

    def _longest(self) -> int | None:
        return self.rows.runs.longest if self.flat and self.rows is not None else None

    def _hold(self, module: nn.Module, args: Any) -> None:
        """Switch off what the root itself drops, until the first block begins."""
        del args
        if self.still:
            # T5 drops by one module below and above its blocks, BART by a function.
            own = [module, *(m for m in module.children() if isinstance(m, nn.Dropout))]
            self._held = [m for m in own if m.training]
            for m in self._held:
                m.training = False

    def _release(self) -> None:
        for m in self._held:
            m.training = True
        self._held = []

    def _before_block(self, index: int) -> Any:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            del module
            self._release()
            if not self.flat or self.rows is None:
                return None
            known = self.rows.flatten_known
            # Flat hidden states of a few rows may be as long as all rows are wide.
            flat = (args[0] if args else kwargs.get("hidden_states")) if index else None
            new = {k: v if v is flat else known(v) for k, v in kwargs.items()}
            return tuple(v if v is flat else known(v) for v in args), new

        return before

    def _after_block(self, index: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            del module, args
            # What blocks return besides is None where they are left out.
            hidden: Any = output
            self._others = None
            if isinstance(output, tuple):
                hidden, self._others = output[0], (None,) * (len(output) - 1)
            if index + 1 in self._capture:
                self.captured[index + 1] = self._flattened(hidden)
            if not self.flat or self.rows is None or index + 1 < len(self.blocks):
                return None
            is_narrow = self.last is not None and self.last.rows is not None
            given = laid_out(hidden, self.rows, form=self._form, is_narrow=is_narrow)
            return given if self._others is None else (given, *output[1:])

        return after

    def _flattened(self, hidden: Tensor) -> Tensor:
        assert self.rows is not None
        return (hidden if self.flat else self.rows.flatten(hidden))[0].detach()

    def prepare(self, rows: FlatRows | None, *, task: str | None = None) -> None:
        """Say which micro-batch runs next; without one, the model runs as transformers made it.

        Args:
            rows: its rows.
            task: whose head runs on it; None where something else looks at hidden states.
        """
        self.rows = rows
        forms = self.forms if rows is not None and self.flat else {}
        self._form = forms.get(task or "", "padded")
        if self.last is not None:
            self.last.rows = rows if self._form == "firsts" and self.may_narrow else None
        chosen = unpadded_attention.IMPLEMENTATION if self.flat and rows is not None else None
        for config, own in self._attention.values():
            if config._attn_implementation != (chosen or own):
                config._attn_implementation = chosen or own

    @contextmanager
    def starting_at(self, boundary: int, hidden: Tensor) -> Iterator[None]:
        """Leave out the embeddings and the blocks below `boundary` inside the context.

        Args:
            boundary: the first block to run; the number of blocks for none.
            hidden: what enters it, [tokens, hidden size] of the rows of `prepare`.
        """
        assert self.rows is not None
        assert boundary > 0
        given = hidden[None]
        if boundary == len(self.blocks):
            given = laid_out(given, self.rows, form=self._form)
        elif not self.flat:
            given = self.rows.pad(given)

        def begin(hidden: Tensor) -> Tensor:
            del hidden
            self._release()
            return given

        stand_ins = self._skipped(self.blocks[:boundary], change=begin)
        for module, width in self.widths.items():
            if module not in self._empty:
                self._empty[module] = NoEmbedding(module, width=width)
            stand_ins[module] = self._empty[module].set(like=given)
        with self._places.swapped(stand_ins):
            yield

    def left_out(self, boundary: int) -> list[nn.Module]:
        """Return the modules that a forward from `boundary` on does not use in any way."""
        # The lowest block still makes the position bias that it hands on.
        lowest = 1 if modules_with_bias(self.blocks[0]) else 0
        return [*self.widths, *self.blocks[lowest:boundary]]

    @torch.no_grad()
    def prefix(
        self, inputs: Mapping[str, Tensor], *, rows: FlatRows, boundaries: Sequence[int]
    ) -> dict[int, Tensor]:
        """Return the hidden states that enter blocks, computed from the embeddings on.

        Args:
            inputs: of the micro-batch, as the model takes them.
            rows: its rows.
            boundaries: the blocks; only those below the highest are run.

        Returns:
            For each boundary [tokens, hidden size], detached.
        """
        stand_ins = self._skipped(
            self.blocks[max(boundaries) :], change=rows.pad if self.flat else None
        )
        self.prepare(rows)
        self._capture, self.captured = frozenset(boundaries), {}
        try:
            with self._places.swapped(stand_ins):
                self._run_root(inputs)
            return self.captured
        finally:
            self._capture, self.captured = frozenset(), {}

    def _skipped(
        self, blocks: Sequence[nn.Module], *, change: Callable[[Tensor], Tensor] | None
    ) -> dict[nn.Module, nn.Module]:
        """Return stand-ins for neighbouring blocks, the last of which changes what it gets."""
        last = len(blocks) - 1
        others = self._biases_of(blocks[0]) if blocks else None
        return {
            block: self._skips[block].set(others=others, change=change if i == last else None)
            for i, block in enumerate(blocks)
        }

    def _biases_of(self, first: nn.Module) -> tuple[Any, ...] | None:
        """Return what blocks that are left out, the lowest of them `first`, hand on."""
        if self._others is None or first is not self.blocks[0]:
            return self._others
        assert self.rows is not None
        biases = handed_on(first, length=self.rows.shape[1])
        return (*biases, *self._others[len(biases) :])

    def _run_root(self, inputs: Mapping[str, Tensor]) -> Any:
        # A head's own inputs, such as labels, are none of the root's.
        takes = inspect.signature(self.root.forward).parameters
        return self.root(**{n: v for n, v in inputs.items() if n in takes})

    @torch.no_grad()
    def check(self) -> dict[str, str]:
        """Compare running without padding and from a boundary with the plain forward.

        The model must be in full precision and not yet partitioned; it is left as it was, and runs
        with padding until `flat` is set.

        Returns:
            Under ``unpadded`` and ``boundary`` the reason why this model can't be run so; a key is
            absent if it can.
        """
        problems: dict[str, str] = {}
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self.root))
            stack.callback(self.prepare, None)
            stack.callback(setattr, self, "flat", False)
            inputs = rows_of_many_lengths(self.root)
            rows = FlatRows.of(inputs["attention_mask"].cpu(), device=inputs["input_ids"].device)
            for what, compare in (("unpadded", self._unpadded), ("boundary", self._from_middle)):
                if what in problems:
                    continue
                try:
                    self.prepare(None)
                    self.flat = False
                    plain = rows.flatten(self._run_root(inputs)[0])
                    self.flat = what == "unpadded" or "unpadded" not in problems
                    error = compare(inputs, rows) - plain
                    share = float(error.abs().max() / plain.abs().max())
                    if not share < SAME:
                        problems[what] = f"its hidden states differ by {share:.1e}"
                except MISFITS as error:
                    text = str(error).strip().splitlines() or [type(error).__name__]
                    problems[what] = text[0]
        return problems

    def fit_to_heads(self, model: MultiTaskModel, *, per_token: Collection[str] = ()) -> None:
        """Give heads no more of the last block's output than they read, and compute no more.

        The model must be in full precision and not yet partitioned, and run without padding.

        Args:
            model: the model.
            per_token: tasks whose losses look at nothing but the model's outputs.
        """
        self.last = LastBlock.find(self.blocks[-1])
        model.register_forward_hook(self._pad_outputs)
        with undisturbed(model):
            inputs = rows_of_many_lengths(self.root)
            for task in model.tasks:
                forms: tuple[Form, ...] = ("firsts", "tokens") if task in per_token else ("firsts",)
                for form in forms:
                    if reads_only(form, model, task, inputs=inputs, trunk=self):
                        self.forms[task] = form
                        break

    def _pad_outputs(self, module: nn.Module, args: Any, outputs: Any) -> None:
        del module, args
        if self._form == "tokens" and self.rows is not None:
            pad_outputs(outputs, self.rows)

    def _unpadded(self, inputs: Mapping[str, Tensor], rows: FlatRows) -> Tensor:
        self.prepare(rows)
        return rows.flatten(self._run_root(inputs)[0])

    def _from_middle(self, inputs: Mapping[str, Tensor], rows: FlatRows) -> Tensor:
        with ExitStack() as stack:
            for module in self.embeddings:
                stack.callback(module.register_forward_hook(self._learn_width).remove)
            boundary = max(1, len(self.blocks) // 2)
            hidden = self.prefix(inputs, rows=rows, boundaries=[boundary])[boundary]
        self.width = hidden.shape[1]
        self.prepare(rows)
        with self.starting_at(boundary, hidden):
            return rows.flatten(self._run_root(inputs)[0])

    def _learn_width(self, module: nn.Module, args: Any, output: Any) -> None:
        del args
        # What returns something else, such as places for all rows at once, is simply run.
        if isinstance(output, Tensor) and output.dim() == 3:
            self.widths[module] = output.shape[2]


def _root(model: MultiTaskModel, *, path: str, stack: str) -> nn.Module:
    parts = path.split(".")
    return model.get_submodule(".".join(parts[: parts.index(stack) + 1] if stack else parts[:1]))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
