from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac, tensor_ring, tensor_train_matrix, tucker
from tensorly.tr_tensor import TRTensor
from tensorly.tt_matrix import TTMatrix
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor

from tnlm.decompositions import get_format
from tnlm.decompositions.cp import CPSpec
from tnlm.decompositions.kronecker import KroneckerSpec
from tnlm.decompositions.tensor_ring import TensorRingSpec
from tnlm.decompositions.tensor_train import TensorTrainSpec
from tnlm.decompositions.tensorly_objects import from_tensorly, to_tensorly
from tnlm.decompositions.tucker import TuckerSpec
from tnlm.decompositions.whitening import rebuild
from tnlm.errors import OptionError, RankError
from tnlm.metrics.metric import Metric

OURS = [
    ("tucker", TuckerSpec((3, 4), (2, 4), (2, 4, 2, 3))),
    ("tucker", TuckerSpec((12,), (2, 4), (5, 2, 4), gauge=True)),
    ("tucker", TuckerSpec((12,), (8,), (3, 3))),
    ("tensor-train", TensorTrainSpec((3, 2, 2), (2, 2, 2), (3, 2))),
    ("kronecker", KroneckerSpec(3, (3, 4), (4, 2))),
    ("cp", CPSpec(5, (3, 4), (2, 4))),
    ("cp", CPSpec(4, (12,), (8,))),
    ("tensor-ring", TensorRingSpec((3, 2, 2), (2, 2, 2), (2, 3, 2))),
    ("tensor-ring", TensorRingSpec((3, 2, 2), (2, 2, 2), (1, 3, 2))),
]


@pytest.fixture(autouse=True)
def torch_in_tensorly():
    tensorly.set_backend("pytorch", local_threadsafe=True)
    yield
    tensorly.set_backend("numpy", local_threadsafe=True)


