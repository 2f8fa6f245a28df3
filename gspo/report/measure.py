"""Measuring: functions in turns, what the machine can do in the same turns, memory, compilations, where it all ran."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gspo.run import machine

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
TOLD = ("XLA_FLAGS", "GLIBC_TUNABLES", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")  # variables that change a measurement

# ---------------------------------------------------------------------------------------------------- in turns


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` of them, called in turns so that a busy machine slows all of them alike. The
    first `warmup` turns are not counted. A function returns its arrays: they are waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + warmup):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, most and how many."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


# ---------------------------------------------------------------------------------------------------- yardsticks


def yardsticks(dtype: jnp.dtype, small: bool = False) -> tuple[dict[str, Callable[[], jax.Array]], dict[str, float]]:
    """What the machine can do: functions to be timed in turns with the measured ones, and the work of each call.

    matmul, matmul_cut  a square product (2 n³ FLOPs), whole on the first device, and with its rows cut over all devices
    copy                an array read and another written (bytes of both), cut over all devices
    small: sizes for a test.
    """
    on_cpu = jax.default_backend() == "cpu"
    n = 256 if small else 2048 if on_cpu else 8192
    size = n * n if small else 2**26 if on_cpu else 2**28
    mesh = jax.make_mesh((jax.local_device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.NamedSharding(mesh, jax.P("all"))
    x_nn = jnp.ones((n, n), dtype)
    cut_nn, whole_nn = jax.device_put(x_nn, cut), jax.device_put(x_nn, jax.NamedSharding(mesh, jax.P()))
    flat = jax.device_put(jnp.ones((size,), jnp.float32), cut)
    matmul, again = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    functions = {
        "matmul": lambda: matmul(x_nn, x_nn),
        "matmul_cut": lambda: matmul(cut_nn, whole_nn),
        "copy": lambda: again(flat),
    }
    return functions, {"matmul": 2.0 * n**3, "matmul_cut": 2.0 * n**3, "copy": 2.0 * flat.nbytes}


def rates(seconds: dict[str, list[float]], work: dict[str, float]) -> dict[str, float]:
    """What the yardsticks came to, by their medians: FLOP/s of the faster product, bytes/s of the copy."""
    per_second = {name: amount / statistics.median(seconds[name]) for name, amount in work.items()}
    return {
        "matmul_flops_per_s": max(per_second["matmul"], per_second["matmul_cut"]),
        "copy_bytes_per_s": per_second["copy"],
    }


# ---------------------------------------------------------------------------------------------------- memory


def peak_memory() -> dict[str, int | None]:
    """Bytes, the most so far: on the first device where it keeps count (a CPU does not: None), and resident in this
    process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
    return {"device_bytes": stats.get("peak_bytes_in_use"), "rss_bytes": kib * scale}


def program_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device that the compiler has laid out for a program: its arguments, and what it holds besides."""
    analysis = compiled.memory_analysis()
    return {
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    }


# ---------------------------------------------------------------------------------------------------- compilations

DURATIONS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "compile_s",
}


@contextlib.contextmanager
def compilations() -> Iterator[dict[str, float]]:
    """Counts what is compiled meanwhile: `programs` that the backend was asked for, of which `from_cache` were found in
    the persistent cache; seconds of tracing (a function traced in another counts in both), lowering and compiling,
    reading the cache included."""
    found = {"programs": 0, "from_cache": 0} | dict.fromkeys(DURATIONS.values(), 0.0)

    def on_duration(event: str, seconds: float, **_: Any) -> None:
        if event in DURATIONS:
            found[DURATIONS[event]] += seconds
            found["programs"] += DURATIONS[event] == "compile_s"

    def on_event(event: str, **_: Any) -> None:
        found["from_cache"] += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)


# ---------------------------------------------------------------------------------------------------- where it ran


def environment() -> dict[str, Any]:
    """Versions, devices, cores that this process may use, date and commit."""
    devices = jax.local_devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu": cpu_name(),
        "cores": machine.cores(),
        "variables": {name: os.environ[name] for name in TOLD if name in os.environ},
    }


def commit() -> str:
    """The first letters of the checkout's commit, with a + where files differ from it; "unknown" outside of one."""
    root = Path(__file__).parent
    asked = ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(["git", "-C", root, *asked], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
