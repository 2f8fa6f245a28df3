"""Many processes: joining them, the rows that each of them owns, and decisions that all of them must take alike.

jax runs one program in every process (multi-controller): each calls the same jitted functions in the same order, on
arrays that lie on the devices of all. What differs is the host's work: a process tokenizes the prompts, and scores the
completions, whose rows lie on its own devices. With one process everything here is the identity, or nearly.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from gspo.parallel import peers
from gspo.types import UserError

HEARTBEAT_SECONDS = 30  # a process that was silent for so long is lost, and the others stop
JOIN_SECONDS = 300
LOST = (
    "another process of this run is gone, and this one cannot go on without it; start all of them again with the "
    "same command: the run "
    "resumes from its last checkpoint"
)


# ---------------------------------------------------------------------------------------------------- joining


def initialize(coordinator: str = "", num_processes: int = 0, process_id: int = -1, join: bool = False) -> None:
    """Makes this process one of many, before jax touches a device. Does nothing in a run of one process.

    coordinator, num_processes, process_id: HOST:PORT of process 0, how many there are, and which of them this is; all
    or none. join: take them from the environment of SLURM, Open MPI, GKE or Cloud TPU, as `jax.distributed.initialize`
    finds them; implied by more than one SLURM or Open MPI task, since tasks that do not join would write over one
    another's run. Raises UserError where the three are not complete, or the processes cannot be joined.
    """
    given = (bool(coordinator), num_processes != 0, process_id != -1)
    if any(given) and not all(given):
        missing = [
            flag
            for flag, there in zip(("--coordinator", "--num_processes", "--process_id"), given, strict=True)
            if not there
        ]
        raise UserError(
            f"{missing[0]}: is missing; --coordinator=HOST:PORT, --num_processes and --process_id go together"
        )
    limits = {"initialization_timeout": JOIN_SECONDS, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if all(given):
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator={coordinator}: give HOST:PORT of the machine on which process 0 runs")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id}: must be in 0..{num_processes - 1}, below --num_processes={num_processes}"
            )
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    elif join or _tasks() > 1:
        arguments = {}
    else:
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: see `gspo.run.cli.StopSignal`
    try:
        jax.distributed.initialize(**arguments, **limits)
    except (RuntimeError, ValueError) as error:
        where = coordinator or "the processes that the environment describes"
        raise UserError(f"--distributed: could not join {where}: {str(error).splitlines()[0]}") from None
    try:
        peers.watch(HEARTBEAT_SECONDS, leave_lost)
    except OSError as error:
        raise UserError(f"--distributed: process 0 cannot be reached by the others: {error}") from None


def _tasks() -> int:
    """Tasks of the SLURM step or of mpirun that started this process; 1 without them."""
    in_step = "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ
    return max(int(os.environ.get("SLURM_NTASKS", 1)) if in_step else 1, int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)))


def is_primary() -> bool:
    return jax.process_index() == 0


# ---------------------------------------------------------------------------------------------------- rows


def local_rows(sharding: Sharding, count: int) -> np.ndarray:
    """Indices, rising, of the rows out of `count` that lie on this process's devices. Rows may lie on several
    processes."""
    if jax.process_count() == 1:
        return np.arange(count)
    slices = {index[0].indices(count) for index in sharding.addressable_devices_indices_map((count,)).values()}
    return np.unique(np.concatenate([np.arange(*s) for s in slices]))


def put_rows(sharding: Sharding, local: np.ndarray, count: int, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
    """Rows of this process, [len(local), ...] each -> arrays of all `count` rows, cut along their first axis as the
    sharding says."""
    if jax.process_count() == 1:
        return jax.device_put(arrays, sharding)

    def one(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            return x[np.searchsorted(local, np.arange(*index[0].indices(count)))]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, part)

    return tuple(map(one, arrays))


def fetch_rows(local: np.ndarray, *arrays: jax.Array) -> tuple[np.ndarray, ...]:
    """The rows `local` (first axis) of arrays that are cut along it, on the host. Fails where one of them lies
    elsewhere."""
    if jax.process_count() == 1:
        return tuple(np.asarray(x)[local] for x in jax.device_get(arrays))

    def one(x: jax.Array) -> np.ndarray:
        out, filled = np.empty((len(local), *x.shape[1:]), x.dtype), np.zeros(len(local), bool)
        for shard in x.addressable_shards:
            rows = np.arange(*shard.index[0].indices(x.shape[0]))
            at = np.searchsorted(local, rows)
            mine = (at < len(local)) & (local[np.minimum(at, len(local) - 1)] == rows)
            out[at[mine]], filled[at[mine]] = np.asarray(shard.data)[mine], True
        if not filled.all():
            raise ValueError(f"row {local[~filled][0]} lies on no device of process {jax.process_index()}")
        return out

    return tuple(map(one, arrays))


def gather_rows(local: np.ndarray, count: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows of each process, [len(local), ...] on the host -> all `count` rows, on every host. For what is small:
    rewards, lengths."""
    if jax.process_count() == 1:
        return arrays
    index_PM, *parts = multihost_utils.process_allgather((local.astype(np.int32), *arrays))

    def one(part_PM: np.ndarray) -> np.ndarray:
        whole = np.empty((count, *part_PM.shape[2:]), part_PM.dtype)
        whole[index_PM.reshape(-1)] = part_PM.reshape(-1, *part_PM.shape[2:])
        return whole

    return tuple(map(one, parts))


