"""Sequence-to-sequence generation for ``transformers.pipeline``.

This file comes with a model exported by dist_ft and needs transformers only:

    pipe = pipeline("text2text-generation", model=FOLDER, trust_remote_code=True)
    pipe("text to rewrite", max_new_tokens=40)  # {"generated_text": "..."}
"""

from typing import Any

from transformers import Pipeline


class Text2TextPipeline(Pipeline):
    """Generates a text for a text."""

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """Returns the tokens of one text, 1 x tokens."""
        tokenizer: Any = self.tokenizer
        options = {"truncation": True, "return_tensors": "pt", **preprocess_parameters}
        return dict(tokenizer(input_, **options))

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:
        model: Any = self.model
        inputs = {k: input_tensors[k] for k in ("input_ids", "attention_mask")}
        return {"ids": model.generate(**inputs, **forward_parameters)}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> dict[str, Any]:
        """Returns the generated text."""
        tokenizer: Any = self.tokenizer
        options = {"skip_special_tokens": True, **postprocess_parameters}
        return {"generated_text": tokenizer.decode(model_outputs["ids"][0], **options)}
