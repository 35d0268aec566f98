"""Decoding speed of low rank against dense, taking turns in one process.

    python benchmarks/decode.py [MODEL] [--keep-targets 0.6]

MODEL defaults to the demo's. The factors are those of plain SVD: speed does not depend on values.
"""

from __future__ import annotations

import argparse
import copy
import json

import tnlm
from tnlm.demo import find_model
from tnlm.evaluation import decode_rates
from tnlm.integrations.models import load_model


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--keep-targets", type=float, nargs="+", default=[0.6])
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()

    dense, _ = load_model(asked.model or find_model())
    models = {"dense": dense}
    for keep in asked.keep_targets:
        model = copy.deepcopy(dense)
        models[f"low-rank {keep:g}"] = tnlm.compress(model, "svd", keep_targets=keep)
    rates = decode_rates(models, repeats=asked.repeats)
    ratios = {name: round(rate / rates["dense"], 3) for name, rate in rates.items()}
    print(json.dumps({"tokens_per_second": rates, "ratio_to_dense": ratios}, indent=1))


if __name__ == "__main__":
    main()
