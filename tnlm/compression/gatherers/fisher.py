"""Per-example squared weight gradients, under the data's own labels (FWSVD and TFWSVD)."""

from tnlm.compression.gatherers.base import Found, Gatherer, Task, from_gradients


def _gather(task: Task) -> Found:
    return from_gradients(task, moment="none", fisher=True, labels="data")


GATHERER = Gatherer("fisher", ("fisher",), _gather)