@functools.cache
def _replicator(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def fetch(tree: Any) -> Any:
    """Arrays of all processes, whole, on every host. Every process must call."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    whole = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not x.is_fully_replicated]
    if whole:
        tree = _replicator(whole[0].sharding.mesh)(tree)
    return jax.device_get(tree)


# ---------------------------------------------------------------------------------------------------- agreement


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process. Every process must call, and all get the same answer."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag, np.int32))))


def all_equal(number: int) -> bool:
    """Whether all processes have the same number. Every process must call."""
    return (
        jax.process_count() == 1 or len(np.unique(multihost_utils.process_allgather(np.array(number, np.int32)))) == 1
    )


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_primary(work: Callable[[], None], name: str) -> None:
    """Runs `work` in the first process while the others wait. What it raises is raised in all of them, in the others as
    a UserError."""
    if jax.process_count() == 1:
        return work()
    message, failed = b"", None
    if is_primary():
        try:
            work()
        except Exception as error:  # the others wait below, whatever it is
            message, failed = (str(error) or name).encode()[:1000], error
    told = _from_primary(message)
    if failed is not None:
        raise failed
    if told:
        raise UserError(told.decode(errors="ignore"))
    return None


def text_of_primary(text: str) -> str:
    """The text that the first process has, at most 1,000 bytes of it. Every process must call."""
    return text if jax.process_count() == 1 else _from_primary(text.encode()).decode(errors="ignore")


def _from_primary(message: bytes) -> bytes:
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(message.ljust(1000, b"\0"), np.uint8))
    return bytes(np.asarray(told, np.uint8)).rstrip(b"\0")


# ---------------------------------------------------------------------------------------------------- loss


def lost_a_process(error: Exception) -> bool:
    """Whether an error says that another process no longer answers."""
    text = f"{type(error).__name__}: {error}"
    signs = (
        "gloo",
        "Gloo",
        "NCCL",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "coordination service",
        "Connection reset",
        "heartbeat",
    )
    kinds = (jax.errors.JaxRuntimeError, ValueError)  # jax has a ValueError for some
    return jax.process_count() > 1 and isinstance(error, kinds) and any(sign in text for sign in signs)


def leave_lost() -> None:
    """Ends this process with the line that says why: another one is gone."""
    os.write(sys.stderr.fileno(), f"error: {LOST}\n".encode())  # at once: jax may be about to abort
    os._exit(1)


def leave_if_many(code: int) -> None:
    """In a run of many processes, ends this one without waiting for the others, as the usual way out does: one that
    failed alone would wait for ever, and so would they for it. Once it is gone they notice. Process 0 stays a moment,
    so that those that found the same mistake can say so.
    """
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        sys.stdout.flush()
        time.sleep(3 if is_primary() else 0)
        os._exit(code)
