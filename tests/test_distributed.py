"""What processes do together, with real gloo groups on this machine; other tests start their processes with `run_processes`.

The processes are forked by a server that has imported everything once, so that each costs a tenth of a second and not the
seconds of importing torch; otherwise it is as if freshly started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from golden.load import assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_simpool import distributed
from dino_simpool.config import ModelConfig
from dino_simpool.distributed import SyncBatchNorm
from dino_simpool.models.encoder import build_encoder

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["dino_simpool.train", "dino_simpool.cli", "torch.utils.tensorboard", "pytest"])
TIMEOUT = 300  # seconds; only processes that wait for each other in vain take so long


@dataclass
class Outcome:
    """How a process ended."""

    status: int
    """Its exit status; negative: the signal that killed it."""
    value: Any
    """What its function returned, None if it did not return."""
    stderr: str


def run_processes(function: Callable[..., Any], *arguments: Any, environments: Sequence[dict[str, str]]) -> list[Outcome]:
    """Call function(*arguments) in one process for each of the environments, all at once; how they ended."""
    started = []
    with tempfile.TemporaryDirectory() as folder:
        for number, environment in enumerate(environments):
            receiver, sender = SERVER.Pipe(duplex=False)
            said = Path(folder) / str(number)
            process = SERVER.Process(target=_child, args=(sender, str(said), environment, function, arguments))
            process.start()
            sender.close()
            started.append((process, receiver, said))
        try:
            return [_outcome(*each) for each in started]
        finally:
            for process, _, _ in started:
                process.kill()


def _outcome(process: Any, receiver: Any, said: Path) -> Outcome:
    value = None
    if receiver.poll(TIMEOUT):
        with contextlib.suppress(EOFError):  # it died
            value = pickle.loads(receiver.recv_bytes())
    process.join(60)
    stderr = said.read_text() if said.exists() else ""
    assert process.exitcode is not None, f"a process does not end; it said: {stderr}"
    return Outcome(process.exitcode, value, stderr)


def _child(
    sender: Any, said: str, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        sender.send_bytes(pickle.dumps(function(*arguments)))
        distributed.cleanup()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once, as a crash: the others must notice by themselves


def group(size: int = 2) -> list[dict[str, str]]:
    """The variables that torchrun sets, for each process of a group on this machine."""
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def slurm_group(size: int = 2) -> list[dict[str, str]]:
    """The variables that srun sets, for each task of a step on this machine."""
    common = {"SLURM_NTASKS": str(size), "SLURM_TASKS_PER_NODE": str(size), "SLURM_STEP_NODELIST": "localhost"}
    common |= {"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "MASTER_PORT": free_port()}
    return [common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(size)]


def test_processes_that_are_started_again_meet_under_a_new_name() -> None:
    """In a store with all that earlier starts left there; the first process comes first, and then last."""
    store, names = dist.HashStore(), set()
    with ThreadPoolExecutor(4) as threads:
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
            started = []
            for rank in order:
                started.append(threads.submit(distributed._attempt, store, rank, 4))
                time.sleep(0.1)
            (name,) = {each.result(10) for each in started}
            names.add(name)
    assert len(names) == 3 and distributed._attempt(store, 0, 1) not in names


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the processes returned; one that failed is an AssertionError with what it said."""
    for outcome in outcomes:
        assert outcome.status == 0, outcome.stderr
    return [outcome.value for outcome in outcomes]


# -- SyncBatchNorm


CASES = [
    ((6, 5, 4), {}, torch.float64),
    ((6,), {"momentum": None}, torch.float64),
    ((6, 3, 3), {"affine": False, "eps": 1e-3, "momentum": 0.3}, torch.float64),
    ((6, 3, 3), {"track_running_stats": False}, torch.float64),
    ((6, 5, 4), {}, torch.float32),
    ((6,), {}, torch.float32),
]
"""Shape of an input without its batch, options, dtype."""


