"""The shape of a recipe's model, read from its configuration on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig

from dist_ft.config import Recipe, TaskConfig
from dist_ft.engine.base import DTYPES
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.model.dropout_modules import find_dropouts, use_byte_dropout
from dist_ft.model.layer_groups import LayerGroup, find_layer_groups
from dist_ft.model.lora import LoraSettings, add_lora, fix_base
from dist_ft.model.probe import AnswersOnMeta
from dist_ft.model.sources import resolve_model_path
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.planning.fused import FusedKernels
from dist_ft.planning.known import KNOWN
from dist_ft.planning.shape import GroupShape, GroupWork, ModelShape, ParameterShape, TaskWork
from dist_ft.tasks import build_task
from dist_ft.train.regularization import penalty_rules

# Of a classification whose labels are only found in the data; they hardly weigh.
ASSUMED_LABELS = 8
_ATTENTION = ("bmm", "scaled_dot_product", "flash_attention", "baddbmm")


def read_shape(recipe: Recipe, *, on_gpu: bool) -> ModelShape:
    """Return the shape of the recipe's model with its tasks; no weight is loaded or made.

    Args:
        recipe: A loaded recipe.
        on_gpu: Whether kernels are those of a GPU (fused attention and dropout) or of a CPU.

    Raises:
        ValueError: If the model's configuration can't be read.
    """
    if any(t.takes != "text" for t in recipe.tasks):
        raise ValueError("tasks: only runs on text can be planned yet, not on images or audio")
    config, source = _config(recipe)
    attention = recipe.model.attention
    if attention == "auto":
        attention = "sdpa" if on_gpu else "eager"
    # flash_attention_2 keeps what fused attention keeps, and isn't needed to plan it.
    config._attn_implementation = "eager" if attention == "eager" else "sdpa"
    heads = [
        HeadSpec(t.name, _auto_class(t), {"num_labels": _labels(t)} if _labels(t) else {})
        for t in recipe.tasks
    ]
    dtype = DTYPES[recipe.engine.precision]
    lora = recipe.model.lora
    with torch.device("meta"):
        model = build_model(config, heads=heads, dtype=dtype, seed=recipe.seed)
        if lora is not None:
            add_lora(model, LoraSettings(**lora.model_dump()), seed=recipe.seed)
    if not on_gpu and recipe.kernels != "reference":
        use_byte_dropout(find_dropouts(model))  # keeps a fourth of what torch's keeps
    groups = find_layer_groups(model, overrides=recipe.freezing.layer_groups or None)
    if lora is not None:
        groups = fix_base(groups, auto_classes={h.name: h.auto_class for h in heads})
    modules = _modules_by_group(model, groups)
    tracer = _Tracer(model, groups, modules, on_gpu=on_gpu)
    return ModelShape(
        source=source,
        groups=_group_shapes(model, groups, recipe=recipe),
        work=tuple(_task_work(tracer, task, recipe=recipe) for task in recipe.tasks),
        checkpointable=_checkpointable(groups, modules),
    )


def _config(recipe: Recipe) -> tuple[PreTrainedConfig, str]:
    path = recipe.model.path
    if path in KNOWN and not Path(path).exists():
        values = dict(KNOWN[path])
        kind = values.pop("model_type")
        return (
            transformers.AutoConfig.for_model(kind, **values),
            f"{path}, from the table that comes with dist_ft",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            resolve_model_path(path),
            revision=recipe.model.revision or "main",
            trust_remote_code=recipe.model.trust_remote_code,
        )
    except OSError as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model.path: no configuration of {path!r} can be read ({first}): give a folder with "
            "its config.json by model.path=FOLDER"
        ) from None
    return config, f"{path}, its config.json"


def _auto_class(task: TaskConfig) -> str:
    return build_task(task.arguments()).auto_class


def _labels(task: TaskConfig) -> int:
    if task.type == "generation":
        return 0
    if task.type == "question_answering":
        return 2
    if task.type == "text_classification" and task.problem == "regression":
        return 1
    return len(task.labels or ()) or ASSUMED_LABELS


def _group_shapes(
    model: MultiTaskModel, groups: Sequence[LayerGroup], *, recipe: Recipe
) -> tuple[GroupShape, ...]:
    parameters = dict(model.named_parameters())
    regularized = build_param_groups(
        groups,
        dimensions={name: parameter.dim() for name, parameter in parameters.items()},
        rates=LearningRates(recipe.optim.lr),
        weight_decay=recipe.optim.weight_decay,
        penalties=penalty_rules(recipe, groups),
    )
    anchored = {n for g in regularized if g.needs_start for n in g.parameters}
    mixed = {n for g in regularized if g.mixout for n in g.parameters}
    return tuple(
        GroupShape(
            g.name,
            g.kind,
            g.tasks,
            tuple(
                ParameterShape(
                    n, parameters[n].numel(), decays=parameters[n].dim() > 1, fixed=n in g.fixed
                )
                for n in g.parameters
            ),
            anchored=frozenset(anchored.intersection(g.parameters)),
            mixed=frozenset(mixed.intersection(g.parameters)),
        )
        for g in groups
    )


def _modules_by_group(
    model: MultiTaskModel, groups: Sequence[LayerGroup]
) -> dict[str, list[nn.Module]]:
    """Return the largest modules whose parameters are all of one layer group, in one walk.

    A tied output matrix has its parameter in the embeddings, but runs at the top: it counts to the
    topmost group of the backbone.
    """
    owner = {name: g.name for g in groups for name in g.parameters}
    top = [g.name for g in groups if g.kind not in ("head", "unused")][-1]
    found: dict[str, list[nn.Module]] = {g.name: [] for g in groups}

    def visit(module: nn.Module, prefix: str) -> None:
        owners = {owner.get(name, top) for name, _ in module.named_parameters(prefix=prefix)}
        if len(owners) == 1:
            found[owners.pop()].append(module)
        elif owners:
            for name, child in module.named_children():
                visit(child, f"{prefix}.{name}" if prefix else name)

    visit(model, "")
    return found


def _checkpointable(
    groups: Sequence[LayerGroup], modules: Mapping[str, Sequence[nn.Module]]
) -> frozenset[str]:
    return frozenset(
        g.name
        for g in groups
        for module in modules[g.name]
        if g.kind == "block"
        and any(hasattr(layer, "gradient_checkpointing") for layer in module.modules())
    )


def _task_work(tracer: _Tracer, task: TaskConfig, *, recipe: Recipe) -> TaskWork:
    rows, length = recipe.train.micro_batch_size, task.max_length
    inputs = _inputs(task, rows=rows)
    mine = [g for g in tracer.groups if task.name in g.tasks]
    every = {n for g in mine for n in g.trained}
    trained = tracer.observe(task.name, inputs=inputs, trainable=every)
    # With the lowest group alone the gradient passes through all the others.
    passed = tracer.observe(
        task.name,
        inputs=inputs,
        trainable=set(next(g.trained for g in mine if g.trained)),
    )
    per_group = {
        g.name: GroupWork(
            saved_trained=trained.saved.get(g.name, 0),
            saved_passed=passed.saved.get(g.name, 0),
            entering=trained.entering.get(g.name, 0),
            weight_flops=trained.weight_flops.get(g.name, 0),
            attention_flops=trained.attention_flops.get(g.name, 0),
        )
        for g in mine
    }
    positions, classes = _loss_size(tracer.model, task, rows=rows)
    size = DTYPES[recipe.engine.precision].itemsize
    return TaskWork(
        task=task.name,
        rows=rows,
        tokens=rows * length,
        groups=per_group,
        outside=trained.saved.get("", 0),
        # The log-probabilities of labelled positions in fp32 stay for the backward; beside them
        # are, for a moment, the chosen logits, their fp32 copy and its gradient.
        loss_saved=4 * positions * classes,
        loss_working=(4 + 2 * size) * positions * classes,
    )


def _inputs(task: TaskConfig, *, rows: int) -> dict[str, Tensor]:
    def tokens(length: int) -> Tensor:
        return torch.zeros(rows, length, dtype=torch.int64, device="meta")

    inputs = {"input_ids": tokens(task.max_length), "attention_mask": tokens(task.max_length)}
    if task.type == "generation" and task.style == "seq2seq":
        inputs["decoder_input_ids"] = tokens(task.max_target_length)
    return inputs


def _loss_size(model: MultiTaskModel, task: TaskConfig, *, rows: int) -> tuple[int, int]:
    """Return the most labelled positions of a micro-batch and the classes of each."""
    if task.type == "generation":
        head: Any = model.heads[task.name]
        return rows * task.max_target_length, int(head.config.get_text_config().vocab_size)
    if task.type == "token_classification":
        return rows * task.max_length, _labels(task)
    if task.type == "question_answering":
        return 2 * rows, task.max_length
    return rows, _labels(task)


@dataclass
class _Seen:
    """What a forward showed, by layer group; "" is outside of all."""

    saved: dict[str, int] = field(default_factory=dict)
    entering: dict[str, int] = field(default_factory=dict)
    weight_flops: dict[str, int] = field(default_factory=dict)
    attention_flops: dict[str, int] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    storages: dict[int, Tensor] = field(default_factory=dict)

    @property
    def now(self) -> str:
        return self.stack[-1] if self.stack else ""

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps, once for each storage; weights are there anyway."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = tensor  # alive, so that its address stays its own
            self.saved[self.now] = self.saved.get(self.now, 0) + storage.nbytes()
        return tensor


@dataclass(frozen=True)
class _Tracer:
    """Runs forwards on the meta device and says what each layer group does in them."""

    model: MultiTaskModel
    groups: Sequence[LayerGroup]
    modules: Mapping[str, Sequence[nn.Module]]
    on_gpu: bool

    def observe(self, task: str, *, inputs: Mapping[str, Tensor], trainable: set[str]) -> _Seen:
        """Return what a forward of `task` shows while these parameters are trainable."""
        seen = _Seen()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trainable)
            seen.storages[parameter.untyped_storage()._cdata] = parameter
        for tensor in (*self.model.buffers(), *inputs.values()):
            seen.storages[tensor.untyped_storage()._cdata] = tensor
        with ExitStack() as stack:
            stack.enter_context(_training(self.model))
            for group in self.groups:
                for module in self.modules[group.name]:
                    for handle in _watch(module, group.name, seen):
                        stack.callback(handle.remove)
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(seen.keep, lambda t: t))
            stack.enter_context(AnswersOnMeta())
            stack.enter_context(_CountFlops(seen))
            if self.on_gpu:
                stack.enter_context(FusedKernels(seen.attention_flops, lambda: seen.now))
            self.model(task, inputs)
        return seen


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.requires_grad_(requires_grad=True)


def _watch(module: nn.Module, name: str, seen: _Seen) -> Iterator[Any]:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.stack.append(name)
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(hidden, Tensor) and name not in seen.entering:
            seen.entering[name] = hidden.numel() * hidden.element_size()

    def after(_module: nn.Module, _args: object, _output: object) -> None:
        seen.stack.pop()

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after)


class _CountFlops(TorchDispatchMode):
    """Adds the arithmetic of every matrix product to the layer group that runs it."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            kind = str(func)
            is_attention = any(part in kind for part in _ATTENTION)
            into = self._seen.attention_flops if is_attention else self._seen.weight_flops
            into[self._seen.now] = into.get(self._seen.now, 0) + formula(
                *args, **kwargs, out_val=out
            )
        return out
