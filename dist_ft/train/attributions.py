"""Which tokens a prediction rests on, by integrated gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_ft.data.loader import eval_batches
from dist_ft.train.evaluate import EvalData
from dist_ft.train.parts import Parts

STEPS = 32


def attribute_tokens(parts: Parts, data: EvalData, *, row: int) -> dict[str, Any]:
    """Return the tokens of a row and how much each adds to the probability of the prediction.

    The baseline is the row with padding tokens between its special ones. Captum computes it; a
    text that says why stands in the result where that is impossible.

    Args:
        parts: The run's parts, with the weights to look into.
        data: A task's split.
        row: Of the split.
    """
    if not hasattr(parts.tokenizer, "convert_ids_to_tokens"):
        return {"skipped": "the task's inputs are no tokens"}
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError:
        return {"skipped": "captum is not installed: pip install 'dist-ft[interpret]'"}
    batch = next(
        b
        for b in eval_batches(
            data.dataset, spec=data.spec, micro_batch_size=1, rank=0, world_size=1
        )
        if row in b.rows.tolist()
    )
    model = parts.model
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    ids = inputs.pop("input_ids")

    def probability(tokens: Tensor, *, of: int | None = None) -> Tensor:
        rows = {n: v.expand(len(tokens), *v.shape[1:]) for n, v in inputs.items()}
        logits = model(data.task.name, {"input_ids": tokens, **rows})["logits"].float()
        chosen = logits.softmax(-1)
        return chosen if of is None else chosen[:, of]

    with torch.no_grad():
        scores = probability(ids)[0]
    prediction = int(scores.argmax())
    special = torch.tensor(
        parts.tokenizer.get_special_tokens_mask(ids[0].tolist(), already_has_special_tokens=True),
        dtype=torch.bool,
        device=device,
    )
    baseline = torch.where(special, ids, torch.full_like(ids, parts.tokenizer.pad_token_id))
    with torch.no_grad():
        start = float(probability(baseline, of=prediction)[0])
    embedding: Any = model.backbone.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    method = LayerIntegratedGradients(lambda tokens: probability(tokens, of=prediction), embedding)
    found: Any = method.attribute(ids, baselines=baseline, n_steps=STEPS, internal_batch_size=8)
    return {
        "row": row,
        "prediction": prediction,
        "probability": float(scores[prediction]),
        "baseline_probability": start,
        "tokens": parts.tokenizer.convert_ids_to_tokens(ids[0].tolist()),
        "values": found[0].float().sum(-1).tolist(),
    }
