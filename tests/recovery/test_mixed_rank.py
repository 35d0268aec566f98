from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments

from tnlm.errors import OptionError, TargetError, TrainingError
from tnlm.layers.linear import FactorizedLinear
from tnlm.recovery.examples import batches, collate
from tnlm.recovery.mixed_rank import MixedRank, MixedRankTrainer, mixed, mixed_rank
from tnlm.recovery.model_kinds import examples_for

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
KINDS = ["llama", "gpt2", "classifier"]


@pytest.fixture(scope="module")
def parts_of(model_of):
    """Make a compressed model, the dense one, and the dense weights of its layers."""

    def make(kind):
        model, dense = model_of(kind, "svd"), model_of(kind)
        weights = {}
        for name, layer in model.named_modules():
            if isinstance(layer, FactorizedLinear):
                module, _, part = name.rpartition(".")
                fused = part in ("q", "k", "v")
                weight = dense.get_submodule(module if fused else name).weight.detach()
                weight = weight.T if kind == "gpt2" else weight
                rows = layer.out_features * "qkv".index(part) if fused else 0
                weights[name] = weight[rows : rows + layer.out_features].clone()
        return model, dense, weights

    return make


@pytest.fixture
def trainer(tmp_path):
    def make(model, layers, start=0.5, consistency=1.0):
        args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
        made = MixedRankTrainer(
            layers=layers,
            start=start,
            consistency=consistency,
            model=model,
            args=args,
            data_collator=collate,
        )
        made.state.max_steps = 10
        return made

    return make


def batch_of(kind, model, data_of):
    (batch,) = batches(examples_for(model, **data_of(kind)), 99)
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_at_0_it_is_the_factorized_model_and_at_1_the_dense_one(kind, parts_of, data_of):
    model, dense, weights = parts_of(kind)
    batch = batch_of(kind, model, data_of)
    factorized, wanted = model(**batch).logits, dense(**batch).logits
    assert not torch.allclose(factorized, wanted, atol=1e-4)
    with mixed(model, weights) as layers:
        assert len(layers) == len(weights)
        for layer in layers:  # the rest would drop out
            layer.train()
        state = torch.random.get_rng_state()
        assert torch.equal(model(**batch).logits, factorized)
        assert torch.equal(torch.random.get_rng_state(), state)
        for layer in layers:
            layer.probability = 1.0
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
        model.eval()
        assert torch.equal(model(**batch).logits, factorized)
    assert not any(isinstance(module, MixedRank) for module in model.modules())


def test_draws_are_bernoulli(parts_of):
    model, _, weights = parts_of("llama")
    name, weight = next(iter(weights.items()))
    layer = MixedRank(model.get_submodule(name), weight, 0.3).train()
    x = torch.ones(1, weight.shape[1])
    dense = F.linear(x, layer.dense, layer.factorized.bias)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [torch.equal(layer(x), dense) for _ in range(1000)]
    assert abs(sum(drawn) / 1000 - 0.3) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_equal_draws_do_not_diverge_and_others_do(kind, parts_of, data_of, trainer):
    model, _, weights = parts_of(kind)
    batch = batch_of(kind, model, data_of)

    def losses(start):
        found = []
        for consistency in (0.0, 5.0):
            torch.manual_seed(1)
            made = trainer(model, layers, start, consistency)
            found.append(float(made.compute_loss(model, dict(batch)).detach()))
        return found

    with mixed(model, weights) as layers, torch.random.fork_rng():
        for layer in layers:
            layer.train()
        for same in (0.0, 1.0):
            alone, both = losses(same)
            assert both == pytest.approx(alone, abs=1e-6)
        made = trainer(model, layers, 0.5, 5.0)
        torch.manual_seed(1)
        output = made.compute_loss(model, dict(batch), return_outputs=True)
        torch.manual_seed(1)
        first, second = model(**batch), model(**batch)
        real = batch["attention_mask"].bool() if kind != "classifier" else slice(None)
        p, q = (o.logits[real].log_softmax(-1) for o in (first, second))
        divergence = (p.exp() * (p - q)).sum(-1).mean()
        assert divergence.item() > 0
        expected = (first.loss + second.loss) / 2 + 5.0 * divergence
        torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-6)


