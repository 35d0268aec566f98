"""Parameter counts and ranks that papers print, from shapes alone: no weights are made."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, LlamaConfig

from tnlm.allocation.last import schedule
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.kronecker import KroneckerSpec
from tnlm.decompositions.low_rank import LowRankSpec
from tnlm.decompositions.token_mps import TokenMPSSpec
from tnlm.decompositions.tucker import TuckerSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.schemes import get_scheme
from tnlm.schemes.tucker import paper_params
from tnlm.targets.selection import select

LLAMA_7B = 6_738_415_616
SQUARE, WIDE = (4096, 4096), (11008, 4096)


def on_meta(config, make=AutoModelForCausalLM.from_config):
    """Return a model of full size whose tensors have no data, and its parameter count."""
    with torch.device("meta"):
        model = make(config)
    return model, sum({id(p): p.numel() for p in model.parameters()}.values())


def compressed_count(total, targets, network_of):
    """Return the count once a network replaces every target."""
    return total - sum(target.params - network_of(target).params for target in targets)


def kept(scheme, shape, share):
    """Return the specs that a scheme tries for a matrix that keeps a share of its numbers."""
    structure, options = get_format(scheme.formats[0]), dict(scheme.defaults)
    return structure.candidates(shape, options, Ceiling(math.floor(share * math.prod(shape))))


# ALBERT, table 3 and the text


def test_albert_stores_v_e_plus_e_h():
    scheme = get_scheme("albert")
    spec = LowRankSpec(128, **scheme.defaults)
    assert get_format(scheme.formats[0]).network((30_000, 768), spec).params == 3_938_304


@pytest.mark.parametrize("name", ["albert", "tensorgpt", "kngpt2"])
def test_embeddings_of_papers_are_those_of_tokens(name):
    for config, make, table in [
        (BertConfig(num_hidden_layers=2), BertModel, "embeddings.word_embeddings"),
        (GPT2Config(n_layer=2), AutoModelForCausalLM.from_config, "transformer.wte"),
    ]:
        targets = select(on_meta(config, make)[0], get_scheme(name).targets).targets
        assert [t.module for t in targets if t.kind == "embedding"] == [table]


# FWSVD, as its group's later paper counts it: 67 % of the ranks removed leave 66.5 M


def test_fwsvd_at_a_third_of_the_ranks_leaves_66_5_million():
    model, total = on_meta(BertConfig(), BertModel)
    scheme = get_scheme("fwsvd")
    targets = select(model, scheme.targets, ignore=["pooler.dense"]).targets
    assert (total, len(targets)) == (109_482_240, 12 * 6)
    low_rank, spec = get_format(scheme.formats[0]), LowRankSpec(math.floor(0.33 * 768), gauge=False)
    found = compressed_count(total, targets, lambda t: low_rank.network(t.shape, spec))
    assert (spec.rank, found) == (253, 66_517_248)


def test_fwsvd_at_a_fifth_of_the_ranks_leaves_52_4_million():
    model, total = on_meta(BertConfig(), BertModel)
    targets = select(model, ignore=["pooler.dense"]).targets
    low_rank, spec = get_format("low-rank"), LowRankSpec(math.floor(0.22 * 768), gauge=False)
    found = compressed_count(total, targets, lambda t: low_rank.network(t.shape, spec))
    assert round(found / 1e6, 1) == 52.4


# KnGPT2: 124 M to about 83 M


def test_kngpt2_halves_the_odd_blocks_of_gpt2():
    model, total = on_meta(GPT2Config())
    scheme = get_scheme("kngpt2")
    targets = [t for t in select(model, scheme.targets).targets if t.kind == "linear"]
    assert total == 124_439_808
    assert {int(target.module.split(".")[2]) for target in targets} == {1, 3, 5, 7, 9, 11}
    assert sum(target.params for target in targets) == 6 * 12 * 768**2
    kronecker = get_format(scheme.formats[0])

    def halved(target):
        rows, columns = target.shape
        spec = KroneckerSpec(**scheme.defaults, out_split=(rows // 2, 2), in_split=(columns, 1))
        assert spec in kept(scheme, target.shape, scheme.keep_targets)
        return kronecker.network(target.shape, spec)

    # The small factors have two numbers, less one that a gauge saves.
    blocks = total - 6 * 6 * 768**2 + len(targets)
    assert compressed_count(total, targets, halved) == blocks
    table = get_format("kronecker-rows")
    [rows] = kept_rows((50257, 768), scheme)
    saved = 50257 * 768 - table.network((50257, 768), rows).params
    assert (rows.terms, rows.in_split) == (1, (384, 2))
    assert blocks - saved == 124_439_808 - 50257 * 384 - 6 * 6 * 768**2 + len(targets) + 2
    assert blocks - saved == pytest.approx(83.9e6, abs=0.05e6)


def kept_rows(shape, scheme):
    """Return the largest specs of a scheme's table: those that keep about half of it."""
    structure, most = get_format("kronecker-rows"), scheme.keep_targets * math.prod(shape)
    specs = structure.candidates(shape, dict(scheme.defaults), Ceiling(most))
    return [s for s in specs if structure.network(shape, s).params > 0.4 * math.prod(shape)]


