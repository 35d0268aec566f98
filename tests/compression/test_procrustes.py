from __future__ import annotations

import logging

import pytest
import torch

import tnlm
from tnlm.compression.choices import gather_choices
from tnlm.compression.job import prepare
from tnlm.compression.pieces import Piece, alternate
from tnlm.compression.procrustes import rotated
from tnlm.compression.request import request_of
from tnlm.decompositions.kronecker import FORMAT, KroneckerSpec
from tnlm.errors import ModelError, OptionError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.targets.residual import residual_stream
from tnlm.tensors.procrustes import cayley

READERS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
SPEC = KroneckerSpec(terms=3, out_split=(1, 12), in_split=(4, 4))
DATA = {"calibration": torch.arange(512) % 61 + 3, "max_length": 32}


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def side(draw, size):
    root = draw(size, size)
    return Side(root @ root.T / size, 0.05)


def piece(draw, place, weight, *, reads, spec):
    metric = Metric(side(draw, weight.shape[0]), side(draw, weight.shape[1]))
    network = FORMAT.network(tuple(weight.shape), spec)
    return Piece(place, reads, weight, metric, network, FORMAT.fit(weight, metric, spec))


def planted(draw, turn, count=2):
    """Readers and writers that are Kronecker sums in a hidden basis."""
    other, pieces = KroneckerSpec(3, SPEC.in_split, SPEC.out_split), []
    for index in range(count):
        exact = torch.einsum("tac,tbd->abcd", draw(3, 1, 4), draw(3, 12, 4)).reshape(12, 16)
        pieces.append(piece(draw, f"norm{index}", exact @ turn.T, reads=True, spec=SPEC))
        pieces.append(piece(draw, f"out{index}", turn @ exact.T, reads=False, spec=other))
    return pieces


@pytest.mark.parametrize("seed", range(3))
def test_the_error_never_rises(seed):
    draw = drawn(seed)
    skew = draw(16, 16)
    pieces = planted(draw, cayley(skew - skew.T))
    rotation, errors = alternate(pieces, 3)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    eye = torch.eye(16, dtype=torch.float64)
    assert float((rotation.T @ rotation - eye).abs().max()) <= 1e-12


def test_the_errors_are_those_of_the_rotated_matrices():
    draw = drawn(0)
    skew = draw(16, 16)
    before = planted(draw, cayley(skew - skew.T))
    after = list(before)
    rotation, errors = alternate(after, 2)
    for old, new in zip(before, after, strict=True):
        back = new.fit @ rotation.T if old.reads else rotation @ new.fit
        there = new.metric.norm(new.weight - new.fit, keep=False)
        assert there == pytest.approx(old.metric.norm(old.weight - back, keep=False))
    assert errors[-1] == pytest.approx(sum(one.error for one in after))


def test_a_planted_basis_is_found_again(monkeypatch):
    monkeypatch.setattr("tnlm.compression.pieces.STALL", 0.0)
    draw = drawn(1)
    skew = draw(16, 16)
    pieces = planted(draw, cayley(0.05 * (skew - skew.T)), count=1)
    start = sum(one.error for one in pieces)
    _, errors = alternate(pieces, 12)
    assert errors[-1] <= 0.5 * start


def sums(model, rotation=None):
    """Return the error of Kronecker sums in the readers of a model."""
    chosen = {"targets": READERS, "in_split": [4, 8], "terms": 3}
    if rotation is not None:
        tnlm.rotate(model, rotation)
    tnlm.compress(model, "kron", **chosen, progress=False)
    return sum(layer.error**2 * layer.before.params for layer in tnlm.report(model).plan.layers)


def hidden_sums(model, turn):
    """Make the readers of a model Kronecker sums in a hidden basis."""
    draw = drawn(2)
    for name, module in model.named_modules():
        if name.endswith(tuple(READERS)):
            out = module.out_features
            exact = torch.einsum("tc,tbd->bcd", draw(3, 4), draw(3, out, 8)).reshape(out, 32)
            module.weight.data = (0.1 * exact @ turn.T).float()
    return model


def test_sums_in_a_hidden_basis_are_fitted_better_after_the_rotation(tiny_llama):
    turn = torch.linalg.qr(drawn(3)(32, 32))[0]
    chosen = {"targets": READERS, "in_split": [4, 8], "terms": 3}
    model = hidden_sums(tiny_llama(), turn)
    found = tnlm.procrustes_rotation(model, "kron", **chosen, rounds=3, progress=False)
    plain = sums(hidden_sums(tiny_llama(), turn))
    assert sums(model, found) <= 0.7 * plain


def test_it_leaves_the_model_and_says_what_was_gained(tiny_llama, caplog):
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, "tnlm"):
        found = tnlm.procrustes_rotation(
            model, "kron", targets=READERS, in_split=[4, 8], terms=3, **DATA, progress=False
        )
    assert found.dtype == torch.float64
    assert "squared error by rounds" in caplog.text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.config.tie_word_embeddings
    tnlm.rotate(model, found, untie=True)


def test_rotated_statistics_are_those_of_the_rotated_model(tiny_llama):
    model = tnlm.rotate(tiny_llama(), torch.eye(32))
    asked = gather_choices("kron", {**DATA, "keep_targets": 0.8})
    request = request_of(asked)
    job = prepare(model, request, None, None, asked.calibration, False)
    stream, turn = residual_stream(model), torch.linalg.qr(drawn(4)(32, 32))[0]
    turned = rotated(job.evidence, stream, turn)
    tnlm.rotate(model, turn)
    again = prepare(model, request, None, None, asked.calibration, False).evidence
    for target in job.selection.targets:
        for which in ("inputs", "outputs"):
            made, wanted = (getattr(e.metric(target), which).values for e in (turned, again))
            assert float((made - wanted).norm()) <= 1e-3 * float(wanted.norm())


def test_low_rank_has_nothing_to_gain(tiny_llama):
    with pytest.raises(OptionError, match="no linear layer that reads or writes"):
        tnlm.procrustes_rotation(tiny_llama(), "svd", rank=4, progress=False)


def test_metrics_that_depend_on_the_basis_are_refused(tiny_llama):
    with pytest.raises(OptionError, match="metric='diagonal' cannot be rotated; allowed: identity"):
        tnlm.procrustes_rotation(tiny_llama(), "kron", terms=2, metric="diagonal", **DATA)


def test_models_that_cannot_be_rotated_are_refused(make_model):
    with pytest.raises(ModelError, match="only an RMSNorm"):
        tnlm.procrustes_rotation(make_model("gpt2"), "kron", terms=2)


@pytest.mark.parametrize("rounds", [-1, 1.5, True, "2"])
def test_rounds_are_whole_numbers(rounds, tiny_llama):
    with pytest.raises(OptionError, match="rounds="):
        tnlm.procrustes_rotation(tiny_llama(), "kron", terms=2, rounds=rounds)
