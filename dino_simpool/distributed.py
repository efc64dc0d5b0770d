"""One process, torchrun or SLURM: the same calls everywhere.

With a single process there is no process group and every function is the identity, so callers never
ask. Under torchrun (RANK, WORLD_SIZE, ...) and inside a SLURM job step (SLURM_PROCID, SLURM_NTASKS,
...) `setup` joins the group: NCCL for tensors on CUDA, gloo for those on the CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_SPECIAL_STEPS = 2**32 - 16
"""SLURM's numbers for steps that are no srun: the batch script, and interactive shells."""
GATHER_BYTES = 2**26
"""Rows of one process that `gather_by_index` sends at a time."""
SAY_AFTER = 30.0
"""Seconds after which a process that waits for the others to start says so."""


def timeout() -> timedelta:
    """How long a process waits for another one: DINO_SIMPOOL_TIMEOUT in seconds, else 10 minutes.

    ValueError if the variable is no positive number.
    """
    given = os.environ.get("DINO_SIMPOOL_TIMEOUT", "600")
    if not given.isdigit() or not 0 < int(given) < 10**7:
        raise ValueError(f"DINO_SIMPOOL_TIMEOUT is {given!r}: give the seconds that a process may wait for another one")
    return timedelta(seconds=int(given))


def _slurm_environment() -> None:
    """Translate a job step of several SLURM tasks into the variables that torch reads.

    torchrun's own variables win. A batch script has SLURM_NTASKS too, but only what srun started is
    in a step and has that many processes. An interactive shell is a step of its own, and what is
    typed there is one process, whatever the job asked for.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    interactive = "SLURM_PTY_PORT" in os.environ or (step.isdigit() and int(step) >= _SPECIAL_STEPS)
    if "RANK" in os.environ or not step or tasks < 2 or interactive:
        return
    from submitit.slurm.slurm import _parse_node_list  # inside a container, scontrol may be missing

    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", "")) or "127.0.0.1"
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = str(tasks)
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    tasks_here = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", "1")))
    os.environ["LOCAL_WORLD_SIZE"] = tasks_here[0] if tasks_here else "1"
    os.environ.setdefault("MASTER_ADDR", _parse_node_list(nodes)[0])
    # Two jobs on one node need two ports, as do two steps of a job, and every task of a step the
    # same one. All are below those that systems hand out.
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(20000 + (job + 7919 * int(step)) % 12000))


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name of this start of the processes, the same in all of them and new after each restart.

    torchrun (--max-restarts) keeps its store, and with it the addresses of the processes of before,
    which Gloo would try to reach. Its count of restarts differs between nodes. So the first process
    makes up a name, each other one answers with a mark of its own, and believes the name if its
    mark was received.
    """
    mine = os.urandom(8).hex()
    if rank == 0:
        store.set("dino_simpool/attempt", mine)
        store.set(f"{mine}/all", " ".join(store.get(f"{mine}/{other}").decode() for other in range(1, size)))
        return mine
    end = time.monotonic() + timeout().total_seconds()
    while time.monotonic() < end:
        name = store.get("dino_simpool/attempt").decode()  # perhaps still that of the start before
        store.set(f"{name}/{rank}", mine)
        if store.check([f"{name}/all"]) and mine in store.get(f"{name}/all").decode():
            return name
        time.sleep(0.05)
    raise TimeoutError("gave up waiting for the first process, which torchrun has started beside this one")


def _join(backend: str, device_id: torch.device | None) -> None:
    """Meet the other processes. TimeoutError, after a line that says how many are missing."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    # torchrun has a store, starts all processes and knows if one is missing.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(address, port, size, False, timeout())
        fresh = dist.PrefixStore(_attempt(store, rank, size), store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=timeout(), device_id=device_id)
        return
    store = dist.TCPStore(address, port, size, rank == 0, timeout(), wait_for_workers=False)
    started, said = time.monotonic(), False
    there = store.add("dino_simpool", 1)
    while there < size:
        waited = time.monotonic() - started
        missing = f"waiting for {size - there} of {size} processes at {address}:{port}; started without srun or torchrun?"
        if waited > SAY_AFTER and not said and rank == 0:
            print(missing, file=sys.stderr, flush=True)
            said = True
        if waited > timeout().total_seconds():
            raise TimeoutError(f"gave up {missing}")
        time.sleep(0.05)
        there = store.add("dino_simpool", 0)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout(), device_id=device_id)


def setup(device: str = "auto") -> torch.device:
    """Join the process group of the launcher, unless there is one already, and return this
    process's device.

    device: auto, cpu, mps, cuda or cuda:N. ValueError if it is not there: no other device takes its
    place; also if a group that was there cannot send what is on the CPU. TimeoutError if the other
    processes do not come. RuntimeError in a loader process: where Python does not fork them, they
    import the script that started them, and would start it again.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself looks
        raise RuntimeError(
            "a loader process imports your script, which starts its work again: put the call below `if __name__ == "
            '"__main__":`, or give workers 0 (in training: data.workers)'
        )
    _slurm_environment()
    local = local_rank()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind, there in available.items() if there) if device == "auto" else device
    kind, _, number = name.partition(":")
    if not available[kind]:
        raise ValueError(
            f"device {device} is not available here: use {', '.join(k for k, there in available.items() if there)} or auto"
        )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and sys.platform == "win32":  # torch is built there without the store by which processes meet
        raise ValueError("several processes need Linux or macOS: start a single one, without torchrun")
    if several and (number or kind == "mps"):
        raise ValueError(
            f"several processes cannot share {name}: use device {'cpu' if kind == 'mps' else 'cuda'}, or one process"
        )
    if kind == "cuda":
        # A SLURM task may see its own GPU only.
        bound = several and torch.cuda.device_count() == 1 and "SLURM_STEP_ID" in os.environ
        index = int(number) if number else 0 if bound else local
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this node needs cuda:{index}, but {torch.cuda.device_count()} GPUs are visible"
            )
        torch.cuda.set_device(index)
        name = f"cuda:{index}"
    if several and not dist.is_initialized():
        # gloo as well: flags of the host travel on the CPU, without waiting for the GPU.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        _join(backend, torch.device(name) if kind == "cuda" else None)
    elif dist.is_initialized() and (missing := {"cpu", kind} - set(re.findall(r"(\w+):", dist.get_backend_config()))):
        raise ValueError(
            f"the process group that was made before has no backend for {' and '.join(sorted(missing))}: make it with "
            "backend cpu:gloo,cuda:nccl (TorchConfig of Ray), or gloo without GPUs"
        )
    return torch.device(name)


