"""Random factors whose product has a given standard deviation, for training from scratch."""

from __future__ import annotations

import torch

from tnlm.tensors.network import Factors, Network


def gaussian(network: Network, std: float, generator: torch.Generator | None = None) -> Factors:
    """Draw every factor from a normal distribution, so that the matrix has mean 0 and ``std``.

    An entry of the matrix is a sum, over all p values of the bonds, of products of k independent
    entries with mean 0, one from each factor. If these have standard deviation s, the variance is
    ``p * s**(2 * k)``, hence ``s = (std**2 / p)**(1 / (2 * k))``. Each factor is scaled to have
    exactly s as its root mean square, since some factors have only two entries.

    Args:
        network: network of the matrix.
        std: standard deviation of the matrix's entries.
        generator: a CPU generator.

    Returns:
        All full factors, float64.

    Example:
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 300, "a": 8, "i": 200})
        >>> drawn = gaussian(net, 0.02, torch.Generator().manual_seed(0))
        >>> round(float((drawn["left"] @ drawn["right"]).std()), 3)
        0.02
    """
    modes = set("".join(network.factors.values()))
    paths = network.size("".join(modes - set(network.out + network.inp)))
    scale = (std**2 / paths) ** (0.5 / len(network.factors))
    found = {}
    for name in network.factors:
        drawn = torch.randn(
            network.shape_of(name), generator=generator, dtype=torch.float64, device="cpu"
        )
        found[name] = drawn * (scale / drawn.square().mean().sqrt())
    return found