def batches(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Three inputs of 32 rows and the gradients of their outputs; channels have means far from 0, where naive sums cancel."""
    generator = torch.Generator().manual_seed(1)
    channels = (1, -1) + (1,) * (len(shape) - 1)
    offset, scale = torch.linspace(-200, 200, shape[0]).view(channels), torch.linspace(0.5, 4, shape[0]).view(channels)
    pairs = [torch.randn(2, 32, *shape, generator=generator) for _ in range(3)]
    return [((x * scale + offset).to(dtype), g.to(dtype)) for x, g in pairs]


def batch_norm_run(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that a BatchNorm layer computes for this process's share of the batches."""
    rows = slice(distributed.rank(), None, distributed.world_size())
    layer = layer.to(dtype)
    if layer.affine:
        nn.init.normal_(layer.weight, 1, 0.3, generator=torch.Generator().manual_seed(2))
        nn.init.normal_(layer.bias, 0, 0.3, generator=torch.Generator().manual_seed(3))
    out = {}
    for number, (x, g) in enumerate(batches(shape, dtype)):
        x = x[rows].clone().requires_grad_()
        y = layer(x)
        layer.zero_grad()
        (y * g[rows]).sum().backward()
        out |= {f"y{number}": y.detach(), f"grad_x{number}": x.grad}
        out |= {f"grad_{name}{number}": p.grad.clone() for name, p in layer.named_parameters()}
        out |= {f"buffer_{name}{number}": b.clone() for name, b in layer.named_buffers()}
    out["y_eval"] = layer.eval()(batches(shape, dtype)[0][0][rows]).detach()
    return out


def synced_runs() -> list[dict[str, Tensor]]:
    distributed.setup("cpu")
    return [batch_norm_run(SyncBatchNorm(shape[0], **options), shape, dtype) for shape, options, dtype in CASES]


def test_sync_batch_norm_of_2_x_16_is_batch_norm_of_32() -> None:
    """Outputs, gradients and running statistics over three batches, against torch's own layer in one process."""
    for case, (shape, options, dtype), *parts in zip(
        range(len(CASES)), CASES, *values(run_processes(synced_runs, environments=group())), strict=True
    ):
        plain = {1: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)](shape[0], **options)
        expected = batch_norm_run(plain, shape, dtype)
        rtol, atol = (1e-9, 1e-10) if dtype == torch.float64 else (1e-4, 1e-4)
        assert parts[0].keys() == parts[1].keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("buffer"):
                both = parts[0][name], parts[1][name]
                assert torch.equal(*both), f"case {case}: {name} differs between the processes"
                ours = both[0]
            elif name.startswith(("y", "grad_x")) and (name != "y_eval" or options.get("track_running_stats", True)):
                ours = torch.empty_like(value)
                ours[0::2], ours[1::2] = parts[0][name], parts[1][name]
            elif name == "y_eval":  # normalised by the batch of one process, as torch's does
                continue
            else:  # each process has the gradient of its own rows; DistributedDataParallel averages them
                ours = parts[0][name] + parts[1][name]
            assert ours.dtype == value.dtype
            assert_close(ours, value, rtol, atol, f"case {case}: {name}")


def test_sync_batch_norm_of_one_process_is_batch_norm() -> None:
    for shape, options, dtype in CASES:
        plain = {1: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)](shape[0], **options)
        ours = batch_norm_run(SyncBatchNorm(shape[0], **options), shape, dtype)
        for name, value in batch_norm_run(plain, shape, dtype).items():
            assert torch.equal(ours[name], value), name


RESNET = ModelConfig(arch="resnet18", gamma=2.0, width=8, image_size=64)


def resnet_run(synchronize: bool) -> dict[str, Tensor]:
    """Features of this process's images, averaged gradients and BatchNorm statistics after two batches."""
    device = distributed.setup("cpu")
    rows = slice(distributed.rank(), None, distributed.world_size())
    torch.manual_seed(0)
    encoder = build_encoder(RESNET).double()
    names = list(encoder.state_dict())
    if synchronize:
        distributed.synchronize_batch_norm(encoder, device)
        assert sum(isinstance(m, SyncBatchNorm) for m in encoder.modules()) == 20
        assert list(encoder.state_dict()) == names  # or checkpoints of one and of several processes would differ
    forward: nn.Module = encoder
    if distributed.world_size() > 1:
        forward = DistributedDataParallel(encoder, broadcast_buffers=False)
    out: dict[str, Tensor] = {}
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(32, 3, 64, 64, generator=generator, dtype=torch.float64)
        cotangent = torch.randn(32, encoder.embed_dim, generator=generator, dtype=torch.float64)
        encoder.zero_grad()
        features = forward(images[rows])
        (features * cotangent[rows]).sum(1).mean().backward()
        out |= {f"features{number}": features.detach()}
        out |= {f"grad_{name}{number}": p.grad.clone() for name, p in encoder.named_parameters()}
    return out | {f"buffer_{name}": b.clone() for name, b in encoder.named_buffers()}


