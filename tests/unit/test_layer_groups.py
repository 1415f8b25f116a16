from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.model.layer_groups import LayerGroup, find_layer_groups
from dist_ft.model.probe import dummy_inputs
from tests.helpers.tiny_models import DECODERS, ENCODERS, OTHERS, SEQ2SEQ, tiny_config

CLASSIFIER = HeadSpec("cls", "AutoModelForSequenceClassification", {"num_labels": 3})
TAGGER = HeadSpec("ner", "AutoModelForTokenClassification", {"num_labels": 3})
WITHOUT_CLASSIFIER = {"codegen", "cohere", "granite", "mamba"}
# XLNet's segment parameters take no part without token types; they stay with their block.
ONLY_WITH_TOKEN_TYPES = {"xlnet": ("r_s_bias", "seg_embed")}
ARCHITECTURES = [*ENCODERS, *DECODERS, *SEQ2SEQ, *OTHERS]


def heads_for(name: str) -> list[HeadSpec]:
    if name in ENCODERS:
        return [CLASSIFIER, TAGGER]
    if name in DECODERS:
        language_model = HeadSpec("gen", "AutoModelForCausalLM")
        return [language_model] if name in WITHOUT_CLASSIFIER else [CLASSIFIER, language_model]
    if name in SEQ2SEQ:
        return [HeadSpec("gen", "AutoModelForSeq2SeqLM")]
    return [HeadSpec("cls", OTHERS[name][0], {"num_labels": 3})]


def build(name: str, heads: Sequence[HeadSpec] | None = None) -> MultiTaskModel:
    chosen = heads or heads_for(name)
    return build_model(tiny_config(name), heads=chosen, dtype=torch.float32, seed=0)


def inputs_for(model: MultiTaskModel, task: str) -> dict[str, Any]:
    with model.task_model(task) as task_model:
        return dummy_inputs(task_model)


