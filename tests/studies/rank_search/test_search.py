import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnlm
from tnlm.calibration.statistics import collect
from tnlm.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    EvaluationError,
    OptionError,
    TargetError,
    TnlmError,
)
from tnlm.layers.linear import FactorizedLinear
from tnlm.studies.rank_search.search import rank_search

SEARCH, REPORT = list(range(20)), list(range(20, 50))
IDS = torch.randint(3, 60, (640,), generator=torch.Generator().manual_seed(0))
WINDOWS = {"search": IDS[:96], "report": IDS[96:160], "max_length": 32}


@pytest.fixture(scope="module")
def small(tiny_llama, tiny_gpt2):
    """Make a model of one block."""
    makers = {
        "llama": lambda: tiny_llama(num_hidden_layers=1),
        "two": lambda: tiny_llama(num_hidden_layers=2, hidden_size=16, intermediate_size=24),
        "gpt2": lambda: tiny_gpt2(n_layer=1),
    }
    return lambda kind="llama": makers[kind]()


def find(model, score, **given):
    given = {"search": SEARCH, "report": REPORT, "scheme": "svd", "progress": False} | given
    return rank_search(model, score, **given)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


def agreement(dense):
    """Make a score: whether a model predicts what the dense one does after each token."""
    with torch.no_grad():
        wanted = dense(input_ids=torch.arange(64)[:, None]).logits[:, -1].argmax(-1)

    def agrees(model, items):
        ids = torch.tensor(items)
        found = model(input_ids=ids[:, None]).logits[:, -1].argmax(-1)
        return [float(a == b) for a, b in zip(found, wanted[ids], strict=True)]

    return agrees


def ranks_in(model):
    """The rank of every factorized matrix, by name, in the model's order."""
    return {
        name: module.network.sizes["r"]
        for name, module in model.named_modules()
        if isinstance(module, FactorizedLinear)
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["svd", "svd-llm", "sfsd"])
def test_a_searched_model_saves_and_loads(kind, scheme, small, tmp_path):
    model = small(kind)
    data = {} if scheme == "svd" else {"calibration": IDS, "num_samples": 8}
    found = find(
        model, "perplexity", scheme=scheme, growth=1.05, candidates=[0.1, 0.5], **WINDOWS, **data
    )
    assert found.search[1] <= found.search[0] * 1.05 ** len(found.plan.layers)
    assert found.flips is None
    ids = IDS[None, :16]
    with torch.no_grad():
        logits = model(ids).logits
        tnlm.save(model, tmp_path / "saved")
        again = tnlm.load(tmp_path / "saved").eval()
        assert torch.equal(again(ids).logits, logits)
    chosen = {x.name: x.spec["rank"] for x in found.plan.layers if x.format}
    assert chosen
    assert chosen == {t.layer: t.rank for t in found.trials if t.accepted}
    assert found.plan.model_after.params == sum(p.numel() for p in model.parameters())
    assert tnlm.report(model).parameters_after == found.plan.model_after.params
    assert not model.training
    assert json.loads(found.to_json())["score"] == "perplexity"
    assert f"trials:  {len(found.trials)}" in str(found)


