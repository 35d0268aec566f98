from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tnlm
from tnlm.decompositions import low_rank
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.kronecker_rows import FORMAT, KroneckerRowsSpec
from tnlm.errors import OptionError, RankError
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.metrics.metric import Metric

seeds, sizes = st.integers(0, 20), st.integers(1, 6)


def fitted(table, spec):
    return FORMAT.reconstruct(tuple(table.shape), spec, FORMAT.fit(table, Metric(), spec))


def kron_rows(left, right):
    """Return the sum of ``kron(left[t], right[t])`` as torch computes it."""
    pairs = zip(left.transpose(0, 1), right, strict=True)
    return sum(torch.kron(a, b[None]) for a, b in pairs)


@given(rows=sizes, outer=sizes, inner=sizes, part=st.floats(0, 1), seed=seeds)
def test_it_is_the_nearest_sum_of_kronecker_products(rows, outer, inner, part, seed, gaussian):
    table = gaussian(rows, outer * inner, seed=seed)
    spec = KroneckerRowsSpec(max(1, round(part * min(rows * outer, inner))), (outer, inner))
    factors = FORMAT.fit(table, Metric(), spec)
    rebuilt = FORMAT.reconstruct(tuple(table.shape), spec, factors)
    torch.testing.assert_close(rebuilt, kron_rows(**factors))
    # Its squared error is the tail of the pieces' singular values, which nothing can beat.
    energy = torch.linalg.svdvals(table.reshape(rows * outer, inner)).square()
    tail = float(energy[spec.terms :].sum())
    assert float((table - rebuilt).square().sum()) == pytest.approx(tail, abs=1e-10)
    [reported] = FORMAT.errors(table, Metric(), [spec])
    assert reported == pytest.approx((tail / float(energy.sum())) ** 0.5, abs=1e-7)


@given(rows=sizes, outer=sizes, inner=sizes, terms=st.integers(1, 3), seed=seeds)
def test_a_table_of_this_form_is_found_again(rows, outer, inner, terms, seed, gaussian):
    terms = min(terms, rows * outer, inner)
    left, right = gaussian(rows, terms, outer, seed=seed), gaussian(terms, inner, seed=seed + 1)
    table = kron_rows(left, right)
    spec = KroneckerRowsSpec(terms, (outer, inner))
    torch.testing.assert_close(fitted(table, spec), table, atol=1e-9, rtol=1e-9)
    found = {s.in_split: s.terms for s in FORMAT.within(table, Metric(), {}, 1e-6)}
    assert found.get((outer, inner), 0) <= terms


@given(rows=sizes, width=st.integers(2, 12), rank=sizes, seed=seeds)
def test_whole_rows_as_pieces_are_low_rank(rows, width, rank, seed, gaussian):
    table, rank = gaussian(rows, width, seed=seed), min(rank, rows, width)
    other = low_rank.FORMAT.fit(table, Metric(), low_rank.LowRankSpec(rank, gauge=False))
    ours = fitted(table, KroneckerRowsSpec(rank, (1, width)))
    torch.testing.assert_close(ours, other["left"] @ other["right"], atol=1e-9, rtol=0)


def test_pieces_of_one_number_are_exact_and_never_proposed(gaussian):
    table = gaussian(9, 6)
    spec = KroneckerRowsSpec(1, (6, 1))  # KnGPT2's rule with f = 1
    torch.testing.assert_close(fitted(table, spec), table)
    assert FORMAT.network((9, 6), spec).params == 9 * 6 + 1
    splits = [spec.in_split for spec in FORMAT.candidates((9, 6), {}, Ceiling())]
    assert splits == [(1, 6), (2, 3), (3, 2)]
    assert [s.in_split for s in FORMAT.within(table, Metric(), {}, 0.1)] == splits


@given(rows=sizes, outer=sizes, inner=sizes, part=st.floats(0, 1), seed=seeds)
def test_lookups_and_logits_are_those_of_the_table(rows, outer, inner, part, seed, gaussian):
    table = gaussian(rows, outer * inner, seed=seed)
    spec = KroneckerRowsSpec(max(1, round(part * min(rows * outer, inner))), (outer, inner))
    factors, network = FORMAT.fit(table, Metric(), spec), FORMAT.network(tuple(table.shape), spec)
    rebuilt = kron_rows(**factors)
    ids, hidden = torch.arange(rows).flip(0), gaussian(2, 3, outer * inner, seed=seed)
    embedding = FactorizedEmbedding(network, dtype=torch.float64).store(factors)
    torch.testing.assert_close(embedding(ids), rebuilt[ids])
    head = FactorizedHead(network, dtype=torch.float64).store(factors)
    torch.testing.assert_close(head(hidden), F.linear(hidden, rebuilt))


