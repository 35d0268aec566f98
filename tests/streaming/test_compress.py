from __future__ import annotations

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import tnlm
from tnlm.errors import CalibrationError, CapacityError, CheckpointError, ModelError, OptionError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def source(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def phi3():
    return Phi3ForCausalLM(Phi3Config(**SIZES, vocab_size=64, pad_token_id=0))


def t5():
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes))


def vit():
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4))


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2", "masked-bert"])
def test_files_give_what_memory_gives(kind, make_model, both, same):
    same(*both(make_model(kind), "svd", keep_targets=0.6))


@pytest.mark.parametrize("scheme", ["kron", "tucker", "tt", "tensorgpt", "albert", "kngpt2"])
def test_every_format_without_data_is_the_same(scheme, make_model, both, same):
    same(*both(make_model("tied-llama"), scheme))


@pytest.mark.parametrize("make", [phi3, t5, vit])
def test_other_families_are_the_same(make, both, same):
    torch.manual_seed(0)
    same(*both(make(), "svd"))


def test_parts_of_a_fused_module_and_half_precision_are_the_same(both, same):
    torch.manual_seed(0)
    model = phi3().bfloat16()
    same(*both(model, "svd", targets=["qkv_proj.q", "gate_up_proj.up"], keep_targets=0.5))


DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}


@pytest.mark.parametrize(
    "scheme",
    ["svd-llm", "asvd", "afm", "rom", "svd-llm-v2", "basis-sharing", "modegpt", "aa-svd"],
)
def test_walks_forwards_give_the_same(scheme, make_model, both, same):
    same(*both(make_model("llama"), scheme, **DATA))


@pytest.mark.parametrize("scheme", ["auto", "fwsvd", "kfac-svd", "tfwsvd"])
def test_walks_backwards_give_the_same(scheme, tiny_llama, both, same):
    same(*both(tiny_llama(num_hidden_layers=5, hidden_size=16), scheme, **DATA))


@pytest.mark.parametrize("kind", ["gpt2", "masked-bert", "tied-llama"])
def test_other_families_are_walked(kind, make_model, both, same):
    same(*both(make_model(kind), "auto", **DATA))


def test_a_sequential_cascade_gives_the_same(make_model, both, same):
    same(*both(make_model("gpt2"), "svd-llm", cascade="sequential", **DATA))


def test_statistics_from_files_are_cached_under_the_files(source, tmp_path):
    call = {"scheme": "svd-llm", "progress": False, "cache_dir": tmp_path / "cache", **DATA}
    reports = [tnlm.compress_files(source, tmp_path / name, **call) for name in "ab"]
    assert reports[0].plan == reports[1].plan
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_gradients_outside_of_blocks_are_refused(source, tmp_path):
    with pytest.raises(CalibrationError, match="a pass through the whole model"):
        tnlm.compress_files(
            source, tmp_path / "out", "fwsvd", targets=["lm_head", "q_proj"], progress=False, **DATA
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_result_loads_and_runs(source, tmp_path, word_tokenizer):
    word_tokenizer.save_pretrained(source)
    report = tnlm.compress_files(source, tmp_path / "out", "svd", progress=False)
    assert tnlm.load(tmp_path / "out", verify=True)(torch.tensor([[3, 4]])).logits.isfinite().all()
    assert report.plan == tnlm.report(tmp_path / "out").plan
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


def test_files_of_several_shards_and_another_dtype(tmp_path, tiny_llama, same):
    model, choices = tiny_llama(), {"rank": 4, "progress": False}
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tnlm.compress_files(tmp_path / "model", tmp_path / "files", "svd", dtype="float64", **choices)
    loaded = type(model).from_pretrained(tmp_path / "model", dtype="float64")
    tnlm.save(tnlm.compress(loaded, "svd", **choices), tmp_path / "memory")
    same(tmp_path / "memory", tmp_path / "files")


def test_a_cap_that_is_too_low_is_refused_with_the_least(source, tmp_path):
    call = {"scheme": "svd", "progress": False}
    with pytest.raises(CapacityError, match="give at least memory='") as caught:
        tnlm.compress_files(source, tmp_path / "out", memory="10MB", **call)
    assert caught.value.arguments[0] == "memory"
    least = str(caught.value).split("memory='")[1].split("MB'")[0]
    tnlm.compress_files(source, tmp_path / "out", memory=f"{int(least) + 300}MB", **call)
    with pytest.raises(OptionError, match="a number of bytes, or a text such as"):
        tnlm.compress_files(source, tmp_path / "other", memory="much", **call)


def test_a_full_disk_is_noticed_before_any_work(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CapacityError, match="scratch"):
        tnlm.compress_files(source, tmp_path / "out", "svd", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"recover": "finetune", "training": [3, 4]}, "trains the whole model"),
        ({"refine": 16, "calibration": [3, 4]}, "compress in memory, refine in a cascade"),
        ({"metric": "lora-fisher", "calibration": [3, 4]}, "needs lora"),
        ({"metric": "input", "calibration": "self"}, "reads the whole model for every token"),
    ],
)
def test_what_needs_the_whole_model_is_refused(source, tmp_path, choices, message):
    with pytest.raises(OptionError, match=message):
        tnlm.compress_files(source, tmp_path / "out", "svd", progress=False, **choices)


def test_broken_sources_are_refused_and_leave_nothing(source, tmp_path, tiny_llama):
    def fails(kind, message):
        with pytest.raises(kind, match=message):
            tnlm.compress_files(source, tmp_path / "out", "svd", progress=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    fails(CheckpointError, "not a readable safetensors file")
    weights.rename(source / "pytorch_model.bin")
    fails(CheckpointError, "weights in other files are not read")
    tiny_llama(num_hidden_layers=1).model.save_pretrained(source)
    tiny_llama().config.save_pretrained(source)
    fails(CheckpointError, "tensors of LlamaForCausalLM are not in the checkpoint")
    tiny_llama(hidden_size=16).save_pretrained(source)
    tiny_llama().config.save_pretrained(source)
    fails(CheckpointError, "it is a file of another model")
    (source / "config.json").unlink()
    fails(CheckpointError, "has no config.json")


def test_values_that_are_not_finite_are_refused(tmp_path, tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has values that are not finite"):
        tnlm.compress_files(tmp_path / "model", tmp_path / "out", "svd", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_and_mixtures_are_refused(source, tmp_path):
    tnlm.compress_files(source, tmp_path / "out", "svd", progress=False)
    with pytest.raises(ModelError, match="compressed already"):
        tnlm.compress_files(tmp_path / "out", tmp_path / "twice", "svd", progress=False)
    config = MixtralConfig(**SIZES, vocab_size=64, num_key_value_heads=4, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixture")
    with pytest.raises(ModelError, match="in memory"):
        tnlm.compress_files(tmp_path / "mixture", tmp_path / "twice", "svd", progress=False)
