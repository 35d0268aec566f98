"""Write the texts that other benchmarks calibrate, train and measure on: a mixture, and prose.

    python benchmarks/texts.py OUT --wiki wiki.valid.raw --c4 c4_eval.jsonl

OUT/mixture.jsonl alternates pieces of WikiText-2 with documents of C4, as many characters of each.
The first ``--skip`` documents of C4 are left out of it, so that what is measured on is not trained
on. OUT/prose.txt is the help on Python's topics, which every installation has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tnlm.calibration.rows import read_rows

PIECE = 2000
"""Characters of a piece of WikiText-2."""


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--wiki", type=Path, required=True)
    parser.add_argument("--c4", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=100, help="documents at the start of --c4")
    asked = parser.parse_args()
    documents = [row["text"] for row in read_rows(asked.c4)]
    mixed = mixture(asked.wiki.read_text(), documents[asked.skip :])
    asked.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in mixed]
    (asked.out / "mixture.jsonl").write_text("".join(lines))
    (asked.out / "prose.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)))


def mixture(wiki: str, documents: list[str]) -> Iterator[str]:
    """Yield documents, and after each the pieces of WikiText-2 that bring it up to their length.

    Ends with the shorter of the two.

    >>> [len(text) for text in mixture("a" * 5000, ["b" * 1500, "c" * 1500, "d" * 9000])]
    [1500, 2000, 1500, 2000, 9000, 1000]
    """
    given, taken = 0, 0
    for document in documents:
        if taken >= len(wiki):
            return
        yield document
        given += len(document)
        while taken < min(given, len(wiki)):
            piece = wiki[taken : taken + PIECE]
            yield piece
            taken += len(piece)


if __name__ == "__main__":
    main()
