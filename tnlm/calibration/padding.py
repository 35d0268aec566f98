"""Separates a batch's rows from padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tnlm.calibration.inputs import MEDIA
from tnlm.errors import CalibrationError


@dataclass(frozen=True)
class Padding:
    """The masks of a batch.

    Attributes:
        masks: masks of the text and of the decoder's input; ``(sequences, length)`` each, bool.
        text: whether all sequences are texts; if not, sequences of other shapes have no padding.
    """

    masks: tuple[Tensor, ...]
    text: bool = True

    def counted(self, name: str, x: Tensor) -> Tensor:
        """Return the rows of ``x`` that are not padding, ``(rows, width)``.

        Args:
            name: the module with the input or output ``x``.
            x: ``(..., width)``; if there is one row per sequence, as in a pooler, all count.

        Raises:
            CalibrationError: if no mask fits, or several different ones.

        Example:
            >>> import torch
            >>> padding = Padding((torch.tensor([[True, True, False]]),))
            >>> padding.counted("q_proj", torch.arange(3.0).reshape(1, 3, 1)).flatten()
            tensor([0., 1.])
        """
        rows = x.reshape(-1, x.shape[-1])
        if any(x.shape[:-1] == mask.shape[:1] for mask in self.masks):
            return rows
        fitting = [mask for mask in self.masks if x.shape[:-1] == mask.shape]
        fitting = fitting or [mask for mask in self.masks if len(rows) == mask.numel()]
        if not fitting and not self.text:
            return rows
        if not fitting or not all(bool((mask == fitting[0]).all()) for mask in fitting):
            raise CalibrationError(
                f"padding cannot be matched with the rows of {name}, of shape {tuple(x.shape)}; "
                "use sequences of one length without padding"
            )
        return rows[fitting[0].reshape(-1).to(x.device)]


def padding_of(batch: Mapping[str, Tensor]) -> Padding | None:
    """Return the masks of a batch, or None if nothing is padding.

    Example:
        >>> import torch
        >>> padding_of({"attention_mask": torch.ones(1, 3)}) is None
        True
    """
    masks = {n: batch[n].bool() for n in ("attention_mask", "decoder_attention_mask") if n in batch}
    if all(bool(mask.all()) for mask in masks.values()):
        return None
    read = batch.get("decoder_input_ids", batch.get("labels"))
    if read is not None and read.dim() == 2 and "decoder_attention_mask" not in masks:
        masks["decoder_attention_mask"] = (read == read).bool()  # no padding
    text = not any(name in batch for name in MEDIA)
    return Padding(tuple(masks.values()), text)
