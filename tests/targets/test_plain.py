from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import tnlm
from tnlm.targets.plain import oddity


class Bare(nn.Linear):
    """Nothing of its own."""


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class Adapted(nn.Linear):
    """A LoRA at its start, which gives nothing yet."""

    def __init__(self, *args):
        super().__init__(*args)
        self.down = nn.Parameter(torch.zeros(2, args[0]))


class Counting(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("calls", torch.tensor(0))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(torch.rand(1))
        return super().forward(x)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Asking(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) * mask


class Turned(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward((ids + 1) % self.num_embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: FalconLinear(6, 5),
        lambda: FalconLinear(6, 5, bias=False),
        lambda: Bare(6, 5),
        lambda: Turned(5, 6),
        lambda: Counting(6, 5),
        lambda: Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=1.0),
        lambda: nn.MultiheadAttention(4, 2).out_proj,
    ],
)
def test_what_gives_a_plain_output_is_plain(make, dtype):
    assert oddity(make().to(dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Clipped, Noisy, Adapted, Pair, Asking])
def test_what_does_more_is_not(kind, dtype):
    assert kind.__name__ in (oddity(kind(6, 5).to(dtype)) or "")


def test_tables_that_scale_or_shift_are_not():
    assert oddity(Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=2.0)) is not None
    assert oddity(Shifted(9, 4)) is not None


def test_a_weight_made_of_others_and_a_forward_of_an_instance_are_not():
    made = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert "computes its weight" in (oddity(made) or "")
    patched = nn.Linear(3, 2)
    patched.forward = lambda x: 2 * F.linear(x, patched.weight, patched.bias)
    assert oddity(patched) == "Linear adds behaviour of its own"


def test_the_trial_leaves_no_trace():
    module = Counting(6, 5)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    state, weight = torch.get_rng_state(), module.weight
    assert oddity(module) is None
    assert not calls
    assert not module.seen
    assert int(module.calls) == 0
    assert module.training
    assert module.weight is weight
    assert weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_skeleton_without_data_is_tried_too():
    with torch.device("meta"):
        assert oddity(FalconLinear(6, 5)) is None
        assert oddity(Clipped(6, 5)) is not None
        assert oddity(Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=2.0)) is not None


@pytest.fixture(scope="module")
def falcon():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}
    return FalconForCausalLM(FalconConfig(vocab_size=64, hidden_size=32, **sizes)).eval()


@pytest.mark.parametrize("scheme", ["svd", "kron", "svd-llm", "fwsvd", "aa-svd"])
def test_a_falcon_is_compressed_saved_and_made_dense(falcon, scheme, tmp_path):
    model, ids = copy.deepcopy(falcon), torch.arange(16)[None] + 3
    data = {} if scheme in ("svd", "kron") else {"calibration": ids.repeat(9, 2), "max_length": 16}
    tnlm.compress(model, scheme, keep_targets=0.6, progress=False, **data)
    names = [layer.name.rpartition(".")[2] for layer in tnlm.report(model).plan.layers]
    assert names == ["q", "k", "v", "dense", "dense_h_to_4h", "dense_4h_to_h"] * 2
    logits = model(ids).logits
    tnlm.save(model, tmp_path / "out")
    assert torch.equal(tnlm.load(tmp_path / "out")(ids).logits, logits)
    torch.testing.assert_close(tnlm.to_dense(model)(ids).logits, logits)


def test_a_falcon_is_built_factored(falcon):
    model = tnlm.from_config(falcon.config, "svd", rank=4)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FactorizedLinear"
