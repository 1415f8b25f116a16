"""Tokenizers made on the spot: BERT-like WordPiece and GPT-2-like byte-level BPE."""

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_WORDS = ("who", "did", "it", "the", "ada", "love", "##lace", "wrote", "a", "program", "in")


def wordpiece(*, max_length: int = 512) -> PreTrainedTokenizerBase:
    """Lower-casing WordPiece with [CLS] text [SEP] pair [SEP]; unknown words become letters."""
    letters = list(string.ascii_lowercase + string.digits)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *letters]
    tokens += [f"##{c}" for c in letters]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*tokens, *_WORDS]))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def byte_level(*, max_length: int = 512, pad: bool = True) -> PreTrainedTokenizerBase:
    """Byte-level BPE without merges and without special tokens around the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        eos_token="<eos>",
        pad_token="<pad>" if pad else None,
        model_input_names=["input_ids", "attention_mask"],
    )
