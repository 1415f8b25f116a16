"""Takes the kernels that a recipe allows and its model can use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dist_ft.config import Recipe
from dist_ft.engine.base import DTYPES
from dist_ft.engine.loss_module import FusedLoss, InTraining
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.kernels.dropout_norm import WIDEST
from dist_ft.kernels.ops import REFERENCE, Choice, Place, choose
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.dropout import largest_dropout
from dist_ft.model.dropout_modules import find_dropouts, use_byte_dropout
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.model.post_norm import find_post_norms, fuse_post_norms
from dist_ft.model.relative_positions import modules_with_bias
from dist_ft.model.scoring_head import ScoringHead
from dist_ft.model.trunk import Trunk
from dist_ft.tasks.base import Task
from dist_ft.tasks.generation import Generation
from dist_ft.train.agreement import check_same_choices

FLASH, BY_RUN = "flash_varlen", "by_run"
FIRST_TOKENS = "first_tokens"
_NORM, _DROPOUT = "dropout_residual_norm", "dropout"
# Head sizes of FlashAttention-2; torch's sdpa pads others to a multiple, its varlen call doesn't.
_FLASH_MULTIPLE, _FLASH_WIDEST = 8, 256
_HEAD_SIZES = ("head_dim", "attention_head_size")
# Parts of `regularization` whose losses are made of outputs, in more than one forward.
_WHOLE_LOGITS = ("r_drop", "adversarial", "cutoff", "mixup")


@dataclass(frozen=True)
class Kernels:
    """What runs the operations of a run.

    Attributes:
        chosen: name of the implementation of each operation; of attention, what can run it until
            `settle_attention` says what does.
        fused: tasks whose heads compute the loss themselves in training.
        strict: whether what was chosen must run.
    """

    chosen: dict[str, str]
    fused: dict[str, FusedLoss]
    strict: bool = False

    def used_in(self, training: InTraining) -> InTraining:
        """Return what is different in training, with the losses that heads compute."""
        return replace(training, fused=self.fused)

    def settle_attention(self, trunk: Trunk | None) -> None:
        """Let a trunk without padding run the attention that was chosen, and note what will run.

        Padded rows are transformers' affair. A bias by position, as T5 has, is beyond flash
        attention, and so are some sizes of heads. Under ``last_block`` is noted whether some task's
        runs for first tokens only.

        Raises:
            ValueError: Flash attention was chosen and can't run these blocks, and `strict` is set.
        """
        narrow = trunk is not None and trunk.last is not None and "firsts" in trunk.forms.values()
        self.chosen["last_block"] = FIRST_TOKENS if narrow else REFERENCE
        if trunk is None or not trunk.flat:
            self.chosen["attention"] = REFERENCE
            return
        wants_flash = self.chosen["attention"] == FLASH
        problem = _beyond_flash(trunk.blocks) if wants_flash else None
        if problem is not None and self.strict:
            raise ValueError(
                f"kernels: strict, but attention would be run by {BY_RUN}, as {problem}: use auto"
            )
        trunk.flash = wants_flash and problem is None
        # Also where a recipe wants plain torch and no padding: then it is plain torch, by row.
        self.chosen["attention"] = FLASH if trunk.flash else BY_RUN


def settle(kernels: Kernels, passes: TrunkPasses) -> None:
    """Note what runs attention, and check that all ranks have come to the same choices.

    Raises:
        ValueError: See `Kernels.settle_attention`; or on every rank, if one chose otherwise.
    """
    kernels.settle_attention(passes.trunk)
    trunk = passes.trunk
    check_same_choices(
        {
            **kernels.chosen,
            "padding": "unpadded" if trunk is not None and trunk.flat else "padded",
            "inputs of heads": str(sorted(trunk.forms.items()) if trunk is not None else []),
            "activation cache": "off" if passes.cache is None else "on",
        }
    )


def take_kernels(
    recipe: Recipe,
    model: MultiTaskModel,
    *,
    groups: Sequence[LayerGroup],
    tasks: Sequence[Task],
    device: torch.device,
    say: Callable[[str], None],
) -> Kernels:
    """Return the kernels to use; a fallback is said once, with its reason.

    Args:
        recipe: the recipe.
        model: the model in full precision, not yet partitioned.
        groups: its layer groups.
        tasks: its tasks.
        device: where it will run.
        say: tells a person.

    Raises:
        ValueError: `kernels` is ``strict`` and something would fall back to plain torch.
    """
    dropout = attention_dropout(recipe, model, groups=groups)
    place = Place(device.type, DTYPES[recipe.engine.precision], dropout)
    choices = choose(place, policy=recipe.kernels, device=device)
    problems = {op: c.problem for op, c in choices.items() if c.problem}
    chosen = {op: c.implementation for op, c in choices.items()}
    fused: dict[str, FusedLoss] = {}
    generating = [t for t in tasks if isinstance(t, Generation)]
    if chosen["linear_cross_entropy"] != REFERENCE:
        fused, problem = _fused_losses(recipe, model, tasks=generating)
        problems |= {"linear_cross_entropy": problem} if problem else {}
        if not fused:
            chosen["linear_cross_entropy"] = REFERENCE
    sublayers = find_post_norms(model, widest=WIDEST) if _is_asked(choices[_NORM]) else []
    dropouts = find_dropouts(model) if _is_asked(choices[_DROPOUT]) else []
    for op, users in ((_NORM, sublayers), (_DROPOUT, dropouts)):
        if not users:
            chosen[op] = REFERENCE
            problems.pop(op, None)  # nobody's
    for op, problem in problems.items():
        if recipe.kernels == "strict":
            raise ValueError(
                f"kernels: strict, but {op} would be run by plain torch, as {problem}: use auto"
            )
        say(f"kernels: {op} is run by plain torch: {problem}")
    if chosen[_NORM] != REFERENCE:
        from dist_ft.kernels.triton_dropout_norm import dropout_residual_norm

        fuse_post_norms(sublayers, by=dropout_residual_norm)
    if chosen[_DROPOUT] != REFERENCE:
        use_byte_dropout(dropouts)
    return Kernels(chosen, fused, strict=recipe.kernels == "strict")


def _is_asked(choice: Choice) -> bool:
    """Return whether another than plain torch is made for an operation here, right or not."""
    return choice != Choice(REFERENCE)


def attention_dropout(
    recipe: Recipe, model: MultiTaskModel, *, groups: Sequence[LayerGroup]
) -> float:
    """Return the largest share of attention weights that training drops."""
    chosen = recipe.regularization.dropout.attention
    return largest_dropout(model, groups=groups, part="attention") if chosen is None else chosen


def _beyond_flash(blocks: Sequence[nn.Module]) -> str | None:
    """Return why flash attention has no programs for the attention of some block."""
    for block in blocks:
        if modules_with_bias(block):
            return "it takes no bias by position"
        sizes = [getattr(m, name, None) for m in block.modules() for name in _HEAD_SIZES]
        for size in sizes:
            if isinstance(size, int) and (size % _FLASH_MULTIPLE or size > _FLASH_WIDEST):
                return (
                    f"heads of {size} values are no multiple of {_FLASH_MULTIPLE} "
                    f"up to {_FLASH_WIDEST}"
                )
    return None


def _fused_losses(
    recipe: Recipe, model: MultiTaskModel, *, tasks: Sequence[Generation]
) -> tuple[dict[str, FusedLoss], str | None]:
    """Return the losses that heads can compute, and why some task's can't."""
    config = recipe.regularization
    fused: dict[str, FusedLoss] = {}
    problem: str | None = None
    for task in tasks:
        regularized = config.tasks is None or task.name in config.tasks
        whole = [k for k in _WHOLE_LOGITS if regularized and getattr(config, k)]
        if whole:
            problem = f"task {task.name}: regularization.{whole[0]} needs whole logits"
            continue
        try:
            head = ScoringHead.find(model, task.name)
        except ValueError as error:
            problem = f"task {task.name}: {error}"
            continue
        smoothing = (config.label_smoothing or 0.0) if regularized else 0.0
        fused[task.name] = FusedLoss(head, task.logit_labels, smoothing)
    return fused, problem
