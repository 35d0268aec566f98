"""Fits in the processes or threads of an executor are those of this process."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch

import tnlm
from tests import mixtures
from tnlm.errors import OptionError, ProcessError
from tnlm.parallel.pool import Pool
from tnlm.parallel.workers import Size

DATA = {"calibration": torch.arange(96) % 61 + 3, "max_length": 16}


class Later(Executor):
    """Makes every call when its result is asked for, as a distant cluster might."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        future.result = lambda timeout=None: function(*args, **kwargs)
        return future


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    limit = (torch.set_num_threads, (1,))
    with ProcessPoolExecutor(
        2, mp_context=context, initializer=limit[0], initargs=limit[1]
    ) as executor:
        yield executor


@pytest.fixture(params=["processes", "threads", "later"])
def executor(request, processes):
    if request.param == "processes":
        yield processes
        return
    with ThreadPoolExecutor(2) if request.param == "threads" else Later() as made:
        yield made


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "scheme", "options"),
    [
        ("gpt2", "svd", {}),
        ("llama", "svd-llm", DATA),
        ("tied-llama", "svd", {"targets": "embeddings"}),
        ("llama", "auto", DATA),
        ("llama", "gptq", DATA),
        ("llama", "svd", {"share": 2}),
    ],
)
def test_fits_are_those_of_this_process(make_model, executor, kind, scheme, options):
    size = {} if scheme == "gptq" else {"keep_targets": 0.6}
    here = tnlm.compress(make_model(kind), scheme, **size, **options)
    there = tnlm.compress(make_model(kind), scheme, **size, **options, workers=executor)
    assert same(here, there)


def test_experts_are_fitted_there(executor):
    here, there = (mixtures.make("Mixtral") for _ in range(2))
    tnlm.compress(here, "svd-llm", keep_targets=0.6, **DATA)
    tnlm.compress(there, "svd-llm", keep_targets=0.6, **DATA, workers=executor)
    assert same(here, there)


def test_one_matrix_within_a_tolerance_is_fitted_there(make_model):
    options = {"targets": ["model.layers.0.self_attn.q_proj"], "tolerance": 0.3, **DATA}
    here = tnlm.compress(make_model("llama"), "svd-llm", **options)
    with ThreadPoolExecutor(1) as executor:
        there = tnlm.compress(make_model("llama"), "svd-llm", **options, workers=executor)
    assert same(here, there)


def test_a_process_that_dies_stops_the_job(make_model):
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = multiprocessing.get_context("forkserver")
    broken = ProcessPoolExecutor(1, mp_context=context, initializer=os._exit, initargs=(9,))
    with broken, pytest.raises(ProcessError, match="a process of the executor stopped"):
        tnlm.compress(model, "svd", workers=broken)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def fail(*_):
    raise OptionError("no such rank", argument="rank")


def test_an_error_of_a_fit_is_raised_here():
    with ThreadPoolExecutor(1) as executor:
        calls = Pool(executor).map(fail, [1], lambda _: Size(1.0, ""), portable=lambda _: fail)
        with pytest.raises(OptionError, match="no such rank") as found:
            next(calls)
    assert found.value.arguments == ("rank",)


def test_other_workers_are_refused(make_model):
    with pytest.raises(OptionError, match="workers=3; allowed: 'ranks'"):
        tnlm.compress(make_model("llama"), "svd", workers=3)


def test_the_class_of_an_executor_is_refused(make_model):
    with pytest.raises(OptionError, match="workers=ThreadPoolExecutor is a class; give an inst"):
        tnlm.compress(make_model("llama"), "svd", workers=ThreadPoolExecutor)


def test_an_executor_that_was_shut_down_is_refused(make_model):
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(ProcessError, match=r"takes no tasks \(cannot schedule new futures"):
        tnlm.compress(make_model("llama"), "svd", workers=executor)
