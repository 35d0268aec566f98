from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import tnlm
from tnlm.errors import ModelError, OptionError, RankError, TargetError
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.rules import INSIGHTS, Rule
from tnlm.studies.design.schedules import PUBLISHED, PUBLISHED_PERCENT
from tnlm.studies.design.space import DesignSpace

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=5,
    num_attention_heads=2,
)


@pytest.fixture(scope="module")
def llama_7b():
    return DesignSpace(LlamaConfig())


def test_llama_7b_has_the_published_numbers(llama_7b):
    assert llama_7b.dense.params == 6_738_415_616
    assert tuple(llama_7b.tensors) == ALL
    assert llama_7b.count() == 2**39
    assert llama_7b.count(distinct=True) == (2**32 - 1) * (2**7 - 1) + 1


@pytest.mark.parametrize(
    ("layers", "percent"), list(zip(PUBLISHED, PUBLISHED_PERCENT, strict=True))
)
def test_rank_one_removes_the_published_percentages_of_llama_7b(layers, percent, llama_7b):
    found = llama_7b.percent(llama_7b.all_tensors(layers), "published")
    assert found == pytest.approx(percent, abs=1e-12)
    stored = llama_7b.percent(llama_7b.all_tensors(layers))
    core = 100 * 7 * len(layers) / 6_738_415_616  # one number a matrix, which we do not store
    assert stored - found == pytest.approx(core, abs=1e-12)


def test_one_tensor_of_all_layers_removes_what_the_paper_says(llama_7b):
    every = tuple(range(32))
    found = [llama_7b.percent(Configuration(every, (name,)), "published") for name in ALL]
    assert [round(percent) for percent in found] == [8, 8, 8, 8, 21, 21, 21]


def test_a_config_and_its_model_make_the_same_space(tiny_llama):
    model = tiny_llama()
    assert DesignSpace(model).to_dict() == DesignSpace(model.config).to_dict()


RULES = st.sets(st.sampled_from([*INSIGHTS, Rule("at-most", value=2)]))
TENSORS = st.sampled_from([("q_proj",), ATTENTION[:3], {"attn": ATTENTION, "up": ("up_proj",)}])


@given(RULES, TENSORS, st.sampled_from([(1,), (1, 3)]), st.sampled_from([1, 2]))
def test_configurations_are_as_many_as_counted_and_all_in_the_space(rules, tensors, ranks, forms):
    space = DesignSpace(
        CONFIG,
        rules=sorted(rules, key=str),
        tensors=tensors,
        ranks=ranks,
        formats=("low-rank", "tucker")[:forms],
    )
    found = list(space.configurations())
    assert len(found) == len({c.key for c in found}) == space.count(distinct=True)
    assert found[0].is_dense
    assert all(space.broken(configuration) is None for configuration in found)


@settings(max_examples=12)  # an example compresses a model; costs are exact
@given(st.data())
def test_costs_are_those_of_the_compressed_model(data):
    ranks, forms = (1, 2, 6), ("tucker", "low-rank")
    space = DesignSpace(CONFIG, ranks=ranks, formats=forms)
    configuration = Configuration(
        tuple(sorted(data.draw(st.sets(st.integers(0, 4), min_size=1)))),
        tuple(n for n in ALL if n in data.draw(st.sets(st.sampled_from(ALL), min_size=1))) or ALL,
        data.draw(st.sampled_from(ranks)),
        data.draw(st.sampled_from(forms)),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG))
    cost = space.cost(configuration)
    space.compress(model, configuration, progress=False)
    assert tnlm.report(model).plan.model_after == cost
    assert space.percent(configuration) == pytest.approx(
        100 * (1 - cost.params / space.dense.params)
    )


def test_what_does_not_shrink_stays_dense(tiny_llama):
    space = DesignSpace(tiny_llama(), ranks=(12,))  # k_proj is 16 x 32
    names = {t.name.rpartition(".")[2] for t in space.targets(space.all_tensors([0]))}
    assert names == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_published_count_of_low_rank_has_no_core(tiny_llama):
    space = DesignSpace(tiny_llama(), formats=("tucker", "low-rank"), ranks=(2,))
    removed = {
        form: space.percent(space.all_tensors([0], form=form), "published") * space.dense.params
        for form in space.formats
    }
    assert removed["low-rank"] - removed["tucker"] == pytest.approx(100 * 7 * 4)