@given(rows=sizes, width=st.integers(1, 12), keep=st.floats(0, 1.5))
def test_no_more_terms_would_fit(rows, width, keep):
    budget = Ceiling(keep * rows * width)
    found = FORMAT.candidates((rows, width), {}, budget)
    for spec in found:
        numbers = rows * spec.in_split[0] + spec.in_split[1]
        assert FORMAT.network((rows, width), spec).params == spec.terms * numbers <= budget.params
        full = min(rows * spec.in_split[0], spec.in_split[1])
        assert spec.terms == full or (spec.terms + 1) * numbers > budget.params
    splits = [
        (width // d, d) for d in range(1, width + 1) if width % d == 0 and (d > 1 or d == width)
    ]
    fitting = {split for split in splits if rows * split[0] + split[1] <= budget.params}
    assert {spec.in_split for spec in found} == fitting


def test_options_fix_the_spec():
    def specs(budget=2000, **options):
        return FORMAT.candidates((100, 24), options, Ceiling(budget))

    assert specs(terms=1, in_split=[12, 2]) == [KroneckerRowsSpec(1, (12, 2))]
    assert specs(in_split=[6, 4]) == [KroneckerRowsSpec(3, (6, 4))]
    assert {spec.terms for spec in specs(terms=2)} == {2}
    assert specs(1000, terms=1, in_split=[12, 2]) == []  # too large, but not impossible


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": 25}, "terms=25; a 100x24 table has at most 24"),
        ({"terms": 3, "in_split": (12, 2)}, "terms=3; a 100x24 table has at most 2"),
        ({"in_split": (2, 3, 4)}, "in_split=.* 2 sizes"),
        ({"in_split": (5, 5)}, "in_split=.* multiplies to 25, not to 24"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(RankError, match=message):
        FORMAT.candidates((100, 24), options, Ceiling())


def test_a_spec_of_other_than_two_sizes_is_refused():
    with pytest.raises(RankError, match=r"in_split=.*two sizes"):
        FORMAT.network((100, 24), KroneckerRowsSpec(1, (2, 3, 4)))


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["shapeshifter", "kngpt2"])
def test_schemes_factorize_their_embeddings(kind, scheme, make_model, tmp_path):
    model, ids = make_model(kind), torch.arange(3, 24)[None]
    tnlm.compress(model, scheme, keep_targets=0.6)
    layers = {layer.name: layer for layer in tnlm.report(model).plan.layers}
    tables = {name: layer for name, layer in layers.items() if layer.kind == "embedding"}
    # Positions are a matrix of the model, too; KnGPT2 leaves them alone.
    assert len(tables) == (2 if (kind, scheme) == ("gpt2", "shapeshifter") else 1)
    assert {layer.format for layer in tables.values()} == {"kronecker-rows"}
    assert {la.format for la in layers.values()} == {"kronecker-rows", "kronecker"}
    assert isinstance(model.get_input_embeddings(), FactorizedEmbedding)
    tied = kind != "llama"
    assert isinstance(model.get_output_embeddings(), FactorizedHead) == tied
    with torch.no_grad():
        before = model(ids).logits
        tnlm.save(model, tmp_path / "saved")
        assert torch.equal(tnlm.load(tmp_path / "saved")(ids).logits, before)
        dense = tnlm.to_dense(model)(ids).logits
    torch.testing.assert_close(dense, before, atol=1e-4, rtol=1e-4)


def test_options_reach_the_formats_that_have_them(make_model):
    decided = tnlm.plan(make_model("gpt2"), "kngpt2", in_split=[16, 2], targets=["wte", "c_attn"])
    specs = {layer.name.rpartition(".")[2]: layer.spec for layer in decided.layers}
    assert specs["wte"] == {"terms": 1, "in_split": [16, 2]}
    assert specs["q"]["in_split"] == [16, 2]
    assert specs["q"]["terms"] == 1
    decided = tnlm.plan(make_model("llama"), "shapeshifter", out_split=[8, 4], targets=["o_proj"])
    assert {tuple(layer.spec["out_split"]) for layer in decided.layers} == {(8, 4)}


@pytest.mark.parametrize("options", [{"in_split": [6, 8]}, {"terms": 33}])
def test_an_embedding_that_cannot_have_the_options_is_named(options, make_model):
    """48 inputs of a down projection, 32 of the table: only the first can have it."""
    model = make_model("llama")
    with pytest.raises(RankError, match=r"embed_tokens: .*ignore=") as caught:
        tnlm.plan(model, "shapeshifter", targets=["embed_tokens", "0.mlp.down_proj"], **options)
    assert isinstance(caught.value, OptionError)
    assert next(iter(options)) in str(caught.value)


def test_a_table_that_cannot_shrink_enough_stays_dense(make_model):
    options = {"targets": ["embed_tokens", "up_proj"], "in_split": [16, 2]}
    decided = tnlm.plan(make_model("llama"), "shapeshifter", keep_targets=0.4, **options)
    table, *others = decided.layers
    assert table.format is None
    assert table.note == "no kronecker-rows of at most 819 parameters"
    assert {layer.format for layer in others} == {"kronecker"}


@pytest.mark.parametrize("scheme", ["shapeshifter", "kngpt2"])
def test_under_data_the_embedding_is_passed_over(scheme, make_model):
    data = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
    decided = tnlm.plan(make_model("llama"), scheme, metric="input", **data)
    assert {layer.format for layer in decided.layers} == {"kronecker"}
    assert "no input to measure" in decided.skipped["model.embed_tokens"]
