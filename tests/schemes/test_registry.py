"""Every scheme, as users find and run it; the registry is read, never listed."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import tnlm
from tests.conftest import cover, short_training
from tnlm.allocation import allocations
from tnlm.cli import main as cli
from tnlm.decompositions import formats, get_format
from tnlm.errors import CalibrationError, OptionError
from tnlm.layers.embedding import FactorizedEmbedding
from tnlm.metrics.named import measures
from tnlm.schemes import schemes
from tnlm.schemes.base import FITTED_TO_DATA, Scheme

MEASURES = measures()

DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
PUBLISHED = {
    "nothing": "albert btt kngpt2 kron shapeshifter svd tensorgpt tt tucker",
    "data": "aa-svd afm asvd basis-sharing modegpt rom sfsd svd-llm svd-llm-v2",
    "data and gradients": "fwsvd kfac-svd llm-surgeon lpaf tfwsvd",
}
every_scheme = pytest.mark.parametrize("name", sorted(schemes()))


def count(model):
    return sum(p.numel() for p in model.parameters())


def run(model, name, **arguments):
    data = {} if schemes()[name].needs == "nothing" else DATA
    data = data | short_training(name)
    return tnlm.compress(model, name, progress=False, **(data | arguments))


def dense(model, name):
    """Return the matrix and the bias of a module, as it stands for them."""
    module = model.get_submodule(name)
    weight = module.to_dense() if hasattr(module, "to_dense") else module.weight
    return weight.detach(), None if module.bias is None else module.bias.detach()


@every_scheme
def test_a_scheme_says_what_it_is_and_where_it_is_from(name):
    scheme = schemes()[name]
    assert scheme.name == name
    assert scheme.title
    assert re.search(r"(19|20)\d\d|arXiv \d{4}\.\d{5}|^tnlm;", scheme.source), scheme.source
    assert set(scheme.formats) <= set(formats())
    assert scheme.metric in MEASURES
    assert scheme.allocation in allocations()
    known = {field for f in scheme.formats for field in get_format(f).spec.__annotations__}
    assert set(scheme.defaults) <= known


@every_scheme
def test_a_scheme_asks_for_what_it_looks_at_and_no_more(name, make_model):
    scheme, model = schemes()[name], make_model("llama")
    if scheme.with_data:
        decided = tnlm.plan(model, name, keep_targets=0.5, progress=False, **DATA)
        chosen = {"metric": decided.metric, "allocation": decided.request["allocation"]}
        assert chosen == {"allocation": scheme.allocation, **scheme.with_data}
        assert scheme.with_data in (FITTED_TO_DATA, {"metric": "tokens"})
        with pytest.raises(OptionError, match="calibration= has no effect"):
            tnlm.compress(model, name, metric="identity", **DATA)
    elif scheme.needs == "nothing":
        with pytest.raises(OptionError, match="calibration= has no effect"):
            tnlm.compress(model, name, **DATA)
    else:
        with pytest.raises(CalibrationError, match="pass calibration="):
            tnlm.compress(model, name)


@pytest.mark.parametrize("needs", PUBLISHED)
def test_published_schemes_need_what_their_papers_need(needs):
    assert {schemes()[name].needs for name in PUBLISHED[needs].split()} == {needs}


@pytest.mark.parametrize("change", ["metric", "allocation", "cascade"])
def test_needs_follow_from_the_choices(change):
    chosen = {
        "metric": {"metric": "fisher-both"},
        "allocation": {"allocation": "loss"},
        "cascade": {"cascade": "sequential"},
    }[change]
    scheme = Scheme("mine", "a title", ("low-rank",), "2026", **chosen)
    assert scheme.needs == ("data" if change == "cascade" else "data and gradients")
    assert scheme.needs_calibration


@pytest.mark.parametrize(("kind", "name"), cover("llama", "gpt2"))
def test_a_scheme_runs_within_its_budget(kind, name, compressed, make_model):
    model = compressed(kind, name)
    report, scheme = tnlm.report(model), schemes()[name]
    unit = scheme.unit if scheme.formats else "bytes"
    after, before = (
        getattr(cost, unit) for cost in (report.plan.targets_after, report.plan.targets_before)
    )
    assert after <= scheme.keep_targets * before
    if scheme.precision is None:  # codes are no parameters
        assert count(model) == report.parameters_after < count(make_model(kind))
    with torch.no_grad():
        assert model(DATA["calibration"][:16][None]).logits.isfinite().all()


def test_the_command_line_lists_them_all(monkeypatch):
    monkeypatch.setattr(cli.console, "width", 200)
    shown = CliRunner().invoke(cli.app, ["schemes"], catch_exceptions=False)
    assert shown.exit_code == 0
    words = shown.stdout.split()
    assert all(name in words for name in schemes())
    rows = json.loads(CliRunner().invoke(cli.app, ["schemes", "--json"]).stdout)
    assert {name: row["needs"] for name, row in rows.items()} == {
        name: scheme.needs for name, scheme in schemes().items()
    }


# Schemes that differ by one choice agree where that choice makes no difference


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["rom", "aa-svd"])
def test_a_cascade_begins_as_svd_llm(scheme, kind, make_model):
    """Both streams agree at the first group of the first block; behind it they do not."""
    prefix, first, later = {
        "llama": ("model.layers.0.self_attn.", ["q_proj", "k_proj", "v_proj"], "o_proj"),
        "gpt2": ("transformer.h.0.attn.", ["c_attn.q", "c_attn.k", "c_attn.v"], "c_proj"),
    }[kind]
    size = {"rank": 5, "gauge": False}
    more = {"metric": "input", "blocks": 2} if scheme == "rom" else {"refine_passes": 0}
    cascade = run(make_model(kind), scheme, **size, **more)
    alone = run(make_model(kind), "svd-llm", **size)
    for name in first:
        ours, theirs = dense(cascade, prefix + name), dense(alone, prefix + name)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    weights = [dense(model, prefix + later)[0] for model in (cascade, alone)]
    assert float((weights[0] - weights[1]).norm()) > 1e-3 * float(weights[1].norm())


def test_rom_leaves_what_is_before_the_last_blocks(make_model):
    """With one block cut, what is before it is dense: its first group is svd-llm's."""
    model = run(make_model("llama"), "rom", metric="input", blocks=1, rank=5)
    alone = run(make_model("llama"), "svd-llm", rank=5, gauge=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    for ending in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{ending}"
        torch.testing.assert_close(dense(model, name), dense(alone, name), atol=1e-5, rtol=0)


def test_basis_sharing_of_one_block_is_svd_llm(make_model):
    shared = run(make_model("llama"), "basis-sharing", share=1, gauge=False)
    alone = run(make_model("llama"), "svd-llm", gauge=False)
    state = alone.state_dict()
    assert shared.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in shared.state_dict().items())


