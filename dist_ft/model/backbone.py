"""One shared backbone with a head for every task, loaded from transformers checkpoints."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from dist_ft.model import grafting
from dist_ft.model.own_draws import let_inputs_be, without_own_draws
from dist_ft.model.sources import resolve_model_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadSpec:
    """What a task wants on top of the backbone.

    Attributes:
        name: task name, also the key in ``MultiTaskModel.heads``.
        auto_class: transformers auto class, e.g. ``AutoModelForTokenClassification``.
        config_updates: configuration values of the head (``num_labels``, ``id2label``, ...).
    """

    name: str
    auto_class: str
    config_updates: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSource:
    """Where a pre-trained model comes from and how it may be loaded.

    Attributes:
        path: hub id, folder, or ``package:NAME`` (see ``model.sources``).
        revision: commit, tag or branch of a hub id.
        trust_remote_code: whether code that comes with the model may run.
        allow_pickle: whether weights may be read from pickle files.
        attention: attention implementation, ``None`` lets transformers choose.
        pad_token: token of the vocabulary to pad with; needed if the tokenizer has none.
    """

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attention: str | None = None
    pad_token: str | None = None


class CompositeBackbone(nn.Module):
    """The parts of a model that has no ``AutoModel`` class, such as ``EncoderDecoderModel``.

    It is a container that names and owns the shared parts, it can not be called.
    """

    def __init__(self, task_model: PreTrainedModel) -> None:
        super().__init__()
        self.config = copy.deepcopy(task_model.config)
        for name, child in task_model.named_children():
            if next(child.parameters(), None) is not None:
                part = child.base_model if isinstance(child, PreTrainedModel) else child
                self.add_module(name, part)


class MultiTaskModel(nn.Module):
    """One backbone, registered once, and a transformers task model per task that runs on it.

    Attributes:
        backbone: the ``AutoModel`` (or ``CompositeBackbone``); parts no task has are dropped.
        heads: task name -> transformers task model, of which only the head is registered.
        fresh: names of the backbone's parameters that its checkpoint lacks, so that they start
            random (a pooler, mostly).
    """

    def __init__(
        self, backbone: nn.Module, task_models: Iterable[tuple[str, PreTrainedModel]]
    ) -> None:
        """Grafts the backbone into each task model.

        Args:
            backbone: module to share.
            task_models: task names and models, taken one at a time, so that a generator never
                holds more than one unshared backbone.
        """
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict()
        self._slots: dict[str, list[grafting.Slot]] = {}
        self._no_cache: dict[str, bool] = {}
        self.fresh: frozenset[str] = frozenset()
        for name, task_model in task_models:
            self._attach(name, task_model)
        if not self.heads:
            raise ValueError("tasks: the model has no task, it needs at least one")
        slots = [slot for task in self._slots.values() for slot in task]
        self.pruned = tuple(grafting.prune(backbone, slots))
        let_inputs_be(backbone)
        for module in backbone.modules():  # a cache of keys and values is of no use in training
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and getattr(config, "use_cache", None):
                config.use_cache = False
        self.eval()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order of attachment."""
        return tuple(self._slots)

    def forward(self, task: str, inputs: Mapping[str, Tensor]) -> Any:
        """Returns the output of the task's transformers model.

        Args:
            task: task name.
            inputs: keyword arguments of the transformers forward, e.g. ``input_ids`` and
                ``attention_mask`` (micro-batch x length, int64); pixels and waveforms take the
                weights' type. ``labels`` (micro-batch x target
                length, int64, -100 = none) of a sequence-to-sequence task become the decoder's
                inputs, shifted; transformers' own loss is never computed.
        """
        arguments: dict[str, Any] = dict(inputs)
        for key, value in inputs.items():
            if value.is_floating_point():
                arguments[key] = value.to(next(self.backbone.parameters()).dtype)
        labels = arguments.pop("labels", None)
        if labels is not None:
            arguments["decoder_input_ids"] = _shifted(self.heads[task], labels)
        if self._no_cache[task]:
            arguments["use_cache"] = False
        return self.heads[task](**arguments)

    @contextmanager
    def task_model(self, task: str) -> Iterator[PreTrainedModel]:
        """Yields the task's model as transformers knows it, with the backbone registered in it.

        No weight is copied. For export and ``generate``; must not be open during training steps.
        """
        model = self.heads[task]
        assert isinstance(model, PreTrainedModel)
        with grafting.registered(self._slots[task]):
            yield model

    def _attach(self, task: str, task_model: PreTrainedModel) -> None:
        _check_task_name(task, taken=self.tasks)
        found = grafting.find_slots(task_model, self.backbone)
        if not found:
            raise ValueError(
                f"task {task}: {type(task_model).__name__} holds no part of a "
                f"{type(self.backbone).__name__}, so it cannot share this backbone"
            )
        before = dict(self.backbone.named_parameters())
        for slot, shared in found:
            grafting.check_shapes(slot, shared)
            setattr(slot.owner, slot.name, shared)
        task_model.tie_weights(recompute_mapping=False)
        after = dict(self.backbone.named_parameters())
        assert all(after[name] is parameter for name, parameter in before.items())
        self._slots[task] = [slot for slot, _ in found]
        grafting.hide(self._slots[task], [shared for _, shared in found])
        self.heads[task] = task_model
        self._no_cache[task] = "use_cache" in inspect.signature(task_model.forward).parameters