def test_the_plan_can_be_carried_out_again(small):
    model, again = small(), small()
    data = {"calibration": IDS, "num_samples": 8}
    found = find(model, "perplexity", scheme="sfsd", growth=1.05, **WINDOWS, **data)
    plan = tnlm.Plan.from_json(found.plan.to_json())
    tnlm.compress(again, plan, max_length=32, progress=False, **data)
    assert ranks_in(again) == ranks_in(model)
    with torch.no_grad():
        logits = [one(IDS[None, :16]).logits for one in (model, again)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_the_perplexities_are_those_of_the_models(small):
    def perplexity(model, ids):
        with torch.no_grad():
            rows = ids.reshape(-1, 32)
            return float(model(input_ids=rows, labels=rows).loss.exp())

    model = small()
    dense = [perplexity(model, WINDOWS[name]) for name in ("search", "report")]
    found = find(model, "perplexity", growth=1.05, **WINDOWS)
    assert [found.search[0], found.report[0]] == pytest.approx(dense)
    assert found.search[1] == pytest.approx(perplexity(model, WINDOWS["search"]))
    assert found.report[1] == pytest.approx(perplexity(model, WINDOWS["report"]))


@pytest.mark.parametrize("order", ["reverse", "forward"])
def test_matrices_are_tried_in_order_and_ranks_smallest_first(order, small):
    model = small("two")
    names = [target.name for target in tnlm.targets.selection.select(model).targets]
    found = find(model, agreement(model), delta=0.3, order=order)
    tried = list(dict.fromkeys(trial.layer for trial in found.trials))
    assert tried == (names[::-1] if order == "reverse" else names)
    for name in tried:
        ranks = [trial.rank for trial in found.trials if trial.layer == name]
        assert ranks == sorted(ranks)
        accepted = [trial.accepted for trial in found.trials if trial.layer == name]
        assert not any(accepted[:-1])  # it stops at the first that is good enough


@settings(max_examples=10)  # an example is a whole search, decided by hashes
@given(seed=st.integers(0, 10_000), delta=st.sampled_from([0.0, 0.1, 0.4]))
def test_a_violation_is_never_accepted(seed, delta, small):
    model = small("two")
    dense = 0.5

    def arbitrary(model, items):
        ranks = tuple(ranks_in(model).items())
        if not ranks:
            return dense
        return float(torch.rand(1, generator=torch.Generator().manual_seed(hash_of(ranks, seed))))

    try:
        found = find(model, arbitrary, delta=delta, candidates=[0.2, 0.6])
    except BudgetError:
        assert not ranks_in(model)
        return
    assert arbitrary(model, SEARCH) >= dense - delta
    assert found.search == (dense, arbitrary(model, SEARCH))
    assert all(-trial.loss >= dense - delta for trial in found.trials if trial.accepted)


@settings(max_examples=10)  # an example is a whole search, decided by hashes
@given(seed=st.integers(0, 10_000), delta=st.sampled_from([0.1, 0.4]))
def test_with_chunks_a_rank_is_good_enough_on_each_and_on_the_whole(seed, delta, small):
    model = small("two")
    names = [name for name, _ in model.named_modules() if "_proj" in name]

    def arbitrary(model, items):
        ranks = tuple(ranks_in(model).items())
        key = hash_of((ranks, items), seed)
        return float(torch.rand(1, generator=torch.Generator().manual_seed(key))) if ranks else 0.5

    try:
        found = find(model, arbitrary, delta=delta, candidates=[0.2, 0.4, 0.6], chunks=3)
    except BudgetError:
        assert not ranks_in(model)
        return
    chosen = ranks_in(model)
    for name in names:
        trials = [trial for trial in found.trials if trial.layer == name]
        firsts = [
            next((t.rank for t in trials if t.chunk == chunk and t.accepted), None)
            for chunk in (1, 2, 3)
        ]
        whole = [trial for trial in trials if trial.chunk == 0]
        if None in firsts:
            assert not whole
            assert name not in chosen
            continue
        assert [trial.rank for trial in whole] == [max(firsts)]
        assert whole[0].accepted == (-whole[0].loss >= 0.5 - delta) == (name in chosen)


def hash_of(ranks, seed):
    import zlib

    return zlib.crc32(repr((ranks, seed)).encode())


def test_the_limit_of_the_perplexity_grows_with_every_matrix(small):
    found = find(small(), "perplexity", growth=1.01, candidates=[0.3, 0.8], **WINDOWS)
    limits = dict.fromkeys(t.layer for t in found.trials)
    for trial in found.trials:
        limits[trial.layer] = trial.limit
        assert trial.accepted == (trial.loss <= trial.limit)
    start = torch.tensor(found.search[0]).double().log()
    expected = [float(start) + k * 0.00995033 for k in range(1, len(limits) + 1)]
    assert list(limits.values()) == pytest.approx(expected)


def test_items_that_flip_are_counted(small):
    model = small()
    score = agreement(model)
    found = find(model, score, delta=0.5)
    now = [bool(score) for score in score(model, REPORT)]
    assert found.flips.learned == found.flips.wrong == ()
    assert found.flips.right == tuple(i for i, good in enumerate(now) if good)
    assert found.flips.unlearned == tuple(i for i, good in enumerate(now) if not good)
    assert found.report == (1.0, sum(now) / len(now))
    assert "unlearned 13" in str(found)


@pytest.mark.parametrize("keep", [0.9, 0.75])
def test_a_budget_is_met(keep, small):
    model = small("two")
    total = sum(p.numel() for p in model.parameters())
    found = find(model, "perplexity", keep=keep, **WINDOWS)
    assert sum(p.numel() for p in model.parameters()) <= keep * total
    assert found.plan.request["keep"] == keep
    # Every rank of every matrix was measured alone.
    assert len({(t.layer, t.rank) for t in found.trials}) == len(found.trials)
    assert all(trial.limit is None for trial in found.trials)
    accepted = {t.layer: t.rank for t in found.trials if t.accepted}
    assert accepted == {x.name: x.spec["rank"] for x in found.plan.layers if x.format}


def test_a_budget_out_of_reach_is_refused_before_any_trial(small):
    model = small()
    before, calls = state(model), []
    score = lambda model, items: calls.append(0) or 1.0  # noqa: E731
    with pytest.raises(BudgetError, match=r"the smallest candidates of all matrices save"):
        find(model, score, keep=0.05)
    assert len(calls) == 2  # the dense model on both splits
    assert same(model, before)


def test_later_matrices_leave_the_inputs_of_earlier_ones_alone(small):
    """What makes one calibration enough, in this order."""
    model = small("two")
    names = [target.module for target in tnlm.targets.selection.select(model).targets]
    batches = [{"input_ids": IDS[None, :32], "attention_mask": torch.ones(1, 32).long()}]
    before = collect(model, names, batches, progress=False)
    find(
        model, lambda model, items: 1.0, targets=["layers.1.mlp.down_proj", "layers.1.mlp.up_proj"]
    )
    kept = [name for name in names if ".mlp." not in name or "layers.0" in name]
    after = collect(model, kept, batches, progress=False)
    for name in kept:
        assert torch.equal(before.tensor(name, "moment"), after.tensor(name, "moment"))


class Killed(Exception):  # noqa: N818 - a signal, not an error
    pass


@pytest.mark.parametrize("keep", [None, 0.85])
def test_a_killed_search_goes_on_without_a_lost_trial(keep, small, tmp_path):
    def counted(model, stop):
        plain, calls = agreement(model), []

        def score(model, items):
            if len(calls) == stop:
                raise Killed
            calls.append(0)
            return plain(model, items)

        return score, calls

    options = {"keep": keep, "candidates": [0.2, 0.7]} | ({} if keep else {"delta": 0.2})
    whole = small("two")
    score, calls = counted(whole, None)
    expected = find(whole, score, **options)
    killed = small("two")
    before = state(killed)
    score, first = counted(killed, 2 + 5)
    with pytest.raises(Killed):
        find(killed, score, output_dir=tmp_path / "run", **options)
    assert same(killed, before)
    with (tmp_path / "run" / "search.jsonl").open("a") as file:
        file.write('{"key": "cut o')  # as if the process had died while writing
    score, second = counted(killed, None)
    found = find(killed, score, output_dir=tmp_path / "run", **options)
    assert found == expected
    assert same(killed, state(whole))
    assert len(first) + len(second) == len(calls) + 2  # the dense model twice more, no trial


def test_a_journal_of_another_search_is_refused(small, tmp_path):
    given = {"delta": 0.5, "output_dir": tmp_path}
    find(small(), agreement(small()), **given)
    for change, name in [
        ({"delta": 0.6}, "delta"),
        ({"report": [60]}, "report"),
        ({"search": [60]}, "search"),
        ({"candidates": [0.5]}, "ranks"),
        ({"order": "forward"}, "order, ranks"),
    ]:
        with pytest.raises(CheckpointError, match=f"other trials, which differ in {name};"):
            find(small(), agreement(small()), **(given | change))
    other = small()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="which differ in model;"):
        find(other, agreement(other), **given)


