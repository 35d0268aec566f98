"""mixed-rank: layers randomly alternate between factors and dense weights in training."""

from functools import partial

from transformers import PreTrainedModel

from tnlm.recovery.kinds.base import Practice, RecoveryKind


def _run(model: PreTrainedModel, practice: Practice, *, train_dense: bool) -> None:
    from tnlm.recovery.mixed_rank import mixed_rank

    options = practice.options
    rows = options.pop("data")
    mixed_rank(model, practice.dense, rows, train_dense=train_dense, **options)


RECOVERY = (
    RecoveryKind(
        "mixed-rank",
        "layers that are randomly dense, with dense weights trained too (LPAF)",
        partial(_run, train_dense=True),
        needs_dense=True,
    ),
    RecoveryKind(
        "mixed-rank-frozen",
        "layers that are randomly dense, with dense weights frozen",
        partial(_run, train_dense=False),
        needs_dense=True,
    ),
)