def test_basis_sharing_shares_what_reads_the_residual_stream(compressed):
    blocks = compressed("llama", "basis-sharing").model.layers
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        one, two = (block.get_submodule(name).right.weight for block in blocks)
        assert one is two
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        one, two = (block.get_submodule(name).right.weight for block in blocks)
        assert one is not two


@pytest.mark.parametrize("scheme", ["afm", "sfsd"])
def test_a_constant_in_a_bias_stays_a_constant(scheme, make_model):
    """The features' mean moves with the bias, their covariance does not."""
    found = []
    for constant in (0.0, 0.5):
        model = make_model("gpt2")
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.bias += constant
        run(model, scheme, targets=["1.mlp.c_proj"], rank=5, gauge=False)
        found.append(dense(model, "transformer.h.1.mlp.c_proj"))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1] + 0.5, found[1][1])


@pytest.mark.parametrize("kind", ["tied-llama", "gpt2"])
def test_alberts_lookups_and_tied_logits_are_those_of_its_product(kind, make_model):
    model, ids = run(make_model(kind), "albert", rank=7), torch.arange(3, 24)[None]
    table = model.get_input_embeddings()
    assert isinstance(table, FactorizedEmbedding)
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    product = table.left @ table.right
    torch.testing.assert_close(table(ids), product[ids])
    torch.testing.assert_close(model.get_output_embeddings()(hidden), hidden @ product.T)
