"""What a tokenizer is, as numbers and hashes: two tokenizers with one fingerprint encode alike."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dist_ft.data.manifest import canonical_json

# Case, accents, digits, white space, other scripts, an emoji and code: whatever a tokenizer may
# treat in its own way.
_PROBES = (
    "The quick brown Fox jumps over 13 lazy dogs.",
    "Déjà-vu naïve ﬁancée  two  spaces\ttab\nline",
    "北京大学 Привет мир こんにちは 🙂",
    "def f(x): return x**2  # 1,234.50 €",
)


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Returns what the token ids and the chat format depend on, as JSON.

    Truncation and padding settings are left out: they are arguments of a call, not of the
    tokenizer, and change as it is used.

    Args:
        tokenizer: a transformers tokenizer, or an image processor or feature extractor.
    """
    if not hasattr(tokenizer, "special_tokens_map"):
        content = json.loads(tokenizer.to_json_string())
        return {"class": type(tokenizer).__name__, "content_sha256": _sha256(content)}
    probes = [tokenizer(probe, add_special_tokens=True)["input_ids"] for probe in _PROBES]
    special = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in sorted(tokenizer.special_tokens_map.items())
        if isinstance(token, str)
    }
    return {
        "class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "added_tokens": len(tokenizer.get_added_vocab()),
        "special_ids": special,
        "content_sha256": _sha256(_content(tokenizer)),
        "probes_sha256": _sha256([[int(token) for token in ids] for ids in probes]),
        "chat_template_sha256": _sha256(getattr(tokenizer, "chat_template", None)),
    }


def _content(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    content = json.loads(backend.to_str())
    return {key: value for key, value in content.items() if key not in ("truncation", "padding")}


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
