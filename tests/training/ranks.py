"""Runs optimiser steps on several gloo processes and keeps what each rank saw, for the tests beside it."""

import hashlib
import json
import multiprocessing as mp
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vaegan_dist.config import Config
from vaegan_dist.config_source import dump_yaml, load_config
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.loader import Position, train_batches
from vaegan_dist.training.pictures import image_of
from vaegan_dist.training.state import create_state
from vaegan_dist.training.step import Step

TIMEOUT = 240


def run_ranks(config: Config, world_size: int, folder: Path, dtype: torch.dtype, around_ddp: bool = False) -> list[Any]:
    """Train every phase of `config` on `world_size` ranks; a list of per-step rows for each rank.

    Args:
        around_ddp: make the mistake of calling the network around its DDP wrapper.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    arguments = (world_size, port, folder, str(dtype).removeprefix("torch."), around_ddp)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(TIMEOUT)
            assert process.exitcode == 0, f"a rank of {world_size} ended with {process.exitcode}"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: Path, dtype: str, around_ddp: bool) -> None:
    torch.set_num_threads(1)
    config = load_config(files=[folder / "config.yaml"])
    if world_size > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    rows = steps_of(config, rank, world_size, getattr(torch, dtype), around_ddp)
    (folder / f"rank-{rank}.json").write_text(json.dumps(rows))
    if world_size > 1:
        dist.destroy_process_group()


def steps_of(config: Config, rank: int, world_size: int, dtype: torch.dtype, around_ddp: bool = False) -> list[Any]:
    """One row per step: its phase, its terms averaged over the ranks, and a hash of this rank's parameters."""
    dataset = open_dataset(config.data.path)
    manifest = dataset.manifest
    image = image_of(manifest)
    state = create_state(config, image, torch.device("cpu"), dtype)
    batches = train_batches(
        dataset,
        seed=config.run.seed,
        streams=config.streams,
        batch_size=config.training.batch_size,
        block_shards=config.data.block_shards,
        position=Position(epoch=0, consumed=0),
        rank=rank,
        world_size=world_size,
        loader_workers=0,
        prefetch=2,
    )
    rows = []
    for phase in state.remaining_phases():
        step = Step(state, phase, rank, world_size)
        if around_ddp:
            step.modules = list(step.stages)
        while not state.phase_done:
            position, batch = next(batches)
            step.sums.zero_()
            before = {name: digest(network) for name, network in state.networks.items()}
            step(batch.images)
            moved = {name: digest(network) != before[name] for name, network in state.networks.items()}
            state.advance(config.training.batch_size, position)
            sums = step.sums.clone()
            if world_size > 1:
                dist.all_reduce(sums)
            terms = dict(zip(step.term_names, (sums / world_size).tolist(), strict=True))
            frozen = [name for name, network in state.networks.items() if name not in step.trained]
            leaks = [name for name in frozen if any(p.grad is not None for p in state.networks[name].parameters())]
            whole = digest(state.networks) + digest_of(state.memory)
            rows.append({"phase": phase.name, "terms": terms, "parameters": whole, "leaks": leaks, "moved": moved})
    batches.close()
    return rows


def digest(module: torch.nn.Module) -> str:
    """Hash of every parameter's bytes."""
    return digest_of(module.state_dict())


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of every tensor's bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()
