"""Mean gradients of the weights, under the data's own labels (ZS-SVD)."""

from tnlm.compression.gatherers.base import Found, Gatherer, Task, from_gradients


def _gather(task: Task) -> Found:
    return from_gradients(task, moment="none", slope=True, labels="data")


GATHERER = Gatherer("slopes", ("slope",), _gather)
