"""Extractive question answering for ``transformers.pipeline``.

This file comes with a model exported by dist_ft and needs transformers only:

    pipe = pipeline("question-answering", model=FOLDER, trust_remote_code=True)
    pipe(question="Who ... ?", context="...")
    # {"answer": "...", "start": 10, "end": 14, "score": 0.9}; answer "" = not in the context

The context is read in overlapping windows, as in training; the answer is the span with the highest
sum of start and end logits, or empty if that is not above the score of "no answer".
"""

from typing import Any

import torch
from transformers import Pipeline


class QuestionAnsweringPipeline(Pipeline):
    """Answers questions with spans of a context."""

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the answer to ``question`` in ``context``, or a list for a list of inputs.

        Args:
            args: one input ``{"question": ..., "context": ...}`` or a list of them.
            kwargs: ``question`` and ``context``, and settings of the pipeline.
        """
        if not args:
            args = ({"question": kwargs.pop("question"), "context": kwargs.pop("context")},)
        return super().__call__(*args, **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        known = dict(getattr(self.model.config, "question_answering", {}))
        known.update({k: v for k, v in kwargs.items() if k in known})
        windows = {k: known[k] for k in ("max_length", "doc_stride") if k in known}
        return windows, {}, {"longest": known.get("max_answer_length", 30)}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """Returns the windows of one input, windows x tokens."""
        tokenizer: Any = self.tokenizer
        max_length = preprocess_parameters.get("max_length", 384)
        question, context = input_["question"].strip(), input_["context"]
        cut = tokenizer(
            question,
            add_special_tokens=False,
            truncation=True,
            max_length=max_length // 4,
            return_offsets_mapping=True,
        )
        encoding = tokenizer(
            question[: max((end for _, end in cut["offset_mapping"]), default=0)],
            context,
            truncation="only_second",
            max_length=max_length,
            stride=preprocess_parameters.get("doc_stride", 128),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        sides = [
            [side == 1 for side in encoding.sequence_ids(i)]
            for i in range(len(encoding["input_ids"]))
        ]
        offsets = encoding.pop("offset_mapping")
        encoding.pop("overflow_to_sample_mapping")
        inside = torch.tensor(sides) & (offsets[..., 1] > offsets[..., 0])
        return {
            "inputs": dict(encoding), "offsets": offsets, "inside": inside, "context": context,
        }  # fmt: skip

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:
        inputs = input_tensors["inputs"]
        outputs = self.model(**inputs, **forward_parameters)
        rest = {key: input_tensors[key] for key in ("offsets", "inside", "context")}
        return {
            "starts": outputs["start_logits"],
            "ends": outputs["end_logits"],
            "ids": inputs["input_ids"],
            **rest,
        }

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> dict[str, Any]:
        """Returns the best answer over all windows."""
        tokenizer: Any = self.tokenizer
        starts, ends = model_outputs["starts"].float(), model_outputs["ends"].float()
        inside = model_outputs["inside"].to(starts.device)
        cls = -1 if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        found = (model_outputs["ids"] == cls).int()
        null_at = found.argmax(1, keepdim=True)  # the first token where there is no CLS
        null = (starts.gather(1, null_at) + ends.gather(1, null_at)).min()
        low = torch.finfo(starts.dtype).min / 4
        begins, stops = starts.masked_fill(~inside, low), ends.masked_fill(~inside, low)
        scores = begins[:, :, None] + stops[:, None, :]  # [windows, first, last]
        length, longest = scores.shape[-1], postprocess_parameters.get("longest", 30)
        band = torch.ones(length, length, device=scores.device).triu().tril(longest - 1).bool()
        scores = scores.masked_fill(~band, 2 * low)
        window, span = divmod(int(scores.argmax()), length * length)
        first, last = divmod(span, length)
        value = scores[window, first, last]
        share = float(torch.softmax(torch.stack([value, null]), 0)[0])
        if not bool(inside.any()) or value <= null:
            return {"score": 1 - share, "start": 0, "end": 0, "answer": ""}
        begin = int(model_outputs["offsets"][window, first, 0])
        end = int(model_outputs["offsets"][window, last, 1])
        answer = model_outputs["context"][begin:end]
        return {"score": share, "start": begin, "end": end, "answer": answer}