@pytest.mark.parametrize("text", ["no json\n", "[1]\n", "{}\n"])
def test_a_file_that_is_no_journal_is_refused(text, small, tmp_path):
    (tmp_path / "search.jsonl").write_text(text)
    with pytest.raises(CheckpointError, match="is not a journal of trials"):
        find(small(), agreement(small()), output_dir=tmp_path)


def test_a_directory_that_cannot_be_written_is_refused_before_any_work(small, tmp_path):
    (tmp_path / "file").write_text("")
    calls = []
    score = lambda model, items: calls.append(0) or 1.0  # noqa: E731
    with pytest.raises(CheckpointError, match=r"search.jsonl cannot be written"):
        find(small(), score, output_dir=tmp_path / "file" / "run")
    assert not calls


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_a_failure_at_any_time_leaves_the_model_as_it_was(at, small):
    model, calls = small("gpt2"), []
    plain = agreement(model)
    before, config = state(model), model.config.to_dict()

    def fails(model, items):
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt
        return plain(model, items)

    with pytest.raises(KeyboardInterrupt):
        find(model, fails, delta=0.1)
    assert same(model, before)
    assert model.config.to_dict() == config
    assert not ranks_in(model)


def test_nothing_good_enough_is_an_error_and_leaves_the_model(small):
    model = small()
    before = state(model)
    score = lambda model, items: 0.0 if ranks_in(model) else 1.0  # noqa: E731
    with pytest.raises(BudgetError, match=r"no rank of any of 7 matrices is good enough.*delta="):
        find(model, score)
    assert same(model, before)


