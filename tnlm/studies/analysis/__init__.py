"""The structure of a model: spectra, groups of singular values, intrinsic dimension."""

from tnlm.studies.analysis.intrinsic import IntrinsicDimension
from tnlm.studies.analysis.shapes import kronecker_errors
from tnlm.studies.analysis.subspace import Subspace
from tnlm.studies.analysis.training import TrainingConfig, train
from tnlm.studies.analysis.truncation import GroupTruncation

__all__ = [
    "GroupTruncation",
    "IntrinsicDimension",
    "Subspace",
    "TrainingConfig",
    "kronecker_errors",
    "train",
]