def test_resnet18_of_2_x_16_is_resnet18_of_32() -> None:
    expected = resnet_run(synchronize=False)
    parts = values(run_processes(resnet_run, True, environments=group()))
    for name, value in expected.items():
        if name.startswith("features"):
            ours = torch.empty_like(value)
            ours[0::2], ours[1::2] = parts[0][name], parts[1][name]
        else:
            assert torch.equal(parts[0][name], parts[1][name]), name
            ours = parts[0][name]
        assert_close(ours, value, 1e-8, 1e-10, name)


def test_one_process_keeps_its_batch_norm() -> None:
    encoder = build_encoder(RESNET)
    distributed.synchronize_batch_norm(encoder, torch.device("cpu"))
    assert not any(isinstance(m, SyncBatchNorm) for m in encoder.modules())


# -- the small functions


def small_functions() -> dict[str, Any]:
    device = distributed.setup("cpu")
    rank = distributed.rank()
    given = torch.tensor([1.0 + rank, -3.0 * rank], dtype=torch.float64)
    out: dict[str, Any] = {
        "facts": (str(device), rank, distributed.world_size(), distributed.local_rank(), distributed.local_world_size()),
        "main": distributed.is_main(),
        "mean": distributed.all_mean(given),
        "max": distributed.all_max(given),
        "given": given,
        "any": distributed.largest_of_all(rank == 1, False, 5 - rank),
    }
    places = torch.tensor([[0, 2, 4, 0], [1, 3, 4, 1]][rank])  # 4 is computed by both, 0 and 1 twice by one
    rows = (places[:, None] * torch.tensor([10, 1])).int()
    out["rows"] = distributed.gather_by_index(rows, places, 5)
    distributed.GATHER_BYTES = 24  # three rows at a time: a second part of one row, and of rank 1 alone below
    out["rows in parts"] = distributed.gather_by_index(rows[: 3 + rank], places[: 3 + rank], 5)
    nothing = torch.empty(0, 2, 3)  # fewer images than processes
    out["one rank only"] = distributed.gather_by_index(torch.ones(1, 2, 3) if rank == 1 else nothing, torch.arange(rank), 1)
    distributed.require_agreement("the weather", "fine")
    try:
        distributed.require_agreement("the step", 5 + rank)
    except ValueError as error:
        out["disagreement"] = str(error)
    try:
        distributed.gather_by_index(rows, places, 6)
    except AssertionError as error:
        out["missing"] = str(error)
    distributed.barrier()
    return out


@pytest.mark.parametrize("launch", [group, slurm_group], ids=["torchrun", "slurm"])
def test_small_functions_of_two_processes(launch: Callable[[], list[dict[str, str]]]) -> None:
    outs = values(run_processes(small_functions, environments=launch()))
    for rank, out in enumerate(outs):
        assert out["facts"] == ("cpu", rank, 2, rank, 2)
        assert out["main"] == (rank == 0)
        assert "do not agree on the step (5 on process 0, 6 on process 1)" in out["disagreement"]
        assert out["mean"].tolist() == [1.5, -1.5] and out["max"].tolist() == [2.0, 0.0]
        assert out["given"].tolist() == [1.0 + rank, -3.0 * rank]
        assert out["any"] == [1, 0, 5]
        for name in ("rows", "rows in parts"):
            assert torch.equal(out[name], (torch.arange(5)[:, None] * torch.tensor([10, 1])).int())
        assert torch.equal(out["one rank only"], torch.ones(1, 2, 3))
        assert out["missing"].startswith("1 of 6 rows")


