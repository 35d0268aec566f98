import copy

import torch

import tnlm
from tnlm.recovery.goals import divergence_from

torch.manual_seed(0)
IDS = torch.randint(3, 61, (2048,))
ASKED = {"keep_targets": 0.5, "calibration": IDS, "max_length": 32, "progress": False}


def test_the_correction_brings_auto_nearer_to_the_dense_model(make_model):
    dense = make_model("llama")
    plain = tnlm.compress(copy.deepcopy(dense), "auto", **ASKED)
    model = tnlm.compress(copy.deepcopy(dense), "auto-corrected", recover_tokens=4096, **ASKED)
    fresh = torch.randint(3, 61, (16, 32), generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": fresh, "labels": fresh}
    with torch.no_grad():
        before, after = (float(divergence_from(dense)(m, batch)) for m in (plain, model))
    assert after < 0.95 * before
    kept, corrected = (tnlm.report(each) for each in (plain, model))
    assert corrected.parameters_after == kept.parameters_after
    assert corrected.seconds["recover"] > 0
    specs = [
        [(layer.name, layer.format, layer.spec) for layer in r.plan.layers]
        for r in (kept, corrected)
    ]
    assert specs[0] == specs[1]