def _shifted(task_model: nn.Module, labels: Tensor) -> Tensor:
    """Decoder inputs for teacher forcing: the start token, then the labels but the last."""
    prepare = getattr(task_model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:  # the model's own way: mBART starts with the language token
        return prepare(labels=labels)
    config: Any = task_model.config
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


def _check_task_name(name: str, *, taken: Sequence[str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"tasks: {name!r} cannot be a task name: use letters, digits, '_' and '-', starting "
            "with a letter or digit, and no name of a dict method"
        )
    if name in taken:
        raise ValueError(f"tasks: two tasks are named {name!r}; names must be different")


def load_model(
    source: ModelSource,
    *,
    heads: Sequence[HeadSpec],
    dtype: torch.dtype,
    seed: int,
    pad_token_id: int | None,
) -> MultiTaskModel:
    """Returns a pre-trained backbone with a head per task.

    Weights of a head that the checkpoint has (a language model's, a fine-tuned classifier's of the
    same size) are used; others start random, as a function of (seed, task name) alone. The global
    random state is left as it was.

    Args:
        source: where the model comes from.
        heads: the tasks.
        dtype: type of all weights; float32 for master weights.
        seed: seed of the run.
        pad_token_id: the tokenizer's; ``None`` for a model that takes no text.

    Raises:
        ValueError: the model cannot be found or read safely.
        RuntimeError: the package of a packaged model is not installed.
    """
    path = resolve_model_path(source.path)
    if not source.allow_pickle:
        _refuse_pickle(path)
    options = {"revision": source.revision or "main", "trust_remote_code": source.trust_remote_code}
    with readable_errors(source):
        config = transformers.AutoConfig.from_pretrained(path, **options)
    options |= {"dtype": dtype, "use_safetensors": None if source.allow_pickle else True}
    if source.attention is not None:
        options["attn_implementation"] = source.attention

    absent: set[str] = set()

    def make(auto_class: str, config: PreTrainedConfig) -> PreTrainedModel:
        with readable_errors(source):
            model, report = getattr(transformers, auto_class).from_pretrained(
                path, config=config, output_loading_info=True,
                ignore_mismatched_sizes=auto_class != "AutoModel", **options,
            )  # fmt: skip
        if auto_class == "AutoModel" and report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"]))
            logger.warning("not in the checkpoint, start from random values: %s", missing)
            absent.update(f"backbone.{name}" for name in report["missing_keys"])
        return model

    model = _assemble(config, heads=heads, make=make, seed=seed, pad_token_id=pad_token_id)
    model.fresh = frozenset(absent.intersection(name for name, _ in model.named_parameters()))
    return model


def build_model(
    config: PreTrainedConfig, *, heads: Sequence[HeadSpec], dtype: torch.dtype, seed: int
) -> MultiTaskModel:
    """Returns a model with random weights, a function of (seed, configuration, task names).

    For tests, throughput measurements and, under ``torch.device("meta")``, planning.

    Args:
        config: configuration of the backbone.
        heads: the tasks.
        dtype: type of all weights.
        seed: seed of the run.
    """

    def make(auto_class: str, config: PreTrainedConfig) -> PreTrainedModel:
        return getattr(transformers, auto_class).from_config(config, dtype=dtype)

    return _assemble(config, heads=heads, make=make, seed=seed)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model, with a pad token.

    Raises:
        ValueError: there is none, it has no pad token, or the given one is not in its vocabulary.
    """
    path = resolve_model_path(source.path)
    with readable_errors(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, revision=source.revision or "main", trust_remote_code=source.trust_remote_code
        )
    if source.pad_token is not None:
        if source.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"model.pad_token: {source.pad_token!r} is not in the vocabulary of {source.path}; "
                f"use a token that is, for example {tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = source.pad_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"model.pad_token: the tokenizer of {source.path} has no pad token; set it to a token "
            f"of the vocabulary, for example {tokenizer.eos_token!r}"
        )
    return tokenizer


def _assemble(
    config: PreTrainedConfig, *, heads: Sequence[HeadSpec], make: Any, seed: int,
    pad_token_id: int | None = None,
) -> MultiTaskModel:  # fmt: skip
    def task_models() -> Iterator[tuple[str, PreTrainedModel]]:
        for head in heads:
            head_config = copy.deepcopy(config)
            for key, value in head.config_updates.items():
                setattr(head_config, key, value)
            if pad_token_id is not None:  # classifiers on decoders look for the last real token
                head_config.get_text_config().pad_token_id = pad_token_id
            with seeded(seed, f"head {head.name}"):
                yield head.name, make(head.auto_class, head_config)

    config = without_own_draws(config)
    for head in heads:
        if not head.auto_class.startswith("AutoModel") or not hasattr(
            transformers, head.auto_class
        ):
            raise ValueError(f"task {head.name}: transformers has no class {head.auto_class}")
    with quiet_transformers():
        models = task_models()
        if _has_auto_model(config):
            with seeded(seed, "backbone"):
                backbone = make("AutoModel", copy.deepcopy(config))
            return MultiTaskModel(backbone, models)
        first = next(models, None)
        if first is None:
            raise ValueError("tasks: the model has no task, it needs at least one")
        return MultiTaskModel(CompositeBackbone(first[1]), _chain(first, models))


def _chain(
    first: tuple[str, PreTrainedModel], rest: Iterator[tuple[str, PreTrainedModel]]
) -> Iterator[tuple[str, PreTrainedModel]]:
    yield first
    yield from rest


def _has_auto_model(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_MAPPING or "AutoModel" in (getattr(config, "auto_map", None) or {})


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seeds the CPU generator from (seed, purpose) inside the context; restores it after."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers inside the context: its bars, its reports of weights that are new.

    New weights are expected where heads are attached; what matters is logged by us.
    """
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


@contextmanager
def readable_errors(source: ModelSource) -> Iterator[None]:
    """Turns what transformers raises where a model cannot be found into ValueError."""
    try:
        yield
    except OSError as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"model.path: {source.path!r} (revision {source.revision or 'main'}) cannot be loaded: "
            f"{cause} Give a folder with config.json, tokenizer and *.safetensors, a hub id that "
            "is reachable or cached, or package:NAME."
        ) from error


def _refuse_pickle(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"model.path: {path} has only pickled weights ({pickled[0]}), which can run code when "
            "they are read; convert them to safetensors, or set model.allow_pickle: true"
        )
