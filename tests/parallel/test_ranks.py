"""Several processes do what one does, bit by bit, and stop together."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tnlm
from tests.parallel.conftest import run_in_processes
from tnlm.errors import OptionError, ProcessError
from tnlm.parallel import ranks
from tnlm.parallel.choose import workers_of
from tnlm.parallel.ranks import Ranks
from tnlm.parallel.workers import Size

IDS = torch.arange(7 * 16).mul(7).remainder(61)
DATA = {"calibration": IDS, "max_length": 16}
SCHEMES = {
    "svd": {},
    "svd-llm": DATA,
    "auto": DATA | {"gradient_samples": 3},
    "svd-llm-v2": DATA,
    "gptq": DATA,
    "tfwsvd": DATA,
}
ROUNDED = {"tfwsvd": 1e-5}
"""Fisher information is summed in float32, so that its last bits depend on the order."""


def make():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def compressed(workers, scheme):
    size = {} if scheme == "gptq" else {"keep_targets": 0.7}
    model = tnlm.compress(
        make(), scheme, **size, workers=workers, progress=False, **SCHEMES[scheme]
    )
    report = tnlm.report(model)
    errors = {layer.name: layer.error or 0.0 for layer in report.plan.layers}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, errors


def all_compressed(workers):
    return {scheme: compressed(workers, scheme) for scheme in SCHEMES}


@pytest.fixture(scope="module")
def alone():
    """What one process makes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield all_compressed(None)
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[2, 3])
def shared(request, tmp_path_factory):
    """What each of several processes makes."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_in_processes(folder, request.param, all_compressed, "ranks")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factors_are_those_of_one_process(scheme, alone, shared):
    state, errors = alone[scheme]
    for found in shared:
        others, other_errors = found[scheme]
        assert others.keys() == state.keys()
        near = ROUNDED.get(scheme, 0.0)
        assert other_errors == pytest.approx(errors, rel=near, abs=0.0)
        for name, tensor in state.items():
            assert torch.allclose(others[name], tensor, rtol=near, atol=near)


def test_more_processes_than_batches_or_matrices(in_processes, alone):
    found = in_processes(3, few)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in few(None).items())
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


def few(workers="ranks"):
    model = tnlm.compress(
        make(),
        "svd-llm",
        targets=["up_proj"],
        keep_targets=0.5,
        calibration=IDS[:32],
        max_length=16,
        workers=workers,
        progress=False,
    )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def recovered(kind):
    model = tnlm.compress(
        make(),
        "svd",
        keep_targets=0.7,
        recover=kind,
        training=IDS,
        max_length=16,
        recover_tokens=64,
        workers="ranks",
        progress=False,
    )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["lora", "finetune"])
def test_recovery_ends_the_same_in_all(kind, in_processes):
    first, second = in_processes(2, recovered, kind)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def other_model():
    model, rank = make(), int(os.environ["RANK"])
    model.lm_head.weight.data += rank
    tnlm.compress(model, "svd", workers="ranks", progress=False)


def other_data():
    ids = IDS + int(os.environ["RANK"])
    tnlm.compress(make(), "svd-llm", calibration=ids, max_length=16, workers="ranks")


def other_versions():
    tnlm.__version__ = os.environ["RANK"]
    tnlm.compress(make(), "svd", workers="ranks")


def other_options():
    keep = 0.5 + 0.1 * int(os.environ["RANK"])
    tnlm.compress(make(), "svd", keep_targets=keep, workers="ranks")


def other_targets():
    only = ("q_proj", "k_proj")[int(os.environ["RANK"])]
    tnlm.compress(make(), "svd", targets=[only], workers="ranks")


def other_cut(keyword):
    value = 2 + int(os.environ["RANK"])
    data = {"calibration": IDS, "max_length": 16, "num_samples": 3} | {keyword: value}
    tnlm.compress(make(), "auto", keep_targets=0.7, **data, workers="ranks")


def other_cache(folder):
    folder = folder if os.environ["RANK"] == "1" else None
    tnlm.compress(make(), "svd-llm", **DATA, cache_dir=folder, workers="ranks")


def test_processes_that_read_data_otherwise_are_refused(in_processes, tmp_path):
    for keyword in ("gradient_samples", "num_samples", "max_length", "seed"):
        for words in in_processes(2, other_cut, keyword):
            assert words.startswith(f"ProcessError: process 1 of 2 has {keyword} 3, but process 0 ")
    for words in in_processes(2, other_cache, tmp_path / "cache"):
        assert words.startswith("ProcessError: process 1 of 2 has cache_dir True, but process 0 ")


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (other_model, "model"),
        (other_data, "data"),
        (other_versions, "tnlm"),
        (other_options, "request"),
        (other_targets, "targets"),
    ],
)
def test_processes_that_differ_are_refused(function, name, in_processes):
    for words in in_processes(2, function):
        assert words.startswith(f"ProcessError: process 1 of 2 has {name} ")


def stop_in_work(how):
    def work(item):
        if item == "1.b":  # in the group of the second process
            how()
        return item

    with Ranks() as workers:
        items = ["0.a", "1.b", "0.c"]
        return list(workers.map(work, items, lambda item: Size(1.0, item[0])))


def raise_error():
    raise OptionError("no such rank")


def test_one_that_fails_stops_all_with_its_reason(in_processes):
    first, second = in_processes(2, stop_in_work, raise_error)
    assert first == "ProcessError: process 1 of 2 stopped: OptionError: no such rank"
    assert second == "OptionError: no such rank"


def test_a_meeting_that_fails_is_refused(monkeypatch):
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "PATIENCE", ranks.timedelta(seconds=1))
    with pytest.raises(ProcessError, match=r"cannot meet \(RANK=1, .*MASTER_PORT=1\)"):
        workers_of("ranks")


def test_ranks_without_other_processes_are_refused():
    with pytest.raises(OptionError, match="not started as one of several"):
        tnlm.compress(make(), "svd", workers="ranks")


def use_again():
    workers, found = Ranks(), []
    for _ in range(2):
        with workers, workers:
            found.append(workers.gather(workers.rank))
    try:
        workers.gather(None)
    except ProcessError as error:
        return found, str(error)


def test_ranks_are_used_again_and_not_outside_of_a_context(in_processes):
    words = "the processes are not connected; use `with Ranks() as workers:`"
    assert in_processes(2, use_again) == [([[0, 1], [0, 1]], words)] * 2


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ProcessError, match="WORLD_SIZE=two is no number of processes"):
        workers_of("ranks")
