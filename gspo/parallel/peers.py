"""Who notices that a process of the run is gone, whatever this one is waiting for.

jax notices by itself only inside a collective, by a connection that breaks. A process that waits for another one
elsewhere (in a barrier of a checkpoint that is being written) is aborted by jax with a stack trace: when the heartbeats
have been missing for long enough, or at once where process 0 is gone. Its callback for this cannot be set from Python.
So every process keeps one TCP connection to
process 0, on which nothing is sent but a goodbye: a connection that ends without it is a process that has died. Process
0 then leaves too, which all the others notice in the same way.
"""

import atexit
import ctypes
import signal
import socket
import threading
import time
from collections.abc import Callable

from jax._src import distributed as jax_distributed  # its key-value store has no public name

GOODBYE = b"."
KEY = "gspo/peers"
GRACE_SECONDS = 10  # in which a process that found the same mistake as the one that left can say so itself


def watch(seconds: int, leave: Callable[[], None]) -> None:
    """Calls `leave`, in a thread of its own, when another process has ended without the usual way out of Python.

    To be called once, by every process, after jax.distributed.initialize. seconds: how long the others may take to
    connect, and the silence after which a machine that answers no more counts as gone. Raises OSError where process 0
    cannot be reached.
    """
    state = jax_distributed.global_state
    if state.process_id == 0:
        with socket.create_server(("", 0)) as server:
            server.settimeout(seconds)
            state.client.key_value_set(KEY, str(server.getsockname()[1]))
            links = [server.accept()[0] for _ in range(state.num_processes - 1)]
    else:
        port = int(state.client.blocking_key_value_get(KEY, seconds * 1000))
        host = state.coordinator_address.rpartition(":")[0].strip("[]")
        links = [socket.create_connection((host, port), timeout=seconds)]
        _delay_aborts()
    # Where process 0 is gone, jax has begun to abort; where another one is, there is time.
    grace = GRACE_SECONDS if state.process_id == 0 else 0
    for link in links:
        link.settimeout(None)
        _keep_alive(link, seconds)
        threading.Thread(target=_watch_one, args=(link, grace, leave), daemon=True).start()
    atexit.register(_say_goodbye, links)


def _delay_aborts() -> None:
    """An abort of this process, jax's own among them, takes six seconds from now on: time for `leave`. The handler is
    the sleep(3) of the C library itself, called with the number of the signal: it needs no interpreter, whose lock the
    aborting thread could wait for in vain. When it returns the abort goes on."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _keep_alive(link: socket.socket, seconds: int) -> None:
    """Has the kernel ask whether the other machine is still there, and end the connection where it is not."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", seconds // 3), ("TCP_KEEPINTVL", seconds // 6), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # not on every system
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(value, 1))


def _watch_one(link: socket.socket, grace: float, leave: Callable[[], None]) -> None:
    try:
        said = link.recv(1)
    except OSError:  # reset, or no answer for too long
        said = b""
    if said != GOODBYE:
        time.sleep(grace)
        leave()


def _say_goodbye(links: list[socket.socket]) -> None:
    for link in links:
        try:
            link.sendall(GOODBYE)
        except OSError:  # the other one is gone: its own goodbye, or its absence, has told
            continue
