"""Set before anything imports jax: the CPU, unless told otherwise, as eight devices, to test sharding in one process.

And a rotating third of the slow tests, which take longer than continuous integration has. Each commit runs a third of
them besides all others; its hash says which, so that a few commits run them all.
"""

import gc
import hashlib
import os
import re
import time

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: LLVM's optimisations would cost more than they save.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# So does XLA's newer code generator for fused loops, which takes two to three times as long, and its splitting of a
# program into parts that are compiled side by side: there are as many tests at a time as cores.
COMPILE_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
for flag in ("--xla_force_host_platform_device_count=8", *COMPILE_FLAGS.split()):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

# Traced programs are many small objects that live long: looking for garbage less often saves a twentieth.
gc.set_threshold(50_000, 20, 50)

NO_TIME = "no time left for slow tests"
LONGEST = ("tests/rl/", "tests/parallel/test_processes", "tests/parallel/test_sharding")  # files of minutes
CHOSEN = pytest.StashKey[int]()  # how many slow tests the commit chose


def pytest_addoption(parser):
    group = parser.getgroup("a rotating third of the slow tests")
    group.addoption("--slow-third", metavar="COMMIT", help="run also the slow tests that a commit's hash chooses")
    group.addoption("--slow-before", metavar="UNIX_TIME", type=float, help="start no slow test after this time")


def pytest_configure(config):
    commit = config.option.slow_third
    if commit is None:
        return
    if not re.fullmatch("[0-9a-f]{7,64}", commit):
        raise pytest.UsageError(f"--slow-third={commit}: not the hash of a commit; pass that of git rev-parse HEAD")
    if config.option.markexpr not in ("", "not slow"):
        raise pytest.UsageError("--slow-third chooses among the slow tests by itself; leave -m out")
    config.option.markexpr = ""


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # one of several processes: the longest first, none ends long after the others
        items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    commit = config.option.slow_third
    if commit is None:
        return
    third = int(commit, 16) % 3
    quick = [item for item in items if not is_slow(item)]
    chosen = [item for item in items if is_slow(item) and third_of(item.nodeid) == third]
    config.hook.pytest_deselected(items=[i for i in items if is_slow(i) and third_of(i.nodeid) != third])
    config.stash[CHOSEN] = len(chosen)
    # All others first: none is given up for a slow one. Then file by file, in an order that changes with the commit:
    # it is not always the same files that come too late.
    items[:] = quick + sorted(chosen, key=lambda item: digest(commit + item.path.name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several processes, each takes what stands together of one file, in the order of the files, when it has nearly
    done what it took before: fixtures and programs are made once, and slow tests still come after the quick ones of all
    files. (The groups of --dist=loadgroup would say this too, but pytest 9.2 does not hear them.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def __init__(self, config, log):
            super().__init__(config, log)
            self.units = {}  # of each test; first asked for in the order of the tests

        def _split_scope(self, nodeid):
            file, (last, number) = nodeid.split("::")[0], next(reversed(self.units.values()), ("", 0))
            return self.units.setdefault(nodeid, (file, number + (file != last)))

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes: the summary is another's
        session.config.workeroutput["chosen"] = session.config.stash.get(CHOSEN, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    output = getattr(node, "workeroutput", {})  # one that died has left none; the others have collected the same tests
    node.config.stash[CHOSEN] = output.get("chosen", node.config.stash.get(CHOSEN, 0))


@pytest.hookimpl(tryfirst=True)  # before its fixtures are made
def pytest_runtest_setup(item):
    before = item.config.option.slow_before
    if before is not None and is_slow(item) and time.time() > before:
        pytest.skip(NO_TIME)


def pytest_terminal_summary(terminalreporter, config):
    commit, chosen = config.option.slow_third, config.stash.get(CHOSEN, 0)
    late = sum(NO_TIME in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if commit is not None:
        third = f"third {int(commit, 16) % 3 + 1} of 3, by commit {commit[:12]}"
        terminalreporter.write_line(f"slow tests: {chosen} chosen ({third}), {late} of them not run for want of time")
    elif late:
        terminalreporter.write_line(f"slow tests: {late} not run for want of time")


def is_slow(item):
    return item.get_closest_marker("slow") is not None


def third_of(name):
    """0, 1 or 2, the same in every process."""
    return digest(name) % 3


def digest(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
