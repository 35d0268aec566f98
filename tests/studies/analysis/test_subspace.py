import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tnlm.errors import ModelError, OptionError, TrainingError
from tnlm.recovery.examples import training_set
from tnlm.studies.analysis.subspace import FullSpace, Subspace, layer_of
from tnlm.studies.analysis.subspace_search import bisect, try_all
from tnlm.studies.analysis.training import TrainingConfig, train

CHOICES = [(kind, projection) for kind in ("did", "said") for projection in ("dense", "fastfood")]
IDS = torch.arange(64) % 5 + 3


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


class Quadratic(nn.Module):
    """A loss that is 0 where k random linear equations hold: a solution set of codimension k."""

    def __init__(self, size, k, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.point = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.register_buffer("rows", torch.randn(k, size, generator=generator).double())
        self.register_buffer("values", torch.randn(k, generator=generator).double())

    def forward(self):
        return (self.rows @ self.point - self.values).square().sum()


def solved(model, d, projection, seed):
    space = Subspace(model, d, seed=seed, projection=projection)
    optimizer = torch.optim.LBFGS(
        space.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure():
        optimizer.zero_grad()
        loss = space()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(space().detach()) < 1e-8


@settings(max_examples=10)  # an example is a whole search
@pytest.mark.parametrize("projection", ["dense", "fastfood"])
@given(size=st.integers(40, 80), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_planted_codimension_is_found(size, k, seed, projection):
    model = Quadratic(size, k, seed)
    assert bisect(lambda d: solved(model, d, projection, seed), 1, size) == (k - 1, k)


@pytest.mark.parametrize(("kind", "projection"), CHOICES)
@pytest.mark.parametrize("of", ["llama", "tied-llama", "gpt2", "masked-bert"])
def test_nothing_changes_at_the_start(of, kind, projection, make_model):
    model = make_model(of)
    space = Subspace(model, 20, kind=kind, projection=projection)
    assert all(torch.equal(w, space.start[n]) for n, w in space.weights().items())
    ids = torch.arange(8)[None] + 3
    with torch.no_grad():
        assert torch.equal(space(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(("kind", "projection"), CHOICES)
def test_a_seed_gives_the_same_subspace_bit_for_bit(kind, projection, tiny_gpt2):
    model = tiny_gpt2(n_layer=1)
    spaces = [Subspace(model, 9, seed=s, kind=kind, projection=projection) for s in (3, 3, 4)]
    for space in spaces:
        nn.init.normal_(space.theta, generator=torch.Generator().manual_seed(0))
    first, again, other = (space.weights() for space in spaces)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("projection", ["dense", "fastfood"])
def test_columns_have_length_one_over_the_whole_model(projection, tiny_gpt2):
    space = Subspace(tiny_gpt2(n_layer=1), 6, projection=projection)
    columns = []
    for index in range(6):
        with torch.no_grad():
            space.theta.zero_()[index] = 1.0
            moved = space.weights()
        columns.append(torch.cat([(moved[n] - w).flatten() for n, w in space.start.items()]))
    matrix = torch.stack(columns, dim=1).double()
    error = matrix.T @ matrix - torch.eye(6, dtype=torch.float64)
    assert float(error.abs().max()) < 6 * (3 / space.total) ** 0.5


def test_said_takes_its_scales_out_of_d(tiny_gpt2):
    space = Subspace(tiny_gpt2(), 30, kind="said")
    # wte, wpe, two blocks, ln_f; the head is tied to wte.
    assert len(space.scales) == 5
    assert len(space.theta) == 25
    assert space.d == 30
    assert Subspace(tiny_gpt2(), 30, kind="did").d == 30
    nn.init.ones_(space.theta)
    before = space.weights()
    with torch.no_grad():
        space.scales[2] = 3.0
    after = space.weights()
    for name, start in space.start.items():
        ratio = 3.0 if layer_of(name) == "transformer.h.0" else 1.0
        moved = after[name] - start
        torch.testing.assert_close(moved, ratio * (before[name] - start), atol=1e-6, rtol=1e-3)


def test_layers_are_blocks_and_what_stands_outside():
    assert layer_of("weight") == ""
    assert layer_of("0.weight") == "0"
    assert layer_of("model.layers.3.mlp.experts.7.weight") == "model.layers.3"
    assert layer_of("x1.norm.weight") == "x1.norm"


@pytest.mark.parametrize(("kind", "projection"), CHOICES)
def test_training_leaves_the_model_alone_until_it_is_written(kind, projection, tiny_gpt2):
    model = tiny_gpt2(n_layer=1)
    before, random = state(model), torch.get_rng_state()
    ids = torch.arange(8)[None] % 5 + 3
    space = Subspace(model, 60, kind=kind, projection=projection)
    train(space, training_set(IDS, max_length=16), TrainingConfig(20, 2, 1e-3))
    with torch.no_grad():
        at_start, trained = model(ids, labels=ids), space(ids, labels=ids)
    assert float(trained.loss) < float(at_start.loss)
    assert same(model, before)
    with space.applied() as lent:
        assert lent is model
        torch.testing.assert_close(lent(ids).logits, trained.logits)
    assert same(model, before)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert space.write() is model
    torch.testing.assert_close(model(ids).logits, trained.logits)
    torch.testing.assert_close(space(ids).logits, trained.logits)  # it starts there anew
    assert float(space.theta.detach().abs().max()) == 0.0


def test_a_model_in_half_precision_is_moved_in_single(tiny_gpt2):
    model = tiny_gpt2(n_layer=1).bfloat16()
    space = Subspace(model, 9)
    assert space.theta.dtype == torch.float32
    assert {weight.dtype for weight in space.weights().values()} == {torch.bfloat16}
    assert all(torch.equal(w, space.start[n]) for n, w in space.weights().items())


def test_what_is_frozen_stays(tiny_gpt2):
    model = tiny_gpt2(n_layer=1)
    model.transformer.wpe.weight.requires_grad_(False)
    for space in (FullSpace(model), Subspace(model, 5)):
        assert "transformer.wpe.weight" not in space.weights()
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of GPT2LMHeadModel requires a gradient"):
        Subspace(model, 5)


def test_buffers_are_not_changed():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x)

    model = Normed()
    before = state(model)
    Subspace(model, 2)(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert same(model, before)


@pytest.mark.parametrize(
    ("d", "kind", "message"),
    [
        (0, "did", "d=0; allowed: a whole number from 1 to 15"),
        (16, "did", "d=16; allowed: a whole number from 1 to 15"),
        (True, "did", "d=True; allowed"),
        (1, "said", "d=1; allowed: a whole number from 2 to 15"),
    ],
)
def test_impossible_sizes_are_refused(d, kind, message):
    with pytest.raises(OptionError, match=message):
        Subspace(nn.Linear(4, 3), d, kind=kind)


def test_unknown_choices_are_refused():
    with pytest.raises(OptionError, match="kind='sad'; did you mean 'said'"):
        Subspace(nn.Linear(4, 3), 2, kind="sad")
    with pytest.raises(OptionError, match="projection='dens'; did you mean 'dense'"):
        Subspace(nn.Linear(4, 3), 2, projection="dens")


def test_a_point_that_is_not_finite_is_not_written():
    model = nn.Linear(4, 3)
    before, space = state(model), Subspace(model, 2)
    nn.init.constant_(space.theta, float("inf"))
    with pytest.raises(TrainingError, match="is not finite; the model is left unchanged"):
        space.write()
    assert same(model, before)


def test_a_loss_that_is_lost_is_an_error_and_changes_nothing(tiny_gpt2):
    model = tiny_gpt2(n_layer=1)
    before = state(model)
    for space in (Subspace(model, 5), FullSpace(model)):
        with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+ of 9; try a"):
            train(space, training_set(IDS, max_length=16), TrainingConfig(9, 2, 1e30))
        assert same(model, before)
        assert not model.training


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ((0, 1, 0.1), "steps=0; allowed: a whole number of at least 1"),
        ((1, 0, 0.1), "batch_size=0; allowed"),
        ((True, 1, 0.1), "steps=True; allowed"),
        ((1, 1, True), "learning_rate=True; allowed"),
        ((1, 1, -1.0), "learning_rate=-1.0; allowed: a finite number above 0"),
        ((1, 1, float("nan")), "learning_rate=nan; allowed"),
    ],
)
def test_a_training_is_checked(config, message):
    with pytest.raises(OptionError, match=message):
        TrainingConfig(*config)


@given(limit=st.integers(1, 500), least=st.integers(1, 20), most=st.integers(1, 500))
def test_the_search_brackets_the_limit(limit, least, most):
    most = max(least, most)
    tried = []

    def enough(d):
        assert least <= d <= most
        tried.append(d)
        return d >= limit

    found = bisect(enough, least, most)
    assert len(tried) == len(set(tried))
    if limit > most:
        assert found is None
        return
    low, high = found
    assert high in tried
    assert low == least - 1 or low in tried
    assert low < max(limit, least) <= high
    assert high <= max(1.1 * low, low + 1)


def test_a_sweep_tries_all():
    tried = []
    assert try_all(lambda d: tried.append(d) or d in (8, 32), [32, 4, 8, 16], least=3) == (4, 8)
    assert tried == [4, 8, 16, 32]
    assert try_all(lambda d: True, [5], least=3) == (2, 5)
    assert try_all(lambda d: False, [5], least=3) is None


def test_two_copies_train_to_the_same_bits(tiny_gpt2):
    model = tiny_gpt2(n_layer=1, resid_pdrop=0.3)
    found = []
    for one in (model, copy.deepcopy(model)):
        space = Subspace(one, 7, seed=5)
        train(space, training_set(IDS, max_length=16), TrainingConfig(4, 2, 1e-3), seed=1)
        found.append(space.theta.detach())
    assert torch.equal(*found)
