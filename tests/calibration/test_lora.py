from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import tnlm
from tnlm.calibration.data import token_batches
from tnlm.calibration.gradients import collect_gradients
from tnlm.calibration.labels import with_labels
from tnlm.calibration.lora import collect_lora, importance_sums, lora_gradient, lora_statistics
from tnlm.errors import CalibrationError, OptionError, RankError

IDS = torch.arange(96) * 7 % 61 + 3
BATCHES = token_batches(IDS, max_length=16)
RAGGED = [[3, 14, 25, 6], [17, 8, 39], [10, 51]]
UP, OUTPUT = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"
FUSED, CONV = "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"
DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32, "progress": False}
collect = functools.partial(collect_lora, progress=False)


def orthogonal(gaussian, rank, size, seed=0):
    return torch.linalg.qr(gaussian(size, rank, seed=seed))[0].T


def lora_of(gaussian, seed=0, out=6, rank=3, size=5):
    """A, B, grad_A, grad_B and the weight."""
    shapes = ((rank, size), (out, rank), (rank, size), (out, rank), (out, size))
    return [gaussian(*shape, seed=seed + n) for n, shape in enumerate(shapes)]


def ranked(values):
    return values.argsort().argsort().double()


def spearman(a, b):
    return float(torch.corrcoef(torch.stack([ranked(a), ranked(b)]))[0, 1])


# The formulae


@given(seed=st.integers(0, 40), step=st.sampled_from([0.0, 0.3, 1.0]))
def test_the_gradient_is_the_change_in_a_step(seed, step, gaussian):
    A, B, grad_A, grad_B, _ = lora_of(gaussian, seed)
    whole = lora_gradient(A, B, grad_A, grad_B, step=1.0)
    torch.testing.assert_close(whole, B @ A - (B - grad_B) @ (A - grad_A))
    some = lora_gradient(A, B, grad_A, grad_B, step)
    torch.testing.assert_close(some, grad_B @ A + B @ grad_A - step * grad_B @ grad_A)


@given(seed=st.integers(0, 40))
def test_a_small_step_is_the_first_order(seed, gaussian):
    A, B, grad_A, grad_B, _ = lora_of(gaussian, seed)
    first = lora_gradient(A, B, grad_A, grad_B)
    for step in (1e-3, 1e-6):
        error = (lora_gradient(A, B, grad_A, grad_B, step) - first).norm()
        torch.testing.assert_close(error, step * (grad_B @ grad_A).norm(), rtol=1e-6, atol=1e-14)


@given(
    seed=st.integers(0, 40),
    step=st.sampled_from([0.0, 0.3, 1.0]),
    scaling=st.sampled_from([0.5, 2.0]),
)
def test_sums_are_of_the_whole_matrix(seed, step, scaling, gaussian):
    A, B, grad_A, grad_B, W = lora_of(gaussian, seed)
    gradient = lora_gradient(A, B, grad_A, grad_B, step)
    for kind, entries in (("fisher", gradient), ("taylor", gradient * (W + scaling * B @ A))):
        rows, columns = importance_sums(
            A, B, grad_A, grad_B, W, scaling=scaling, step=step, kind=kind
        )
        torch.testing.assert_close(rows, entries.square().sum(1))
        torch.testing.assert_close(columns, entries.square().sum(0))


