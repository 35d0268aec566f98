"""Train a Transformer from scratch whose matrices are all sums of Kronecker products.

    python examples/shapeshifter.py

It has a tenth of the numbers, as in Shapeshifter (Panahi, Saeedi and Arodz 2021), and learns to
count: sequences of tokens with a fixed step, whose start and step are drawn at random.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, PreTrainedModel, Trainer, TrainingArguments

import tnlm

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


def main() -> None:
    """Make the model, train it, save it and load it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-targets", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # tiny matrices gain nothing from more

    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=asked.width,
        intermediate_size=4 * asked.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = tnlm.from_config(config, "shapeshifter", keep_targets=asked.keep_targets)
    print(tnlm.report(model))
    print(f"loss before {loss_of(model):.3f}")
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


if __name__ == "__main__":
    main()