def test_the_probability_falls_along_a_line(parts_of, data_of, monkeypatch):
    model, _, weights = parts_of("llama")
    seen, compute = [], MixedRankTrainer.compute_loss

    def watched(self, *given, **named):
        loss = compute(self, *given, **named)
        seen.append([layer.probability for layer in self._layers])
        return loss

    monkeypatch.setattr(MixedRankTrainer, "compute_loss", watched)
    mixed_rank(model, weights, **data_of("llama"), start=0.8, batch_size=4, progress=False)
    assert [set(step) for step in seen] == [{0.8 * (1 - step / 4)} for step in range(4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_dense", [True, False])
def test_dense_weights_learn_where_they_are_not_pruned(
    kind, train_dense, parts_of, data_of, monkeypatch
):
    model, _, weights = parts_of(kind)
    weights = {name: weight * (weight.abs() > 0.01) for name, weight in weights.items()}
    kept = {name: weight.clone() for name, weight in weights.items()}
    layers, train = [], MixedRankTrainer.train

    def watched(self, *given, **named):
        layers.extend(self._layers)
        return train(self, *given, **named)

    monkeypatch.setattr(MixedRankTrainer, "train", watched, raising=False)
    options = {"start": 1.0, "learning_rate": 1e-3, "batch_size": 4, "progress": False}
    mixed_rank(model, weights, **data_of(kind), **options, train_dense=train_dense)
    assert len(layers) == len(weights)
    for layer, (name, weight) in zip(layers, weights.items(), strict=True):
        assert torch.equal(weight, kept[name])  # the caller's
        assert torch.equal(layer.dense == 0, weight == 0)
        assert torch.equal(layer.dense, weight) == (not train_dense)


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_learn_and_nothing_else_changes(kind, start, parts_of, data_of, loss_of):
    model, _, weights = parts_of(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {name: weight.clone() for name, weight in weights.items()}
    loss, state = loss_of(model, data_of(kind)), torch.random.get_rng_state()
    options = {"start": start, "learning_rate": 1e-2, "batch_size": 4, "epochs": 4}
    assert mixed_rank(model, weights, **data_of(kind), **options, progress=False) is model
    assert loss_of(model, data_of(kind)) < loss
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [name for name, _ in model.named_parameters()] == list(before)
    for name, parameter in model.named_parameters():
        factor = any(name.startswith(layer + ".") for layer in weights)
        if not factor or name.endswith("bias"):
            assert torch.equal(parameter, before[name]), name
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


def test_a_batch_that_no_factor_took_part_in_teaches_nothing(parts_of, data_of):
    model, _, weights = parts_of("classifier")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = data_of("classifier")
    mixed_rank(model, weights, **given, start=1.0, batch_size=99, progress=False)  # one step
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_loss_that_is_lost_unwraps_the_layers(parts_of, data_of, lose_the_loss):
    model, _, weights = parts_of("llama")
    modules = {name: type(module) for name, module in model.named_modules()}
    lose_the_loss(model, after=5)
    options = {"batch_size": 2, "epochs": 4, "progress": False}
    with pytest.raises(TrainingError, match="try a lower learning_rate"):
        mixed_rank(model, weights, **data_of("llama"), **options)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"start": 1.5}, OptionError, "start=1.5; allowed: a probability, from 0 to 1"),
        ({"start": float("nan")}, OptionError, "start=nan"),
        ({"consistency": -1.0}, OptionError, "consistency=-1.0; allowed: a finite weight"),
        ({"output_dir": "run"}, OptionError, "this training cannot be resumed"),
        ({"dense": {}}, TargetError, "there is no factorized linear layer"),
        ({"dense": {"nowhere": torch.ones(1, 1)}}, TargetError, "no module at 'nowhere'"),
        ({"dense": {"lm_head": torch.ones(1, 1)}}, TargetError, "a Linear at 'lm_head'"),
        (
            {"dense": {"model.layers.0.self_attn.q_proj": torch.ones(3, 2)}},
            OptionError,
            r"a dense weight \(3, 2\) for a layer of shape \(32, 32\)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, error, message, parts_of, data_of):
    model, _, weights = parts_of("llama")
    with pytest.raises(error, match=message):
        mixed_rank(model, **({"dense": weights} | data_of("llama") | wrong))
    assert not any(isinstance(module, MixedRank) for module in model.modules())
