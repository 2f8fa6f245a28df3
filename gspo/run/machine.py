"""What a process finds on its machine, and how it uses it: programs that earlier ones have compiled, memory, and the
cores of a CPU. All is set before jax touches a device."""

import ctypes
import hashlib
import os
import platform
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import jax

CACHE_BYTES = 2 * 2**30  # of compiled programs; those that were not used for longest go first
MEASURED_DEVICES = 2  # more were not measured
# Of one core in /proc/cpuinfo, what decides which instructions a program may hold: x86, then ARM.
CPU_FIELDS = (
    "vendor_id", "cpu family", "model", "model name", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
)  # fmt: skip
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")  # in /dev: NVIDIA, AMD, TPU
MALLOPT = (  # of <malloc.h>: which, and bytes or a number
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: free memory at the top of the heap beyond which it is given back
    (-3, 2**31 - 1),  # M_MMAP_THRESHOLD: size from which memory has a mapping of its own
    (-8, 1),  # M_ARENA_MAX: one heap, in which every thread finds what another one has left
)
SILENT = (  # seconds. By default a device that waits 60 s for the other, whose rows took it longer, ends the process
    ("xla_cpu_collective_call_warn_stuck_timeout_seconds", 3600),
    ("xla_cpu_collective_call_terminate_timeout_seconds", 30 * 24 * 3600),
)

# ---------------------------------------------------------------------------- compiled programs


def keep_programs() -> str:
    """From now on, programs that XLA compiles are kept on disk, and one that is there is not compiled again. Returns a
    note for the user where that cannot be, else "".

    They lie in ~/.cache/gspo/xla (or XDG_CACHE_HOME), one folder for each kind of CPU: they are machine code, and the
    home may be shared. JAX_COMPILATION_CACHE_DIR chooses another folder, which is then used as it is and never cleared;
    JAX_ENABLE_COMPILATION_CACHE=false does without.
    """
    if not jax.config.jax_enable_compilation_cache:
        return ""
    for name in ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"):
        if name.upper() not in os.environ:
            jax.config.update(name, 0)  # small programs too: there are many, and each would be compiled again
    # A reader may meet an entry that another process is just writing, or that one was killed at: it compiles instead.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    if jax.config.jax_compilation_cache_dir is not None:  # the user's own
        return ""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "gspo" / "xla" / cpu_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever can write there runs code in our name
        tidy(folder)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        return f"compiled programs are not kept: {folder} cannot be written; JAX_COMPILATION_CACHE_DIR names another"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return ""


def cpu_digest(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A short name for the kind of CPU of this machine."""
    try:
        first = cpuinfo.read_text().split("\n\n")[0]
    except OSError:
        first = platform.processor()
    kept = [line for line in first.splitlines() if line.partition("\t")[0].strip(" :") in CPU_FIELDS]
    text = "\n".join([platform.machine(), *(kept or [first])])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def tidy(folder: Path, limit: int = CACHE_BYTES) -> None:
    """Removes entries that a killed process has left unfinished, and the oldest ones where all together are larger than
    `limit` bytes. jax can bound its cache too, under a lock and with a look at every entry at every write; and it would
    never replace an unfinished one."""
    stamp = folder / ".checked"
    checked = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.touch()
    entries = []
    for entry in os.scandir(folder):
        if entry.name == stamp.name:
            continue
        about = entry.stat()
        if about.st_mtime >= checked - 1 and not _is_whole(Path(entry.path)):
            os.unlink(entry.path)
        else:
            entries.append((max(about.st_atime, about.st_mtime), about.st_size, entry.path))
    size = sum(bytes_ for _, bytes_, _ in entries)
    for _, bytes_, path in sorted(entries):
        if size <= limit:
            break
        os.unlink(path)
        size -= bytes_


def _is_whole(path: Path) -> bool:
    """Whether an entry has its end. One that is not compressed by zlib is taken to be whole."""
    data, reader = path.read_bytes(), zlib.decompressobj()
    if data and data[0] != 0x78:
        return True
    try:
        reader.decompress(data)
    except zlib.error:
        return False
    return reader.eof


# ---------------------------------------------------------------------------- memory


def keep_heap() -> None:
    """On a CPU, memory that a step gives back stays with the process: XLA takes and gives back the same buffers in
    every step, and by default glibc has them mapped anew, page by page, for a third of an update's time. Nothing
    happens under another C library, or where the user has set GLIBC_TUNABLES."""
    if "GLIBC_TUNABLES" in os.environ or has_accelerator() or not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    for parameter, value in MALLOPT:
        ctypes.CDLL(None).mallopt(parameter, value)


def has_accelerator() -> bool:
    """Whether the machine has a GPU or a TPU that jax may use."""
    return jax.config.jax_platforms != "cpu" and any(any(Path("/dev").glob(name)) for name in ACCELERATORS)


# ---------------------------------------------------------------------------- cores


def share_cores(rows: Iterable[int]) -> None:
    """On a CPU, a run of one process is spread over 2 devices where the machine has the cores and the devices can share
    all these numbers of rows evenly: one device leaves much of a second core idle. Nothing happens where the user has
    chosen a number of CPU devices, where `rows` is empty, or where the machine has a GPU or a TPU that jax may use."""
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    rows = tuple(rows)
    if chosen or jax.config.jax_num_cpu_devices >= 0 or jax.distributed.is_initialized() or not rows:
        return
    if has_accelerator():
        return
    devices = min(cores(), MEASURED_DEVICES)
    if devices < 2 or any(count % devices for count in rows):
        return
    jax.config.update("jax_num_cpu_devices", devices)
    flags = [os.environ.get("XLA_FLAGS", ""), *(f"--{name}={seconds}" for name, seconds in SILENT)]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