def test_gpt2_matrices_have_clear_names(tiny_gpt2):
    space = DesignSpace(tiny_gpt2())
    assert tuple(space.tensors) == ("q", "k", "v", "attn.c_proj", "c_fc", "mlp.c_proj")


def test_groups_are_chosen_together(tiny_llama):
    space = DesignSpace(tiny_llama(), tensors={"mlp": ALL[4:], "q": ["q_proj"]})
    found = space.targets(Configuration((1,), ("mlp",)))
    assert [t.name.rpartition(".")[2] for t in found] == list(ALL[4:])
    assert len(space.matrices()) == 8


def test_the_dense_configuration_removes_nothing(space):
    assert space.percent(DENSE) == space.percent(DENSE, "published") == 0
    assert space.cost(DENSE) == space.dense


def test_a_compressed_model_is_no_start(compressed):
    with pytest.raises(ModelError, match="compressed already"):
        DesignSpace(compressed("llama", "svd", rank=2))


def test_two_stacks_of_layers_are_refused_and_one_may_be_chosen():
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    with pytest.raises(TargetError, match=r"one stack of layers.*encoder\.block, decoder\.block"):
        DesignSpace(model)
    space = DesignSpace(model, targets=r"encoder\..*Attention\..*")
    assert tuple(space.tensors) == ("q", "k", "v", "o")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [7]}, OptionError, "layer 7; the model has layers 0 to 4"),
        ({"layers": []}, OptionError, "each needs at least one choice"),
        ({"tensors": ["q_prj"]}, OptionError, "unknown tensor 'q_prj'; did you mean 'q_proj'"),
        ({"tensors": "q_proj"}, OptionError, "allowed: a list of names"),
        ({"tensors": []}, OptionError, "every choice needs at least one matrix"),
        ({"tensors": {"a": ["q_proj"], "b": ["q_proj"]}}, OptionError, "is in several choices"),
        ({"formats": ["tuker"]}, OptionError, "unknown format 'tuker'.*did you mean 'tucker'"),
        ({"ranks": [0]}, RankError, "rank=0; allowed: a whole number of at least 1"),
        ({"ranks": [1.5]}, RankError, "rank=1.5"),
        ({"ranks": [16]}, RankError, "rank=16 in format 'tucker' makes no matrix smaller"),
        ({"targets": ["lm_head"]}, TargetError, "are in: none"),
    ],
)
def test_broken_spaces_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        DesignSpace(CONFIG, **options)


def test_neither_a_model_nor_a_config_is_refused():
    with pytest.raises(ModelError, match="expected a transformers PreTrainedConfig, got str"):
        DesignSpace("my-model")


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (Configuration((9,), ALL), "layer 9; the model has layers 0 to 3"),
        (Configuration((1,), ("qproj",)), "unknown tensor 'qproj'"),
        (Configuration((1,), ALL, 1, "tt"), "unknown format 'tt'"),
    ],
)
def test_configurations_that_the_model_cannot_have_are_refused(configuration, message, space):
    with pytest.raises(OptionError, match=message):
        space.percent(configuration)


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (Configuration((0, 2), ALL), r"layers \[0\] are out of order"),
        (Configuration((2,), ALL[::-1]), "are not, in order, of"),
        (Configuration((2,), ("q_proj",)), "rule 'all-tensors' requires"),
        (Configuration((2,), ALL, 3), r"allowed: ranks \[1\]"),
    ],
)
def test_what_is_outside_a_space_is_said(configuration, message):
    space = DesignSpace(CONFIG, rules=INSIGHTS)
    assert message.replace("\\", "") in space.broken(configuration)


def test_other_counts_and_empty_compressions_are_refused(space, model):
    with pytest.raises(OptionError, match="count='papers'"):
        space.percent(DENSE, "papers")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match="decomposes no matrix: dense"):
        space.compress(model, DENSE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_configuration_is_data():
    made = Configuration((1, 2), ("q",), 3, "low-rank")
    assert Configuration.from_dict(made.to_dict()) == made
    assert Configuration((1,), ()).key == Configuration((), ("q",), 5).key == DENSE.key
    with pytest.raises(OptionError, match="is not a configuration"):
        Configuration.from_dict({"layers": [1]})
