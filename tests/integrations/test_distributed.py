"""Compressed models in several processes: the same fits, and the gradients of one process."""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import tnlm

WORLD = 2
IDS = torch.arange(128).mul(7).remainder(61).reshape(8, 16)
SCHEMES = {"svd": {}, "kron": {}, "albert": {}}
SCHEMES |= {"svd-llm": {"calibration": IDS, "max_length": 16}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="processes are started as on Linux"),
]


def make(scheme):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    options = SCHEMES[scheme]
    return tnlm.compress(
        LlamaForCausalLM(config), scheme, keep_targets=0.6, progress=False, **options
    )


def loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def same_everywhere(model):
    numbers = torch.cat([p.detach().flatten() for p in model.parameters()])
    everywhere = [torch.empty_like(numbers) for _ in range(WORLD)]
    dist.all_gather(everywhere, numbers)
    return all(torch.equal(other, numbers) for other in everywhere)


def try_training(train, teacher):
    """Return whether a training ends the same everywhere, in as many steps as shared data takes."""
    model, steps = make("svd"), []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    train(model, *teacher, IDS, batch_size=2, max_length=16, progress=False, callbacks=[Count()])
    return {"same": same_everywhere(model), "steps": len(steps)}


def try_scheme(scheme, rank):
    """Return what is true of a scheme in this process."""
    alone = make(scheme).train()
    loss(alone, IDS).backward()
    wanted = {name: p.grad for name, p in alone.named_parameters()}
    mine = IDS.chunk(WORLD)[rank]
    found = {}
    found["same fit"] = same_everywhere(alone)
    for name, wrap in {"ddp": DistributedDataParallel, "fsdp2": shard}.items():
        model = make(scheme).train()
        wrapped = wrap(model)
        loss(wrapped, mine).backward()
        found[name] = all(
            torch.allclose(full(p.grad), wanted[key], rtol=1e-4, atol=1e-6)
            for key, p in model.named_parameters()
        )
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options)
    if rank == 0:
        again = make(scheme)
        again.load_state_dict(gathered)
        found["gathered"] = torch.equal(loss(again, IDS), loss(make(scheme), IDS))
    return found


def work(rank, port, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    dist.init_process_group("gloo")
    found = {scheme: try_scheme(scheme, rank) for scheme in SCHEMES}
    for name, teacher in {"finetune": [], "distill": [make("kron")]}.items():
        found[name] = try_training(getattr(tnlm, name), teacher)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, args=(port, folder), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_processes_fit_the_same_and_give_the_gradients_of_one(scheme, found):
    for rank, facts in enumerate(found):
        names = {"same fit", "ddp", "fsdp2"} | ({"gathered"} if rank == 0 else set())
        assert facts[scheme] == dict.fromkeys(names, True)


@pytest.mark.parametrize("name", ["finetune", "distill"])
def test_training_shares_the_data_and_ends_the_same_in_both(name, found):
    steps = len(IDS) // 2 // WORLD
    assert [facts[name] for facts in found] == [{"same": True, "steps": steps}] * WORLD