def cleanup() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        # A thread of Gloo takes the interpreter to free the tensors of the last exchange. torch 2.6
        # holds it while it waits for that thread, forever if the thread comes too late.
        time.sleep(0.1)
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process; 0 is the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """True in the process that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def exact_dtype(device: torch.device) -> torch.dtype:
    """For sums and means of many numbers: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, as a new tensor."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_mean(tensor: Tensor) -> Tensor:
    """Mean over the processes, as a new tensor."""
    return all_sum(tensor) / world_size()


def all_max(tensor: Tensor) -> Tensor:
    """Largest value over the processes, as a new tensor."""
    largest = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def largest_of_all(*values: int) -> list[int]:
    """For each value the largest of all processes; of bools, whether any process says yes.

    All processes call this together, on the CPU.
    """
    return all_max(torch.tensor([int(value) for value in values])).tolist()


def gather_objects(value: Any) -> list[Any]:
    """The values (small, picklable) of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def require_same_options(options: dict[str, dict[str, Any]]) -> None:
    """ValueError on all processes unless all were started with the same options, by group."""
    everyone = gather_objects(options)
    differences = [
        f"{group}.{name} is {value} on process 0, {other[group][name]} on process {number}"
        for number, other in enumerate(everyone)
        for group, values in everyone[0].items()
        for name, value in values.items()
        if other[group][name] != value
    ]
    if differences:
        raise ValueError(f"the processes were started with different options: {'; '.join(differences)}")


def require_agreement(what: str, value: object) -> None:
    """ValueError on all processes unless all have the same value of `what` (such as the step)."""
    values = gather_objects(value)
    if any(other != values[0] for other in values):
        said = ", ".join(f"{each} on process {number}" for number, each in enumerate(values))
        raise ValueError(f"the processes do not agree on {what} ({said}): do they all see the same folders?")


def gather_by_index(rows: Tensor, indices: Tensor, total: int) -> Tensor:
    """Rows computed by any process -> all rows in order, on every process, on the CPU.

    rows: (m, ...) of this process. indices: (m,), their places in 0..total-1; repeated places hold
    equal rows. Every place must be filled by some process. Rows travel as objects in parts of
    GATHER_BYTES, so a large set never has to fit into a message.
    """
    rows, indices = rows.cpu(), indices.cpu()
    gathered = rows.new_empty((total, *rows.shape[1:]))
    filled = torch.zeros(total, dtype=torch.bool)
    row_bytes = rows.element_size() * max(1, gathered[:1].numel())
    step = max(1, GATHER_BYTES // row_bytes)
    for start in range(0, max(gather_objects(len(rows))), step):
        # Cloned: a slice would be sent with all of its storage.
        part = (rows[start : start + step].clone(), indices[start : start + step].clone())
        for values, places in gather_objects(part):
            gathered[places] = values
            filled[places] = True
    assert filled.all(), f"{int((~filled).sum())} of {total} rows were computed by no process"
    return gathered


class _SumOverProcesses(torch.autograd.Function):
    """Sum over the processes, whose gradient is summed too (torch's own function is deprecated)."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:
        return all_sum(tensor)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return all_sum(gradients[0])


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes, for CPU groups: torch's own refuses CPU tensors.

    x: (B, C) or (B, C, H, W). Equal batch sizes on all processes. Evaluation and running statistics
    (biased variance for the normalization, unbiased for the running one) as in
    torch.nn.BatchNorm2d.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes (B, C, ...), given {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        over = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input if input.dtype == torch.float64 else input.float()
        count = x.numel() // x.shape[1] * world_size()
        # Two passes: the variance about the common mean does not cancel, as E[x^2] - E[x]^2 would
        # in float32.
        mean = _SumOverProcesses.apply(x.sum(over)) / count
        centered = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centered.square().sum(over)) / count
        if self.track_running_stats:
            with torch.no_grad():
                assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
                self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_((variance * (count / max(count - 1, 1))).to(self.running_var.dtype), share)
        normalized = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(input.dtype)


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm see the batches of all processes.

    torch's layer on CUDA, ours elsewhere. With one process nothing changes.
    """
    if world_size() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
            synced = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            # The tensors themselves, so that dtype and requires_grad stay what they were.
            synced.weight, synced.bias, synced.num_batches_tracked = child.weight, child.bias, child.num_batches_tracked
            synced.running_mean, synced.running_var = child.running_mean, child.running_var
            # timm fuses an activation into its BatchNorm layers: keep what follows the
            # normalization.
            after = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            setattr(module, name, nn.Sequential(synced, *after) if after else synced)
        else:
            synchronize_batch_norm(child, device)
    return module