def dense(tensor):
    if type(tensor).__name__ == "TTMatrix":
        return tensor.to_matrix()
    if type(tensor).__name__ == "TRTensor":
        return tensor.to_tensor().reshape(3, 2, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(12, 8)
    return tensor.to_tensor().reshape(12, 8)


@pytest.mark.parametrize(("name", "spec"), OURS)
def test_factors_go_to_tensorly_and_come_back(name, spec, gaussian):
    structure = get_format(name)
    factors = structure.fit(gaussian(12, 8), Metric(), spec)
    expected = structure.reconstruct((12, 8), spec, factors)
    tensor = to_tensorly(name, (12, 8), spec, factors)
    torch.testing.assert_close(dense(tensor), expected)
    modes = {"outputs": len(spec.out_split)}
    if name in ("tensor-ring", "tensor-train", "kronecker"):
        modes = {"out_split": spec.out_split} if name == "tensor-ring" else {}
    back = from_tensorly(tensor, **modes)
    assert back.format == ("tensor-train" if name == "kronecker" else name)
    torch.testing.assert_close(rebuild(back.network, back.factors), expected)


def test_a_tucker_of_tensorly_becomes_a_matrix(gaussian):
    tensor = tucker(gaussian(12, 8).reshape(3, 4, 8), [2, 4, 3])
    found = from_tensorly(tensor, outputs=2)
    assert found.spec == TuckerSpec((3, 4), (8,), (2, 4, 3))
    assert list(found.factors) == ["core", "mode0", "mode2"]
    torch.testing.assert_close(rebuild(found.network, found.factors), dense(tensor))


def test_a_train_of_tensorly_becomes_a_matrix(gaussian):
    tensor = tensor_train_matrix(gaussian(12, 8).reshape(3, 4, 2, 4), [1, 5, 1])
    found = from_tensorly(tensor)
    assert found.spec == TensorTrainSpec((3, 4), (2, 4), (5,))
    torch.testing.assert_close(rebuild(found.network, found.factors), dense(tensor))


def test_a_cp_of_tensorly_becomes_a_matrix(gaussian):
    tensor = parafac(gaussian(12, 8).reshape(3, 4, 8), 3, n_iter_max=5)
    found = from_tensorly(tensor, outputs=2)
    assert found.spec == CPSpec(3, (3, 4), (8,))
    torch.testing.assert_close(rebuild(found.network, found.factors), dense(tensor))
    bare = CPTensor((None, tensor.factors))
    torch.testing.assert_close(
        from_tensorly(bare, outputs=2).factors["mode2"], tensor.factors[2], rtol=0, atol=0
    )


def test_a_ring_of_tensorly_becomes_a_matrix(gaussian):
    tensor = tensor_ring(gaussian(12, 8).reshape(3, 4, 2, 4), [1, 3, 5, 2, 1])
    found = from_tensorly(tensor, outputs=2)
    assert found.spec == TensorRingSpec((3, 4, 1, 1), (1, 1, 2, 4), (1, 3, 5, 2))
    expected = tensor.to_tensor().reshape(12, 8)
    torch.testing.assert_close(rebuild(found.network, found.factors), expected)
    with pytest.raises(RankError, match=r"out_split=\(2, 4, 1, 1\); allowed: a divisor"):
        from_tensorly(tensor, out_split=(2, 4, 1, 1))
    with pytest.raises(OptionError, match="allowed only for a TRTensor"):
        from_tensorly(CPTensor((None, [gaussian(3, 2), gaussian(4, 2)])), out_split=(3, 1))


def test_factors_of_numpy_are_refused():
    tensorly.set_backend("numpy", local_threadsafe=True)  # tensorly's default
    train = TTMatrix([np.ones((1, 2, 3, 2)), np.ones((2, 3, 2, 1))])
    whole = TuckerTensor((np.ones((2, 2)), [np.ones((3, 2)), np.ones((4, 2))]))
    core = TuckerTensor((torch.ones(2, 2), [np.ones((3, 2)), torch.ones(4, 2)]))
    rows = [np.ones((3, 2)), np.ones((4, 2))]
    terms, weights = CPTensor((None, rows)), CPTensor((np.ones(2), [torch.ones(3, 2)] * 2))
    for tensor in (train, whole, core, terms, weights):
        with pytest.raises(OptionError, match=r'ndarray.*tensorly.set_backend\("pytorch"\)'):
            from_tensorly(tensor)


def test_what_has_no_counterpart_is_refused(gaussian):
    with pytest.raises(OptionError, match="TTTensor is not"):
        from_tensorly(TTTensor([gaussian(12, 2)[None], gaussian(2, 8)[..., None]]))
    with pytest.raises(OptionError, match="low-rank has no counterpart"):
        to_tensorly("low-rank", (12, 8), None, {})
    with pytest.raises(RankError, match="outputs=3; allowed: 1 to 2 of 3 modes"):
        from_tensorly(tucker(gaussian(12, 8).reshape(3, 4, 8), [2, 4, 3]), outputs=3)


def test_arguments_without_effect_or_of_another_type_are_refused(gaussian):
    terms = CPTensor((None, [gaussian(3, 2), gaussian(4, 2)]))
    with pytest.raises(RankError, match="outputs='a'; allowed: 1 to 1 of 2 modes"):
        from_tensorly(terms, outputs="a")
    ring = TRTensor([gaussian(2, 4, 2), gaussian(2, 6, 4), gaussian(4, 6, 2)])
    with pytest.raises(OptionError, match=r"outputs=1 with out_split=\(2, 3, 2\)"):
        from_tensorly(ring, outputs=1, out_split=(2, 3, 2))
    train = TTMatrix([torch.ones(1, 2, 3, 2), torch.ones(2, 3, 2, 1)])
    with pytest.raises(OptionError, match="outputs=1 with a TTMatrix"):
        from_tensorly(train, outputs=1)


def test_a_ring_with_larger_ranks_than_tr_svd_makes_is_refused_with_the_reason(gaussian):
    ring = TRTensor([gaussian(3, 4, 2), gaussian(2, 5, 4), gaussian(4, 6, 3)])
    with pytest.raises(RankError, match="TR-SVD makes no larger ones, and its first two multiply"):
        from_tensorly(ring, outputs=2)