def test_kngpt2_keeps_about_half_of_every_matrix_at_most():
    scheme = get_scheme("kngpt2")
    for shape in [(768, 768), (3072, 768), (768, 3072)]:
        specs = kept(scheme, shape, scheme.keep_targets)
        shares = [
            get_format("kronecker").network(shape, spec).params / math.prod(shape) for spec in specs
        ]
        assert max(shares) == pytest.approx(0.5, abs=1e-4)


# TensorGPT: a row of 768 = 3 x 2^8 numbers


def test_tensorgpt_at_rank_one_stores_19_numbers_a_token():
    [token_mps] = map(get_format, get_scheme("tensorgpt").formats)
    spec = TokenMPSSpec(in_split=(3,) + 8 * (2,), ranks=8 * (1,))
    assert token_mps.network((50257, 768), spec).params == 19 * 50257
    assert round(768 / 19, 1) == 40.4


def test_so_many_cores_are_contracted_at_once():
    """The order of nine contractions is found without trying all of them."""
    [token_mps] = map(get_format, get_scheme("tensorgpt").formats)
    limits = tuple(min(3 * 2**k, 2 ** (8 - k)) for k in range(8))
    spec = TokenMPSSpec(in_split=(3,) + 8 * (2,), ranks=limits)
    table = torch.randn(3, 768, generator=torch.Generator().manual_seed(0)).double()
    rebuilt = token_mps.reconstruct((3, 768), spec, token_mps.fit(table, Metric(), spec))
    torch.testing.assert_close(rebuilt, table)


# LLM-ROM: ranks of LLaMA-7B


@pytest.mark.parametrize(
    ("share", "attention", "feed_forward"),
    [(0.60, 1228, 1791), (0.46, 942, 1373), (0.33, 675, 985)],
)
def test_rom_ranks_are_the_published_ones(share, attention, feed_forward):
    scheme = get_scheme("rom")
    assert [spec.rank for spec in kept(scheme, SQUARE, share)] == [attention]
    assert [spec.rank for spec in kept(scheme, WIDE, share)] == [feed_forward]
    assert [spec.rank for spec in kept(scheme, WIDE[::-1], share)] == [feed_forward]


def test_one_of_roms_ranks_contradicts_its_own_share():
    # The paper prints 954 beside 1373; a share of 0.46 gives 942, and 954 needs more than 0.4658.
    scheme = get_scheme("rom")
    assert [spec.rank for spec in kept(scheme, SQUARE, 0.4659)] == [954]
    assert [spec.rank for spec in kept(scheme, WIDE, 0.4659)] != [1373]


@pytest.mark.parametrize(
    ("keep", "last", "share"), [(0.9, 8, 0.6), (0.8, 12, 0.46), (0.5, 24, 0.33)]
)
def test_rom_cuts_as_many_of_the_last_blocks_as_published(keep, last, share):
    count, found = schedule(keep, 32)
    assert count == last
    assert found == pytest.approx(share, abs=0.01)  # the paper rounds its shares down


# Tucker, Moar et al.: percentages in the data that come with their code


@pytest.fixture(scope="module")
def llama_layer():
    """Return the seven matrices of one layer of Llama-2-7B."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    model, total = on_meta(config)
    assert total == LLAMA_7B
    return [t.shape for t in select(model, r"model\.layers\.0\..*_proj").targets]


@pytest.mark.parametrize(
    ("layers", "percent", "exact"),
    [
        (2, 6.0, 6.004292181671211),
        (3, 9.0, 9.006438272506816),
        (5, 15.0, None),
        (7, 21.0, None),
        (11, 33.0, None),
        (16, 48.0, None),
        (32, 96.1, 96.06867490673937),
    ],
)
def test_tucker_at_rank_one_removes_what_the_paper_says(layers, percent, exact, llama_layer):
    assert len(llama_layer) == 7
    removed = sum(math.prod(shape) - paper_params(shape, 1) for shape in llama_layer)
    found = 100 * layers * removed / LLAMA_7B
    assert round(found, 1) == percent
    assert exact is None or found == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("rank", [1, 250, 500])
def test_the_paper_counts_a_core_that_ours_does_not_store(rank):
    for rows, columns in (SQUARE, WIDE):
        assert paper_params((rows, columns), rank) == rank * columns + rank**2 + rank * rows
        ours = get_format("tucker").network(
            (rows, columns), TuckerSpec((rows,), (columns,), (rank, rank))
        )
        assert ours.params == rank * (rows + columns)


@pytest.mark.parametrize("rank", [0, 6])
def test_the_paper_count_of_an_impossible_rank_is_refused(rank):
    with pytest.raises(RankError, match=f"rank={rank}; a 6x5 matrix allows 1 to 5"):
        paper_params((6, 5), rank)
