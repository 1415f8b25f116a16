"""Find out, by one tiny forward per task, when each parameter is used and whose loss reaches it.

The forward runs on the model itself, in eval mode and on a few tokens, and its autograd graph is
read instead of run backward: no copy of the model, no gradient memory, no change of any value. It
works wherever the model is, the meta device included.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ft.model.backbone import MultiTaskModel

LOSS_OUTPUTS = ("logits", "start_logits", "end_logits")
# What a model may raise that is run in a way which it was not made for.
MISFITS = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError)
# Largest difference of two fp32 forwards that are the same, as a share of the largest value.
SAME = 1e-4


@dataclass
class Call:
    """The first execution of a module, in ticks of the autograd clock.

    Attributes:
        start: tick before its forward.
        end: tick after its forward.
        keeps_shape: whether the hidden states leave it in the shape in which they entered.
    """

    start: int
    end: int = -1
    keeps_shape: bool = False


@dataclass
class Probe:
    """What one task's forward showed.

    Attributes:
        calls: module path -> its first execution, for the watched modules that ran.
        first_use: parameter name -> tick of its first use, for the parameters that the outputs
            depend on differentiably.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    first_use: dict[str, int] = field(default_factory=dict)


def probe_task(model: MultiTaskModel, *, task: str, watched: Mapping[str, nn.Module]) -> Probe:
    """Returns what a forward of ``task`` shows about the watched modules and all parameters.

    Args:
        model: the model, left as it was.
        task: task to run.
        watched: module path -> module whose executions are recorded.

    Raises:
        ValueError: the model does not accept the dummy input for its modality.
    """
    probe = Probe()
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        for path, module in watched.items():
            for handle in _watch(path, module, probe):
                stack.callback(handle.remove)
        with model.task_model(task) as task_model:
            inputs = dummy_inputs(task_model)
        if next(model.parameters()).is_meta:
            stack.enter_context(AnswersOnMeta())
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            outputs = model(task, inputs)
        tensors = [outputs[key] for key in LOSS_OUTPUTS if key in outputs]
        probe.first_use = _first_use(tensors, model)
    return probe


class AnswersOnMeta(TorchDispatchMode):
    """Answers questions about values on the meta device: is the mask all ones? is it one text?

    transformers asks them to take shortcuts; for the dummy input the answer is yes.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def dummy_inputs(model: Any) -> dict[str, Tensor]:
    """Returns a small valid input (2 examples) for a transformers model of any modality.

    Raises:
        ValueError: the modality is not known.
    """
    config, device = model.config, next(model.parameters()).device
    name = model.main_input_name
    if name == "input_ids":
        inputs = {"input_ids": _tokens(config, device)}
    elif name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {name: torch.ones(2, config.num_channels, height, width, device=device)}
    elif name == "input_values":
        inputs = {name: torch.ones(2, 4000, device=device)}
    elif name == "input_features":
        length = 2 * getattr(config, "max_source_positions", 100)
        inputs = {name: torch.ones(2, getattr(config, "num_mel_bins", 80), length, device=device)}
    else:
        raise ValueError(
            f"layer groups: {type(model).__name__} takes {name!r}, for which there is no dummy "
            "input; give all groups by freezing.layer_groups (name: regex)"
        )
    accepted = inspect.signature(model.forward).parameters
    if name == "input_ids" and "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(config, device)
    dtype = next(model.parameters()).dtype
    return {key: v.to(dtype) if v.is_floating_point() else v for key, v in inputs.items()}


def rows_of_many_lengths(root: nn.Module) -> dict[str, Tensor]:
    """Returns four rows for a text model, of three lengths; the tokens are any."""
    lengths = (9, 5, 5, 2)
    config: Any = root.config
    device = next(root.parameters()).device
    ids = torch.arange(len(lengths) * lengths[0], device=device) % (config.vocab_size - 5) + 3
    places = torch.arange(lengths[0], device=device)
    mask = (places[None] < torch.tensor(lengths, device=device)[:, None]).long()
    return {"input_ids": ids.view(mask.shape), "attention_mask": mask}


def _tokens(config: Any, device: torch.device) -> Tensor:
    """Twelve different tokens that are not padding, an end token last (BART pools on it)."""
    text = config.get_text_config()
    size = min(c.vocab_size for c in (config, text, *_parts(config)) if hasattr(c, "vocab_size"))
    eos = text.eos_token_id
    end = eos[0] if isinstance(eos, Sequence) else eos
    ids = [i for i in range(min(size, 99)) if i not in (text.pad_token_id, end)][-12:]
    if end is not None and end < size:
        ids[-1] = end
    return torch.tensor([ids, ids], device=device)


def _parts(config: Any) -> list[Any]:
    return [p for p in (getattr(config, "encoder", None), getattr(config, "decoder", None)) if p]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradients for every parameter inside the context, as before after it."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _watch(path: str, module: nn.Module, probe: Probe) -> Iterator[Any]:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args, kwargs
        probe.calls.setdefault(path, Call(start=_tick()))

    def after(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call = probe.calls[path]
        if call.end < 0:
            call.end = _tick()
            taken, given = _hidden((args, kwargs)), _hidden(output)
            call.keeps_shape = taken is not None and given is not None and taken == given

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after, with_kwargs=True)


def _hidden(value: Any) -> torch.Size | None:
    """Shape of the first floating-point tensor in nested arguments or outputs."""
    if isinstance(value, Tensor):
        return value.shape if value.is_floating_point() else None
    children = value.values() if isinstance(value, Mapping) else value
    if isinstance(children, str) or not hasattr(children, "__iter__"):
        return None
    for child in children:
        shape = _hidden(child)
        if shape is not None:
            return shape
    return None


def _tick() -> int:
    """The autograd clock of this thread: operations recorded later have higher numbers."""
    node = (torch.ones(1, requires_grad=True) * 1).grad_fn
    assert node is not None
    return node._sequence_nr()


def _first_use(outputs: list[Tensor], model: nn.Module) -> dict[str, int]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    used: dict[str, int] = {}
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen: set[Node] = set(todo)
    while todo:
        node = todo.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            name = names.get(id(getattr(child, "variable", None)))
            if name is not None:
                used[name] = min(used.get(name, node._sequence_nr()), node._sequence_nr())
            elif child not in seen:
                seen.add(child)
                todo.append(child)
    return used