def test_one_process_needs_no_group() -> None:
    given = torch.tensor([1.0, 2.0])
    for function in (distributed.all_mean, distributed.all_max):
        result = function(given)
        assert torch.equal(result, given) and result.data_ptr() != given.data_ptr()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.largest_of_all(True, False, 3) == [1, 0, 3]
    distributed.barrier()
    rows = torch.tensor([[1.0], [2.0], [1.0]])
    assert distributed.gather_by_index(rows, torch.tensor([1, 0, 1]), 2).tolist() == [[2.0], [1.0]]
    assert distributed.gather_by_index(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 0).shape == (0, 3)
    with pytest.raises(AssertionError, match="1 of 3 rows"):
        distributed.gather_by_index(rows, torch.tensor([1, 0, 1]), 3)


# -- set-up


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ValueError, match=f"device {device} is not available here: use cpu or auto"):
            distributed.setup(device)
    assert distributed.setup("auto") == distributed.setup("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="cuda:3, but 1 GPUs are visible"):
        distributed.setup("cuda:3")


@pytest.mark.parametrize(
    ("step", "count", "used"), [("0", 1, 0), ("0", 4, 3), (None, 4, 3)], ids=["bound", "step sees all", "torchrun"]
)
def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch, step: str | None, count: int, used: int) -> None:
    """The one of its number on the node, except for a SLURM task that sees its own only."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # nothing to join
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"} | ({} if step is None else {"SLURM_STEP_ID": step})
    monkeypatch.setattr(os, "environ", ranks)
    assert distributed.setup("auto") == torch.device("cuda", used) and chosen == [used]
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ValueError, match="made before has no backend for cpu: make it with backend cpu:gloo,cuda:nccl"):
        distributed.setup("auto")


def test_a_single_slurm_task_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the batch script of several tasks, before srun makes a step of them."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert distributed.setup("cpu") == torch.device("cpu") and distributed.world_size() == 1
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert distributed.setup("cpu") == torch.device("cpu") and distributed.world_size() == 1


def test_slurm_variables_become_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Third of eight tasks; the port differs from job to job and from step to step. SLURM's own tools are not needed."""
    slurm = {
        "PROCID": "2",
        "STEP_ID": "0",
        "NTASKS": "8",
        "LOCALID": "2",
        "TASKS_PER_NODE": "4(x2)",
        "JOB_NODELIST": "gpu[07-08]",
        "JOB_ID": "70001",
    }
    wanted = {
        "RANK": "2",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "30001",
    }
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    monkeypatch.setattr(os, "environ", environment.copy())
    distributed._slurm_environment()
    assert {name: os.environ[name] for name in wanted} == wanted
    # A step may be smaller than its job: three tasks on its second node.
    step = {"SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NTASKS": "3"}
    monkeypatch.setattr(os, "environ", environment | step)
    distributed._slurm_environment()
    assert [os.environ[name] for name in ("MASTER_ADDR", "LOCAL_WORLD_SIZE", "WORLD_SIZE")] == ["gpu08", "3", "3"]
    monkeypatch.setattr(os, "environ", environment | {"RANK": "0"})
    distributed._slurm_environment()  # torchrun inside the job: its variables win
    assert os.environ == environment | {"RANK": "0"}
    ports = set()
    for number in ("0", "1", "2"):
        monkeypatch.setattr(os, "environ", environment | {"SLURM_STEP_ID": number})
        distributed._slurm_environment()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 3


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_STEP_ID": "4294967290"},
        {"SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "40001"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["salloc", "pty", "one task"],
)
def test_an_interactive_slurm_shell_is_one_process(monkeypatch: pytest.MonkeyPatch, shell: dict[str, str]) -> None:
    """Its variables say how many tasks the job may start. Waiting for them took 31 minutes."""
    for name, value in ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"} | shell).items():
        monkeypatch.setenv(name, value)
    assert distributed.setup("cpu") == torch.device("cpu") and distributed.world_size() == 1


def test_a_process_that_waits_says_for_how_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in group()[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DINO_SIMPOOL_TIMEOUT", "1")
    monkeypatch.setattr(distributed, "SAY_AFTER", 0.2)
    with pytest.raises(TimeoutError, match="gave up waiting for 1 of 2 processes at"):
        distributed.setup("cpu")
    assert capsys.readouterr().err.startswith("waiting for 1 of 2 processes at 127.0.0.1:")
    monkeypatch.setenv("DINO_SIMPOOL_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="DINO_SIMPOOL_TIMEOUT is 'soon': give the seconds"):
        distributed.setup("cpu")
