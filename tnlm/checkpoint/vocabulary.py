"""Makes `resize_token_embeddings` work on factorized tables and heads, all or nothing."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.checkpoint.entries import Entry, network_of
from tnlm.checkpoint.rows import Factored, fit_rows, holders, resized
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import ModelError, TargetError, TnlmError
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.layers.fused import FusedLinear
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.packed import PackedEmbedding
from tnlm.metrics.metric import Metric

HOOK = "resize_token_embeddings"
FACTORED = (FactorizedEmbedding, FactorizedHead, FactorizedLinear, FusedLinear)


def install(model: PreTrainedModel) -> None:
    """Make `resize_token_embeddings` of a compressed model resize factorized tables and heads."""
    vars(model)[HOOK] = partial(resize, model)


def uninstall(model: PreTrainedModel) -> None:
    """Restore transformers' own `resize_token_embeddings`."""
    vars(model).pop(HOOK, None)


def resize(model: PreTrainedModel, *args: Any, **kwargs: Any) -> nn.Module:
    """Resize the vocabulary with transformers' method; on failure, undo everything.

    New rows approximate those that transformers would give a dense model, as closely as the factors
    allow. The rows of other tokens do not change.
    """
    _check_unpacked(model.get_input_embeddings())
    work, before = _Resizing(model), _Snapshot(model)
    own: Any = vars(model)
    own["_get_resized_embeddings"], own["_get_resized_lm_head"] = work.embeddings, work.head
    try:
        with torch.inference_mode(False):  # keeps new rows trainable, wherever they are made
            found: nn.Module = type(model).resize_token_embeddings(model, *args, **kwargs)
            work.finish()
            before.untie(model)
    except BaseException:
        before.restore()
        raise
    finally:
        for name in ("_get_resized_embeddings", "_get_resized_lm_head"):
            own.pop(name, None)
    return found


@torch.no_grad()
def set_rows(model: PreTrainedModel, ids: Tensor, rows: Tensor) -> None:
    """Set the embedding vectors of some tokens in place, and change no others.

    A tied head changes with its table.

    Args:
        model: compressed or not.
        ids: token ids ``(count,)``, without duplicates.
        rows: new vectors ``(count, width)``; factors approximate them as closely as they can.

    Raises:
        TargetError: if ids and rows do not fit the table, or its rows share factors.

    Example:
        >>> import tnlm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = tnlm.compress(LlamaForCausalLM(tiny), "tensorgpt", keep_targets=0.9)
        >>> set_rows(model, torch.tensor([3]), torch.ones(1, 16))
        >>> model.get_input_embeddings()(torch.tensor([3])).round(decimals=3).unique().tolist()
        [1.0]
    """
    table: Any = model.get_input_embeddings()
    _check_unpacked(table)
    count, width = table.num_embeddings, table.embedding_dim
    fits = ids.dim() == 1 and rows.shape == (len(ids), width) and len(ids.unique()) == len(ids)
    if not fits or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count):
        raise TargetError(
            f"ids {tuple(ids.shape)} and rows {tuple(rows.shape)}; allowed: ids from 0 to "
            f"{count - 1}, each once, and rows of width {width}"
        )
    if not isinstance(table, FactorizedEmbedding):
        table.weight[ids.to(table.weight.device)] = rows.to(table.weight)
        return
    entry = _entry_of(model, table)[1]
    like = next(table.parameters())
    found = fit_rows(table.network, table.factors(), rows.to(like.device), _fit(entry))
    for name in holders(table.network):
        factor = getattr(table, name)
        factor[ids.to(like.device)] = found[name].to(factor)


def _check_unpacked(table: Any) -> None:
    """Raise `ModelError` if a table is stored in few bits."""
    if isinstance(table, PackedEmbedding):
        raise ModelError(
            "the embedding is stored in few bits, so its rows cannot be changed; use the result of "
            "tnlm.to_dense, and compress it again"
        )


def _is_factored(module: Any) -> bool:
    return isinstance(module, FACTORED)


def _fit(entry: Entry) -> Any:
    """Return a function that fits independent rows in an entry's format."""
    structure = get_format(entry["format"])
    spec = from_dict(structure.spec, entry["options"])
    return lambda rows: structure.fit(rows, Metric(), spec)


def _entry_of(model: PreTrainedModel, module: nn.Module) -> tuple[str, Entry]:
    """Return the name and the entry of a compressed module."""
    modules = model.config.quantization_config.modules
    for name, entry in modules.items():
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue  # a head that this class of model lacks
        if found is module:
            return name, entry
    raise ModelError(f"config.json has no entry for the {type(module).__name__} to be resized")


