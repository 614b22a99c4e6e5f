"""Work spread over processes, with a bar."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from typing import TypeVar

from soar_mega.data.errors import DataError

_Job = TypeVar("_Job")
_Done = TypeVar("_Done")


def run_parallel(
    function: Callable[[_Job], _Done], jobs: Sequence[_Job], workers: int, title: str
) -> Iterator[_Done]:
    """The results, in the order in which they are done.

    Args:
        function: Of a module, so that another process can import it.
        jobs: Its arguments.
        workers: Processes; 1 works in this one.
        title: Of the bar; empty shows none.

    Raises:
        DataError: A worker was killed. What ``function`` raises is raised here.
    """
    from tqdm import tqdm

    with tqdm(total=len(jobs), desc=title, disable=not title) as bar:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                yield function(job)
                bar.update()
            return
        # Not fork: PIL, torch and the bar have threads here.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([function.__module__])
        with ProcessPoolExecutor(min(workers, len(jobs)), context, _end_with_parent) as pool:
            futures = [pool.submit(function, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
                    bar.update()
            except BrokenExecutor as error:
                raise DataError(
                    f"--workers={workers}: a worker was killed, probably for want of memory. Give "
                    "the same command with fewer to go on."
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
