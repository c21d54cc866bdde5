"""Plain processes beside the driver. They end with it, even if it is killed."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread


@contextmanager
def pool_of(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Yields a process pool whose workers end with this process, even if it is killed.

    An interrupt ends them at once. Otherwise the pool would first wait for their trainings.
    """
    context = get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield pool
        except KeyboardInterrupt:  # which the workers ignore, or SIGTERM, which does not reach them
            for worker in active_children():
                worker.terminate()
            raise


def _end_with_parent() -> None:
    """Ends this process when its parent ends: its results would be lost.

    Ctrl-C reaches both processes. Only the parent heeds it: it prints a message and ends this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not sys.warnoptions:  # deprecations inside libraries, as in the command itself
        warnings.simplefilter("ignore", FutureWarning)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
