"""Second moments of output gradients, under labels sampled from the model (K-FAC)."""

from tnlm.compression.gatherers.base import Found, Gatherer, Task, from_gradients


def _gather(task: Task, moment: str = "diagonal") -> Found:
    return from_gradients(task, moment=moment, labels="sampled")


GATHERER = Gatherer("gradients", ("gradient",), _gather)
