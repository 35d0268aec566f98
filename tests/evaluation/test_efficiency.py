from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tnlm
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation import efficiency
from tnlm.evaluation.energy import meter, rapl, spent
from tnlm.evaluation.footprint import disk_bytes, resident_bytes, weight_bytes, working_bytes
from tnlm.evaluation.usage import Efficiency, Spread, Timing, Usage

QUICK = {"prompt_tokens": [8, 4], "new_tokens": 2, "repeats": 2, "progress": False}


def test_a_compressed_model_beside_the_dense_one(compressed, make_model, word_tokenizer, tmp_path):
    model, dense = compressed("llama", "svd", rank=4), make_model("llama")
    dense.train()
    found = efficiency(model, baseline=dense, tokenizer=word_tokenizer, **QUICK)
    assert dense.training
    assert found.model.parameters < found.baseline.parameters
    assert found.model.weights < found.baseline.weights
    assert [timing.prompt_tokens for timing in found.model.timings] == [4, 8]
    for timing in (*found.model.timings, *found.baseline.timings):
        assert 0 < timing.prefill.low <= timing.prefill.median <= timing.prefill.high
        assert timing.decode_rate == pytest.approx(1 / timing.decode.median)
    saved = tnlm.save(model, tmp_path / "saved", tokenizer=word_tokenizer)
    assert found.model.disk == sum(f.stat().st_size for f in saved.iterdir())
    assert json.loads(found.to_json())["repeats"] == 2
    assert "decode at 8, tokens/s" in str(found)
    given = efficiency(model, directory=saved, **QUICK)
    assert given.model.disk == found.model.disk
    assert given.baseline is None


def test_models_take_turns_and_the_first_is_not_counted(tiny_llama, tmp_path):
    models, calls = {"a": tiny_llama(), "b": tiny_llama()}, []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(name) and None)
    options = {"prompt_tokens": [4], "new_tokens": 1, "repeats": 2, "progress": False}
    places = {"directory": tmp_path, "baseline_directory": tmp_path}
    found = efficiency(models["a"], baseline=models["b"], **options, **places)
    assert calls == list("aabb") * 4  # three turns, and one for memory
    assert found.model.disk == 0


def test_tables_show_ratios_and_what_is_unknown():
    timing = Timing(4, Spread(0.004, 0.003, 0.005), Spread(0.002, 0.001, 0.003))
    usage = Usage(100, 2**20, None, 2**21, (timing,))
    found = Efficiency(usage, usage, 8, 3, "cpu", 2, None)
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[1] == ["parameters", "100", "100", "1.000"]
    assert lines[2] == ["weights", "MiB", "1.00", "1.00", "1.000"]
    assert lines[3] == ["peak", "MiB", "unknown", "unknown"]
    assert "500.00" in lines[8]
    assert timing.prefill_rate == pytest.approx(1000)
    assert usage.peak is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"prompt_tokens": []}, r"prompt_tokens=\[\]"),
        ({"prompt_tokens": [0]}, r"prompt_tokens=\[0\]"),
        ({"prompt_tokens": [4, 4]}, r"prompt_tokens=\[4, 4\]"),
    ],
)
def test_bad_counts(options, message, tiny_llama):
    with pytest.raises(OptionError, match=message):
        efficiency(tiny_llama(), **options)


def test_too_many_tokens_and_no_directory(tiny_llama):
    with pytest.raises(EvaluationError, match="= 132, but the model has 128 positions"):
        efficiency(tiny_llama(), prompt_tokens=[100], new_tokens=32)
    with pytest.raises(EvaluationError, match="directory='none' is not a directory"):
        efficiency(tiny_llama(), directory="none", **QUICK)


def test_shared_weights_count_once_in_memory_and_on_disk(tiny_llama):
    tied, free = tiny_llama(tie_word_embeddings=True), tiny_llama()
    assert weight_bytes(free) - weight_bytes(tied) == tied.lm_head.weight.numel() * 4
    assert disk_bytes(free) - disk_bytes(tied) >= tied.lm_head.weight.numel() * 4
    assert weight_bytes(nn.Linear(4, 4, bias=False).to(torch.bfloat16)) == 32


@pytest.mark.skipif(resident_bytes() is None, reason="needs /proc")
def test_working_memory_is_seen():
    def task():
        held = torch.ones(64 * 2**18)  # 64 MiB
        time.sleep(0.05)
        return held

    assert 60 * 2**20 < working_bytes(task, torch.device("cpu")) < 90 * 2**20


def counter(folder, name, used, most=1000):
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "energy_uj").write_text(str(used))
    (path / "max_energy_range_uj").write_text(str(most))


def test_energy_counters_are_summed_and_may_begin_anew(tmp_path):
    counter(tmp_path, "intel-rapl:0", 5_000_000)
    counter(tmp_path, "intel-rapl:1", 9_000_000, most=10_000_000)
    counter(tmp_path, "intel-rapl:0:0", 7)  # a part of the first package
    read = rapl(tmp_path)
    before = read()
    counter(tmp_path, "intel-rapl:0", 6_000_000)
    counter(tmp_path, "intel-rapl:1", 500_000, most=10_000_000)
    assert spent(before, read()) == pytest.approx(1.0 + 1.5)


def test_without_counters_energy_is_unknown(tmp_path, tiny_llama, monkeypatch):
    assert rapl(tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not a number")
    assert rapl(tmp_path) is None
    monkeypatch.setattr("tnlm.evaluation.energy.POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meter(torch.device("cuda")) is None


class Nvml:
    """Stands for pynvml, on a machine with a device that counts or does not."""

    class NVMLError(Exception):
        pass

    def __init__(self, counts):
        self.counts = counts

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if not self.counts:
            raise self.NVMLError(handle)
        return 2500


@pytest.mark.parametrize(("counts", "joules"), [(True, [2.5]), (False, None)])
def test_a_cuda_device_is_asked_through_nvml(counts, joules, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(counts))
    properties = SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    read = meter(torch.device("cuda"))
    assert (None if read is None else list(read().values())) == joules


def test_energy_is_reported_where_it_is_counted(tiny_llama, monkeypatch, tmp_path):
    used = iter(range(100))
    module = sys.modules["tnlm.evaluation.efficiency"]
    monkeypatch.setattr(module, "meter", lambda device: lambda: {"a": 2.0 * next(used)})
    found = efficiency(tiny_llama(), directory=tmp_path, **QUICK)
    assert [timing.joules for timing in found.model.timings] == [2.0, 2.0]