def test_blocks_of_rows_are_the_whole(gaussian, monkeypatch):
    parts = lora_of(gaussian)
    whole = importance_sums(*parts, kind="taylor")
    monkeypatch.setattr("tnlm.calibration.lora_sums.BLOCK", 8)  # one row of five at a time
    for a, b in zip(importance_sums(*parts, kind="taylor"), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_taylor_needs_a_weight_and_kinds_are_known(gaussian):
    parts = lora_of(gaussian)[:4]
    with pytest.raises(OptionError, match="needs the weight"):
        importance_sums(*parts, None, kind="taylor")
    with pytest.raises(OptionError, match="kind='fischer'; did you mean 'fisher'"):
        importance_sums(*parts, None, kind="fischer")


@given(seed=st.integers(0, 20), kind=st.sampled_from(["fisher", "taylor"]))
def test_square_orthogonal_rows_see_the_whole_gradient(seed, kind, gaussian):
    G, W = gaussian(6, 5, seed=seed), gaussian(6, 5, seed=seed + 1)
    A = orthogonal(gaussian, 5, 5, seed=seed + 2)
    rows, columns = importance_sums(
        A, torch.zeros(6, 5).double(), torch.zeros_like(A), G @ A.T, W, kind=kind
    )
    entries = (G if kind == "fisher" else G * W).square()
    torch.testing.assert_close(rows, entries.sum(1))
    torch.testing.assert_close(columns, entries.sum(0))


def test_rows_are_ranked_better_the_larger_the_rank(gaussian):
    size, found = 24, []
    G = gaussian(40, size) * torch.linspace(0.5, 2.0, 40)[:, None]
    for rank in (1, 4, 12, 24):
        seen = []
        for seed in range(8):
            A = orthogonal(gaussian, rank, size, seed=seed)
            B = torch.zeros(40, rank).double()
            rows, _ = importance_sums(A, B, torch.zeros_like(A), G @ A.T, None)
            seen.append(spearman(rows, G.square().sum(1)))
        found.append(sum(seen) / len(seen))
    assert found == sorted(found)
    assert found[0] < 0.8
    assert found[-1] == pytest.approx(1.0)


# On models


@pytest.mark.parametrize(("kind", "name"), [("llama", OUTPUT), ("gpt2", CONV), ("llama", UP)])
def test_at_full_rank_a_model_gives_its_own_fisher(kind, name, make_model):
    model = make_model(kind)
    fisher = collect_gradients(
        model, [name], BATCHES, fisher=True, labels="data", progress=False
    ).tensor(name, "fisher")
    found, _ = collect(model, [name], with_labels(model, BATCHES), rank=32, alpha=7.0)
    torch.testing.assert_close(found[name]["outputs"].float(), fisher.sum(1), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found[name]["inputs"].float(), fisher.sum(0), rtol=1e-3, atol=1e-9)


def blocks(rows, parts):
    return [slice(start, start + rows // parts) for start in range(0, rows, rows // parts)]


@pytest.mark.parametrize(("kind", "name", "parts"), [("llama", UP, 1), ("gpt2", FUSED, 3)])
def test_a_lora_that_sees_inputs_gives_their_fisher_at_full_rank(kind, name, parts, make_model):
    model = make_model(kind)
    fisher = collect_gradients(
        model, [name], BATCHES, fisher=True, labels="data", progress=False
    ).tensor(name, "fisher")
    rank = len(fisher) // parts if parts > 1 else min(fisher.shape)
    if rank * parts > min(fisher.shape):
        rank = min(fisher.shape) // parts
    options = {
        "rank": rank,
        "alpha": 7.0,
        "sees": "inputs",
        "parts": {name: blocks(len(fisher), parts)},
    }
    found, loras = collect(model, [name], with_labels(model, BATCHES), **options)
    assert not loras[name].A.any()
    expected = torch.stack([part.sum(0) for part in fisher.chunk(parts)]).squeeze(0)
    if rank == len(fisher) // parts:  # B is square in every block
        torch.testing.assert_close(found[name]["inputs"].float(), expected, rtol=1e-3, atol=1e-9)
    else:
        assert found[name]["inputs"].shape == expected.shape
        assert bool((found[name]["inputs"] <= 1.001 * expected + 1e-9).all())  # a projection


def test_each_side_is_seen_best_by_the_lora_that_does_not_mix_it(make_model):
    model = make_model("llama")
    data = with_labels(model, BATCHES)
    fisher = collect_gradients(
        model, [UP], BATCHES, fisher=True, labels="data", progress=False
    ).tensor(UP, "fisher")
    true = {"outputs": fisher.sum(1).double(), "inputs": fisher.sum(0).double()}
    near = {}
    for sees in ("outputs", "inputs"):
        seeds = [collect(model, [UP], data, rank=4, sees=sees, seed=s)[0][UP] for s in range(5)]
        for side, wanted in true.items():
            pairs = [torch.corrcoef(torch.stack([f[side], wanted]))[0, 1] for f in seeds]
            near[sees, side] = float(torch.stack(pairs).mean())
    assert near["outputs", "outputs"] > near["inputs", "outputs"]
    assert near["inputs", "inputs"] > near["outputs", "inputs"]


def test_statistics_are_right_on_average(make_model):
    model = make_model("llama")
    fisher = collect_gradients(
        model, [UP], BATCHES, fisher=True, labels="data", progress=False
    ).tensor(UP, "fisher")
    store = lora_statistics(
        model, {UP: [slice(None)]}, BATCHES, outputs=True, rank=8, progress=False
    )
    for side, axis in (("inputs", 0), ("outputs", 1)):
        found = store.tensor(UP, f"lora_{side}")
        assert found.shape == fisher.sum(axis).shape
        assert 0.5 < float(found.sum() / fisher.sum()) < 2.0
    only = lora_statistics(model, {UP: [slice(None)]}, BATCHES, progress=False)
    with pytest.raises(CalibrationError, match="lora_outputs"):
        only.tensor(UP, "lora_outputs")


def test_a_fused_module_has_columns_of_its_parts(make_model):
    model = make_model("gpt2")
    data = with_labels(model, BATCHES)
    together, _ = collect(model, [FUSED], data)
    apart, _ = collect(model, [FUSED], data, parts={FUSED: blocks(96, 3)})
    assert apart[FUSED]["inputs"].shape == (3, 32)
    torch.testing.assert_close(apart[FUSED]["inputs"].sum(0), together[FUSED]["inputs"])
    torch.testing.assert_close(apart[FUSED]["outputs"], together[FUSED]["outputs"])


def test_parts_may_be_unequal_and_alternate(make_model):
    model = make_model("gpt2")
    data = with_labels(model, BATCHES)
    together, _ = collect(model, [FUSED], data)
    rows = torch.arange(96)
    parts = [rows[rows % 4 == 0], rows[rows % 4 > 0]]
    apart, _ = collect(model, [FUSED], data, parts={FUSED: parts})
    torch.testing.assert_close(apart[FUSED]["inputs"].sum(0), together[FUSED]["inputs"])
    torch.testing.assert_close(apart[FUSED]["outputs"], together[FUSED]["outputs"])
    store = lora_statistics(model, {FUSED: parts}, BATCHES, outputs=True, progress=False)
    assert store.tensor(FUSED, "lora_inputs").shape == (2, 32)


@pytest.mark.parametrize("kind", ["fisher", "taylor"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_batches_make_no_difference(kind, side, make_model):
    model = make_model("llama")
    alone = [{k: torch.tensor([v]) for k, v in _one(ids).items()} for ids in RAGGED]
    width = max(map(len, RAGGED))
    rows = [{k: _pad(v, width, k, side) for k, v in _one(ids).items()} for ids in RAGGED]
    padded = [{key: torch.tensor([row[key] for row in rows]) for key in rows[0]}]
    one, _ = collect(model, [UP, OUTPUT], alone, kind=kind)
    other, _ = collect(model, [UP, OUTPUT], padded, kind=kind)
    for name in (UP, OUTPUT):
        for which in ("outputs", "inputs"):
            torch.testing.assert_close(one[name][which], other[name][which], rtol=1e-4, atol=1e-12)


def _one(ids):
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]}


def _pad(values, width, key, side):
    fill = [{"input_ids": 0, "attention_mask": 0, "labels": -100}[key]] * (width - len(values))
    return [*values, *fill] if side == "right" else [*fill, *values]


def test_sequences_are_classified(tiny_bert):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert().config).eval()
    ids = IDS[:64].reshape(4, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.tensor([0, 1, 1, 0])
    name = "bert.encoder.layer.0.output.dense"
    found, loras = collect(model, [name], [batch], rank=4)
    assert found[name]["outputs"].shape == (32,)
    assert found[name]["inputs"].shape == (48,)
    assert found[name]["inputs"].min() >= 0
    assert found[name]["inputs"].max() > 0
    assert loras[name].A.shape == (4, 48)


def test_labels_follow_the_model(make_model):
    batch = token_batches([[5, 6, 7, 8], [9, 10]], batch_size=2)[0]
    [causal] = with_labels(make_model("llama"), [batch])
    assert causal["labels"].tolist() == [[-100, 6, 7, 8], [-100, 10, -100, -100]]
    [masked] = with_labels(make_model("masked-bert"), [batch])
    assert masked["labels"].tolist() == [[5, 6, 7, 8], [9, 10, -100, -100]]
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    [both] = with_labels(t5, [batch])
    assert both["labels"].tolist() == [[6, 7, 8, -100], [10, -100, -100, -100]]
    name = "decoder.block.0.layer.0.SelfAttention.q"
    found, _ = collect(t5, [name], [both], rank=2)
    assert found[name]["inputs"].max() > 0
    with pytest.raises(CalibrationError, match="BertModel has none"):
        with_labels(make_model("bert"), [batch])


def test_training_moves_the_lora_and_what_it_sees(make_model):
    model = make_model("llama")
    data = with_labels(model, BATCHES)
    still, start = collect(model, [UP], data)
    moved, trained = collect(model, [UP], data, steps=12, learning_rate=1e-2)
    assert not start[UP].B.any()
    assert trained[UP].B.any()
    assert not torch.allclose(still[UP]["inputs"], moved[UP]["inputs"])
    state = model.state_dict()
    before = float(model(**data[0]).loss.detach())
    state[UP + ".weight"] += trained[UP].delta().float()
    assert float(model(**data[0]).loss.detach()) < before


def test_a_moving_average_forgets(make_model):
    model = make_model("llama")
    data = with_labels(model, BATCHES[:2])
    each = [collect(model, [UP], [batch])[0][UP]["inputs"] for batch in data]
    found, _ = collect(model, [UP], data, decay=0.25)
    torch.testing.assert_close(found[UP]["inputs"], 0.2 * each[0] + 0.8 * each[1])
    plain, _ = collect(model, [UP], data)
    torch.testing.assert_close(plain[UP]["inputs"], (each[0] + each[1]) / 2)


def test_half_precision_is_no_obstacle(make_model):
    model = make_model("llama").bfloat16()
    found, loras = collect(model, [UP], with_labels(model, BATCHES[:2]), kind="taylor")
    assert found[UP]["inputs"].dtype == torch.float64
    assert found[UP]["inputs"].max() > 0
    assert loras[UP].A.dtype == torch.float32


def test_what_goes_wrong_is_said_and_the_model_stays(make_model):
    model = make_model("llama")
    data = with_labels(model, BATCHES[:2])
    state, kinds = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    silent = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in data]
    for batches, options, error, text in (
        ([], {}, CalibrationError, "no batch"),
        (unlabelled, {}, CalibrationError, "batch 0 has no labels, only input_ids"),
        (silent, {}, CalibrationError, "none of them is predicted"),
        (data, {"rank": 33}, RankError, f"rank=33 at {UP}"),
        (data, {"rank": 0}, OptionError, "rank=0"),
        (data, {"sees": "both"}, OptionError, "sees='both'"),
        (data, {"alpha": 0.0}, OptionError, "alpha=0.0"),
        (data, {"kind": "hessian"}, OptionError, "kind='hessian'"),
        (data, {"steps": -1}, OptionError, "steps=-1"),
        (data, {"learning_rate": float("nan")}, OptionError, "learning_rate=nan"),
        (data, {"decay": 1.0}, OptionError, "decay=1.0"),
    ):
        with pytest.raises(error, match=text):
            collect(model, [UP], batches, **options)
        assert list(model.modules()) == kinds
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(CalibrationError, match="BertModel has no loss"):
        collect(make_model("bert"), ["encoder.layer.0.output.dense"], data)


def test_a_loss_or_gradient_that_is_not_finite_stops(make_model):
    model = make_model("llama")
    data = with_labels(model, BATCHES[:2])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="the loss is nan on batch 0"):
        collect(model, [UP], data)
    model = make_model("llama")
    name = "model.layers.0.mlp.up_proj"
    handle = model.model.layers[1].register_full_backward_hook(
        lambda module, given, _: tuple(None if g is None else g * float("inf") for g in given)
    )
    with pytest.raises(CalibrationError, match=f"gradient at {name} is not finite, on batch 0"):
        collect(model, [name], data)
    handle.remove()
    assert type(model.get_submodule(name)) is torch.nn.Linear


def test_a_module_out_of_the_loss_s_reach_is_left_out(make_model):
    model = make_model("llama")
    model.unused = torch.nn.Linear(16, 16)
    assert set(collect(model, ["unused", UP], with_labels(model, BATCHES[:1]))[0]) == {UP}
    with pytest.raises(CalibrationError, match="reaches none of the modules, such as unused"):
        collect(model, ["unused"], with_labels(model, BATCHES[:1]))


# In compress


@pytest.mark.parametrize("metric", ["lora-fisher", "lora-taylor", "lora-both"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_measure_compresses(metric, kind, make_model):
    model = tnlm.compress(make_model(kind), "svd", metric=metric, **DATA)
    assert model(IDS[None]).logits.isfinite().all()
    assert tnlm.report(model).plan.metric == metric


@pytest.mark.parametrize("options", [{"share": 2}, {"allocation": "loss", "keep": 0.9}])
def test_stacks_and_shared_budgets(options, make_model):
    model = tnlm.compress(make_model("gpt2"), "lora-svd", **options, **DATA)
    assert model(IDS[None]).logits.isfinite().all()


def test_at_full_rank_the_scheme_is_fwsvd(make_model):
    targets = {"targets": ["o_proj"], "rank": 9}
    fwsvd = tnlm.compress(make_model("llama"), "fwsvd", **targets, **DATA)
    ours = tnlm.compress(make_model("llama"), "lora-svd", lora_rank=32, **targets, **DATA)
    a, b = (m.get_submodule(OUTPUT).to_dense() for m in (fwsvd, ours))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_even_importances_are_the_svd(make_model, monkeypatch):
    def even(*args, **kwargs):
        store = lora_statistics(*args, **kwargs)
        for module in store.leaders:
            found = store.tensor(module, "lora_inputs")
            store.put(module, [module], {"lora_inputs": torch.full_like(found, 3.0)})
        return store

    monkeypatch.setattr("tnlm.compression.gatherers.lora.lora_statistics", even)
    ours = tnlm.compress(make_model("llama"), "lora-svd", **DATA)
    plain = tnlm.compress(make_model("llama"), "svd", progress=False)
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_cache_is_used(make_model, tmp_path, monkeypatch):
    first = tnlm.compress(make_model("llama"), "lora-svd", cache_dir=tmp_path, **DATA)
    monkeypatch.setattr("tnlm.calibration.lora.collect_lora", None)  # not gathered again
    again = tnlm.compress(make_model("llama"), "lora-svd", cache_dir=tmp_path, **DATA)
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items())
