"""Shapeshifter: trained from scratch, a tenth of the parameters
=============================================================

A Transformer whose matrices are all sums of Kronecker products from the start, as in Shapeshifter
(Panahi, Saeedi and Arodz 2021). It learns to count: sequences of tokens with a fixed step, whose
start and step are drawn at random. Larger and for longer::

    python examples/shapeshifter.py --width 128 --steps 1000
"""

from __future__ import annotations

import argparse
import tempfile

import tiny
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, PreTrainedModel, Trainer, TrainingArguments

import tnlm

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--keep-targets", type=float, default=0.1)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--steps", type=int, default=120)
asked = parser.parse_args(tiny.words())
torch.set_num_threads(1)  # tiny matrices gain nothing from more

# %%
# The task, as a dataset of sequences that are their own labels.

TOKENS, LENGTH = 64, 16


class Counting(Dataset):
    """Sequences ``start, start + step, start + 2 step, ...`` modulo the number of tokens."""

    def __init__(self, size: int, seed: int) -> None:
        """Draw starts and steps."""
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(TOKENS, (size, 1), generator=generator)
        step = torch.randint(1, 4, (size, 1), generator=generator)
        self.ids = (start + step * torch.arange(LENGTH)) % TOKENS

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sequence that is its own label."""
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def loss_of(model: PreTrainedModel) -> float:
    """Return the loss on sequences that are not trained on."""
    unseen = Counting(64, seed=1).ids.to(model.device)
    with torch.no_grad():
        return float(model(input_ids=unseen, labels=unseen).loss)


# %%
# ``from_config`` takes an ordinary config and never makes a dense matrix: the factors start at
# random, with the variance that the dense matrices would have.

config = LlamaConfig(
    vocab_size=TOKENS,
    hidden_size=asked.width,
    intermediate_size=4 * asked.width,
    num_hidden_layers=2,
    num_attention_heads=4,
    tie_word_embeddings=True,
)
model = tnlm.from_config(config, "shapeshifter", keep_targets=asked.keep_targets)
report = tnlm.report(model)
print(report)
print(f"loss before {loss_of(model):.3f}")

# %%
# It trains, saves and loads like any other model.

with tempfile.TemporaryDirectory() as folder:
    how = TrainingArguments(
        output_dir=folder,
        max_steps=asked.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=how, train_dataset=Counting(4096, seed=0)).train()
    print(f"loss after {loss_of(model):.3f}")
    loaded = tnlm.load(tnlm.save(model, f"{folder}/model"))
print(f"loss loaded {loss_of(loaded):.3f}")
tiny.show(tnlm.plot.allocation, report)
