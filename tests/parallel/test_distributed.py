"""What a process does alone: how it joins others, whose error it is, which rows are its own."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gspo.parallel import distributed, peers
from gspo.types import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "host:1"}, "--num_processes: is missing"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator: is missing"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "--coordinator=host: give HOST:PORT"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, r"--process_id=2: must be in 0\.\.1"),
    ],
)
def test_flags_that_do_not_describe_a_process_are_one_line_errors(arguments, message):
    # Catches a process that waits five minutes for others under an address that cannot be right.
    with pytest.raises(UserError, match=message) as error:
        distributed.initialize(**arguments)
    assert "\n" not in str(error.value)


def test_tasks_of_slurm_and_open_mpi_join_by_themselves_and_a_lone_one_does_not(monkeypatch):
    # Catches N independent runs in one workdir, and a single task that waits for a coordinator.
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    monkeypatch.setattr(peers, "watch", lambda *_: None)
    distributed.initialize()
    monkeypatch.setenv("SLURM_NTASKS", "2")  # of the job, seen in a shell that no srun started
    distributed.initialize()
    assert joined == []
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_PROCID", "1")
    distributed.initialize()
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    distributed.initialize()
    distributed.initialize(coordinator="host:1", num_processes=2, process_id=1)
    assert [len(arguments) for arguments in joined] == [2, 2, 5] and joined[2]["process_id"] == 1


def test_an_error_of_a_user_or_of_this_process_is_no_lost_process():
    # Catches every mistake reported as a broken network.
    assert not distributed.lost_a_process(
        jax.errors.JaxRuntimeError("Gloo all-reduce failed")
    )  # there is no other process here
    assert not distributed.lost_a_process(ValueError("gloo"))


@pytest.mark.skipif(jax.device_count() < 8, reason="eight devices, real or virtual")
def test_rows_go_to_the_devices_and_come_back_in_order():
    # Catches rows in the order of devices instead of rows, and a row that is lost where several devices hold it.
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("rows", "copies"))
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    local = distributed.local_rows(sharding, 8)
    x, y = np.arange(16.0).reshape(8, 2), np.arange(8)
    placed = distributed.put_rows(sharding, local, 8, x, y)
    assert placed[0].sharding.is_equivalent_to(sharding, 2)
    for got, want in zip(distributed.fetch_rows(local[2:5], *placed), (x[2:5], y[2:5]), strict=True):
        np.testing.assert_array_equal(got, want)