class _Resizing:
    """Makes the new tables and heads for one resize."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._kind = model, type(model)
        self._rows: dict[nn.Parameter, nn.Parameter] = {}
        self._done: list[tuple[str, Entry, nn.Module, dict[str, bool]]] = []

    def embeddings(self, old: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the resized table, in place of transformers' own method."""
        if not _is_factored(old):
            return self._kind._get_resized_embeddings(self._model, old, *args, **kwargs)
        weight = old.to_dense().detach()
        padding: Any = old.padding_idx
        rows, columns = weight.shape
        dense = nn.Embedding(rows, columns, padding_idx=padding, _weight=weight)
        found = self._kind._get_resized_embeddings(self._model, dense, *args, **kwargs)
        made: Any = self._resized(old, found.weight.detach(), None)
        if made is not old:
            made.padding_idx = found.padding_idx
            self._done[-1][1]["padding_idx"] = found.padding_idx
        return made

    def head(self, old: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the resized head, in place of transformers' own method."""
        if not _is_factored(old):
            return self._kind._get_resized_lm_head(self._model, old, *args, **kwargs)
        weight = old.to_dense().detach()
        bias = None if old.bias is None else old.bias.detach()
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias)
        found: Any = self._kind._get_resized_lm_head(self._model, dense, *args, **kwargs)
        return self._resized(
            old, found.weight.detach(), None if bias is None else found.bias.detach()
        )

    def _resized(self, old: Any, dense: Tensor, bias: Tensor | None) -> nn.Module:
        name, entry = _entry_of(self._model, old)
        if len(dense) == entry["shape"][0]:
            kept: nn.Module = old
            return kept
        if isinstance(old, FusedLinear):
            raise TargetError(f"{name} holds several matrices and cannot be resized")
        entry = copy.deepcopy(entry) | {"shape": list(dense.shape)}
        try:
            holders(old.network)
            if "out_split" in entry["options"]:  # rows are independent, so it has one mode
                entry["options"]["out_split"] = [len(dense)]
            if network_of(entry).params > dense.numel():  # loading would reject it
                raise TargetError("the factors would be larger than the dense matrix")
            made = self._made(old, entry, dense, bias)
        except TnlmError as error:
            raise TargetError(f"{name} cannot have {len(dense)} rows: {error}") from error
        flags = {name: p.requires_grad for name, p in old.named_parameters()}
        self._done.append((name, entry, made, flags))
        return made

    def _made(self, old: Factored, entry: Entry, dense: Tensor, bias: Tensor | None) -> nn.Module:
        made = resized(entry, old, dense[old.network.shape[0] :], bias, _fit(entry))
        for name, parameter in old.named_parameters():
            owner, _, last = name.rpartition(".")
            if name == "bias":
                continue
            if parameter in self._rows:  # a tied head follows its table
                setattr(made.get_submodule(owner), last, self._rows[parameter])
            elif parameter.shape == made.get_parameter(name).shape:
                setattr(made.get_submodule(owner), last, parameter)
            else:
                self._rows[parameter] = made.get_parameter(name)
        return made

    def finish(self) -> None:
        """Put the new modules into the model, and update its config."""
        config = self._model.config.quantization_config
        modules = dict(config.modules)
        for name, entry, module, flags in self._done:
            if self._model.get_submodule(name) is not module:
                self._model.set_submodule(name, module)
            for own, parameter in module.named_parameters():
                parameter.requires_grad_(flags.get(own, True))
            modules[name] = entry
        config.modules = modules


def _holders(model: nn.Module) -> list[list[str]]:
    """Return all names of every parameter."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


class _Snapshot:
    """A model's modules, parameters, attributes and configs, to restore; copies no data."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._data = [(p, p.data, p.requires_grad) for p in model.parameters()]
        self._names = _holders(model)
        owners: dict[int, Any] = {}
        for module in model.modules():
            held = (module, module._modules, module._parameters, module._buffers)
            owners |= {id(owner): vars(owner) if owner is module else owner for owner in held}
        for config in (model.config, model.config.get_text_config()):
            owners[id(config)] = vars(config)
            found = getattr(config, "quantization_config", None)
            if found is not None:
                owners[id(found)] = vars(found)
        self._owners = [(owner, dict(owner)) for owner in owners.values()]

    def untie(self, model: nn.Module) -> None:
        """Separate biases that the resize has merged, as in BERT, which could not be saved."""
        were = {name: names for names in self._names for name in names}
        for first, *others in _holders(model):
            for name in (each for each in others if each not in were.get(first, [each])):
                owner, _, last = name.rpartition(".")
                twin = copy.deepcopy(model.get_parameter(name))
                setattr(model.get_submodule(owner), last, twin)

    def restore(self) -> None:
        """Undo all changes since the snapshot."""
        for owner, before in self._owners:
            owner.clear()
            owner.update(before)
        for parameter, data, needed in self._data:
            parameter.data = data
            parameter.requires_grad_(needed)