def test_a_metric_that_changes_its_mind_is_an_error(small):
    model, calls = small(), []
    before = state(model)
    score = lambda model, items: calls.append(0) or (0.0 if len(calls) > 9 else 1.0)  # noqa: E731
    with pytest.raises(EvaluationError, match="varies between measurements of the same model"):
        find(model, score)
    assert same(model, before)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"report": [50, 3]},
            EvaluationError,
            "item 1 of report= is item 3 of search=; results must",
        ),
        ({"search": []}, EvaluationError, "search= has no items"),
        ({"report": []}, EvaluationError, "report= has no items"),
        ({"report": "text"}, EvaluationError, "report= is a str; give a list of items"),
        ({"report": [object()]}, EvaluationError, "an item is a object whose contents cannot"),
        ({"growth": 1.1}, OptionError, "growth= has no effect with score="),
        ({"delta": -0.1}, OptionError, "delta=-0.1; allowed: a finite number of at least 0"),
        ({"delta": 0.1, "keep": 0.9}, OptionError, "delta= has no effect with keep="),
        ({"chunks": 0}, OptionError, "chunks=0; allowed: a whole number of at least 1"),
        ({"chunks": True}, OptionError, "chunks=True; allowed: a whole number"),
        ({"delta": True}, OptionError, "delta=True; allowed: a finite number"),
        ({"chunks": 3, "keep": 0.9}, OptionError, "chunks= has no effect with keep="),
        ({"chunks": 21}, EvaluationError, "chunks=21, but there are only 20 items"),
        ({"keep": 1.5}, BudgetError, "keep=1.5; allowed: a fraction"),
        ({"order": "revers"}, OptionError, "order='revers'; did you mean 'reverse'"),
        ({"candidates": []}, OptionError, r"candidates=\(\); allowed: fractions"),
        ({"candidates": [0.5, 1.5]}, OptionError, "candidates contains 1.5; allowed"),
        ({"scheme": "kron"}, OptionError, "scheme='kron' in a rank search"),
        ({"scheme": "tfwsvd"}, OptionError, "scheme='tfwsvd' in a rank search"),
        ({"scheme": "rom"}, OptionError, "scheme='rom' in a rank search"),
        ({"scheme": "basis-sharing"}, OptionError, "scheme='basis-sharing' in a rank search"),
        ({"scheme": "sfsd"}, CalibrationError, "needs data; pass calibration="),
        ({"targets": "embeddings"}, TargetError, "no target is left; .*linear matrices only"),
    ],
)
def test_impossible_choices_are_refused(given, error, message, small):
    model = small()
    before = state(model)
    with pytest.raises(error, match=message):
        find(model, lambda model, items: 1.0, **given)
    assert same(model, before)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"growth": True}, OptionError, "growth=True; allowed: a finite factor"),
        ({"growth": 0.9}, OptionError, "growth=0.9; allowed: a finite factor of at least 1"),
        ({"delta": 0.1}, OptionError, "delta= has no effect with score='perplexity'"),
        ({"report": IDS[32:96]}, EvaluationError, "item 0 of report= is item 1 of search="),
        ({"search": IDS[:0]}, TnlmError, "has no tokens"),
    ],
)
def test_impossible_perplexities_are_refused(given, error, message, small):
    with pytest.raises(error, match=message):
        find(small(), "perplexity", **(WINDOWS | given))


def test_an_unknown_metric_is_refused(small, make_model):
    with pytest.raises(OptionError, match=r"'perplexty'; did you mean 'perplexity'.*callable"):
        find(small(), "perplexty")
    with pytest.raises(OptionError, match="score='perplexity' with a BertForMaskedLM"):
        find(make_model("masked-bert"), "perplexity", **WINDOWS)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (float("nan"), "is nan, not a finite number"),
        ([1.0, 0.0], "returned 2 scores for 20 items"),
        ([1.0] * 19 + [float("inf")], "of item 19 is inf, not a finite number"),
        (None, "is a NoneType; it must be a number"),
    ],
)
def test_scores_without_meaning_are_refused(score, message, small):
    with pytest.raises(EvaluationError, match=message):
        find(small(), lambda model, items: score)


def test_scores_may_be_right_or_wrong(small):
    found = find(small(), lambda model, items: [item % 2 == 0 for item in items])
    assert found.search == (0.5, 0.5)
    assert len(found.flips.right) == 15


def test_it_is_public():
    assert tnlm.rank_search is rank_search