@contextmanager
def only_trainable(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    yield
    model.requires_grad_(True)


def outputs_need_gradient_through(model: MultiTaskModel, task: str, module: nn.Module) -> bool:
    """Whether the first output of a module depends on a trainable parameter."""
    seen: list[bool] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        seen.append(first.requires_grad)

    handle = module.register_forward_hook(look)
    model(task, inputs_for(model, task))
    handle.remove()
    return seen[0]


def test_there_are_at_least_forty_architectures() -> None:
    assert len(ARCHITECTURES) >= 70


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_cover_every_parameter_once_and_know_the_tasks_that_train_them(name: str) -> None:
    model = build(name)
    groups = find_layer_groups(model)
    covered = [parameter for group in groups for parameter in group.parameters]
    assert sorted(covered) == sorted(n for n, _ in model.named_parameters())
    assert len({group.name for group in groups}) == len(groups)
    assert sum(group.kind == "block" for group in groups) >= (1 if name == "albert" else 2)
    reached = tasks_with_gradient(model)
    for group in groups:
        for parameter in group.parameters:
            if parameter.rpartition(".")[2] in ONLY_WITH_TOKEN_TYPES.get(name, ()):
                assert group.kind == "block"
            else:
                assert reached[parameter] == group.tasks, (group.name, parameter)


def tasks_with_gradient(model: MultiTaskModel) -> dict[str, set[str]]:
    reached: dict[str, set[str]] = {n: set() for n, _ in model.named_parameters()}
    for task in model.tasks:
        model.zero_grad(set_to_none=True)
        model(task, inputs_for(model, task))["logits"].float().square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                reached[name].add(task)
    return reached


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_are_ordered_bottom_to_top_in_execution(name: str) -> None:
    """With only one group trainable, a block's output depends on it if and only if it is above.

    This uses autograd's requires_grad, not the clock by which the groups were found.
    """
    model = build(name)
    task = model.tasks[-1]
    groups = [g for g in find_layer_groups(model) if task in g.tasks and g.kind != "head"]
    blocks = [(i, block_module(model, g)) for i, g in enumerate(groups) if g.kind == "block"]
    for position, group in enumerate(groups):
        with only_trainable(model, group.parameters):
            for index, module in blocks:
                depends = outputs_need_gradient_through(model, task, module)
                crosses = group.name.startswith("decoder") or group.name.startswith("encoder")
                if index < position:
                    assert not depends, (group.name, groups[index].name)
                elif not crosses or group.name.split(".")[0] == groups[index].name.split(".")[0]:
                    assert depends, (group.name, groups[index].name)


def block_module(model: nn.Module, group: LayerGroup) -> nn.Module:
    """The element of a list of layers that holds most of a block's parameters."""
    elements: Counter[str] = Counter()
    for name in group.parameters:
        path = name.split(".")
        for length in range(1, len(path)):
            if isinstance(model.get_submodule(".".join(path[:length])), nn.ModuleList):
                elements[".".join(path[: length + 1])] += 1
                break
    return model.get_submodule(elements.most_common(1)[0][0])


def names_of(model: MultiTaskModel, **kwargs: Any) -> list[str]:
    return [group.name for group in find_layer_groups(model, **kwargs)]


def test_names_of_an_encoder() -> None:
    model = build("bert")
    groups = {group.name: group for group in find_layer_groups(model)}
    assert list(groups) == [
        "embeddings", "block.0", "block.1", "block.2", "pooler", "head.cls", "head.ner",
    ]  # fmt: skip
    assert groups["pooler"].tasks == {"cls"}
    assert groups["block.0"].tasks == {"cls", "ner"}


def test_names_of_an_encoder_decoder_with_an_encoder_task() -> None:
    heads = [HeadSpec("gen", "AutoModelForSeq2SeqLM"), TAGGER]
    model = build("t5", heads)
    groups = {group.name: group for group in find_layer_groups(model)}
    assert list(groups) == [
        "embeddings", "encoder.block.0", "encoder.block.1", "encoder.final_norm",
        "decoder.block.0", "decoder.block.1", "decoder.block.2", "decoder.final_norm", "head.ner",
    ]  # fmt: skip
    assert groups["encoder.block.1"].tasks == {"gen", "ner"}
    assert groups["decoder.block.1"].tasks == {"gen"}


def test_positions_of_the_decoder_come_after_the_encoder() -> None:
    names = names_of(build("bart"))
    assert names[:4] == ["embeddings", "encoder.block.0", "encoder.block.1", "decoder.embeddings"]


def test_parameters_belong_to_their_lowest_user_among_the_tasks() -> None:
    # the decoder-only task meets the shared embeddings just before the decoder's blocks
    heads = [HeadSpec("decoder", "AutoModelForCausalLM"), HeadSpec("both", "AutoModelForSeq2SeqLM")]
    groups = {group.name: group for group in find_layer_groups(build("bart", heads))}
    assert "backbone.shared.weight" in groups["embeddings"].parameters
    assert groups["embeddings"].tasks == {"decoder", "both"}
    assert groups["decoder.block.0"].tasks >= {"decoder", "both"}
    names = list(groups)
    assert names.index("encoder.block.1") < names.index("decoder.block.0")


def test_composite_model_has_both_stacks() -> None:
    part = tiny_config("bert")
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(part, part)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    heads = [HeadSpec("gen", "AutoModelForSeq2SeqLM")]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    names = names_of(model)
    assert "encoder.block.2" in names
    assert names.index("encoder.block.2") < names.index("decoder.block.0")
    assert names[-1] == "head.gen"


def test_tied_language_model_head_belongs_to_the_embeddings() -> None:
    model = build("gpt2")
    groups = {group.name: group for group in find_layer_groups(model)}
    assert "head.gen" not in groups
    assert "backbone.wte.weight" in groups["embeddings"].parameters


def test_shared_layer_of_albert_is_one_group() -> None:
    assert [n for n in names_of(build("albert")) if n.startswith("block")] == ["block.0"]


def test_position_table_without_gradient_is_unused() -> None:
    unused = find_layer_groups(build("marian"))[0]
    assert (unused.name, unused.tasks) == ("unused", frozenset())
    assert all("embed_positions" in name for name in unused.parameters)


def test_the_model_is_left_as_it_was() -> None:
    model = build("bert")
    model.train()
    model.heads["cls"].eval()
    model.get_parameter("backbone.pooler.dense.weight").requires_grad_(False)
    modes = [module.training for module in model.modules()]
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    find_layer_groups(model)
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(values[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_groups_are_found_without_memory_for_the_weights(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert find_layer_groups(model) == find_layer_groups(build(name))


def test_override_makes_a_new_group_at_the_place_of_its_lowest_parameter() -> None:
    model = build("bert")
    names = names_of(model, overrides={"positions": r"position_embeddings", "top": r"layer\.[12]"})
    assert names == ["embeddings", "positions", "block.0", "top", "pooler", "head.cls", "head.ner"]


def test_override_can_join_an_existing_group() -> None:
    model = build("bert")
    groups = {g.name: g for g in find_layer_groups(model, overrides={"block.2": r"pooler"})}
    assert "backbone.pooler.dense.bias" in groups["block.2"].parameters
    assert groups["block.2"].kind == "block"
    assert "pooler" not in groups


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"x": "("}, "regular expression"),
        ({"x": "no_such_parameter"}, "matches no parameter"),
        ({"x": "pooler", "y": r"pooler\.dense"}, "already in x"),
    ],
)
def test_bad_overrides_are_errors(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layer_groups(build("bert"), overrides=overrides)


def squeezebert() -> MultiTaskModel:
    """Its encoder calls ``layer.forward``, so nothing shows when a block runs."""
    config = transformers.SqueezeBertConfig(
        vocab_size=64, hidden_size=16, embedding_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, q_groups=2, k_groups=2, v_groups=2,
        intermediate_groups=2, output_groups=2,
    )  # fmt: skip
    return build_model(config, heads=[CLASSIFIER], dtype=torch.float32, seed=0)


def test_unknown_structure_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"freezing\.layer_groups"):
        find_layer_groups(squeezebert())


def test_overrides_can_describe_an_unknown_structure() -> None:
    overrides = {
        "embeddings": r"backbone\.embeddings",
        "low": r"layers\.0\.",
        "high": r"layers\.1\.",
        "pooler": r"backbone\.pooler",
    }
    groups = find_layer_groups(squeezebert(), overrides=overrides)
    assert [group.name for group in groups] == [*overrides, "head.cls"]
    with pytest.raises(ValueError, match="pooler"):
        find_layer_groups(squeezebert(), overrides={k: overrides[k] for k in list(overrides)[:3]})
