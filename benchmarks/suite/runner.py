"""Run the cells of a suite, each in a process of its own, one after another or spread over machines by Ray.

What is there is not run again, so a suite that was killed goes on where it was. A cell whose process dies, out of memory say, is
reported and the rest goes on; it is tried again the next time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suite.measure import measure, split_files
from benchmarks.suite.store import RUNS, Store
from benchmarks.suite.suite import Cell
from turnrow.errors import UserError

__all__ = ["run_cells"]

_PATIENCE = 20.0
"""Seconds that an interrupted cell may take to end by itself."""


def run_cells(
    cells: Sequence[Cell], data: Path, *, workers: int = 1, threads: int = 1, root: Path = RUNS
) -> list[Cell]:
    """Run every cell, and return those that broke down.

    Args:
        cells: what to run, in this order.
        data: holds a folder of splits for each task.
        workers: how many at once; more than one through Ray (``pip install 'ray>=2.40'``), over all machines of its cluster.
        threads: CPU threads of torch for each.
        root: where the runs are kept. With several machines, a folder that all of them see.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value < 1:
            raise UserError(f"--{name} is {value}; at least 1 is needed")
    for file in (path for cell in cells for path in split_files(data, cell.task).values()):
        if not file.is_file():
            raise UserError(f"there is no {file}; name with --data the folder of the tasks' folders")
    return _by_ray(cells, data, workers, threads, root) if workers > 1 else _alone(cells, data, threads, root)


def work(cell: Cell, data: Path, threads: int, root: Path) -> None:
    """Run one cell in this process."""
    import torch

    torch.set_num_threads(threads)
    try:
        measure(cell, data, Store(cell, root))
    except KeyboardInterrupt:
        sys.exit(130)  # without a traceback; whoever runs it was interrupted too
    except UserError as error:
        sys.exit(f"  {error}")


def _alone(cells: Sequence[Cell], data: Path, threads: int, root: Path) -> list[Cell]:
    context = multiprocessing.get_context("spawn")
    broken = []
    for number, cell in enumerate(cells, start=1):
        print(f"{number}/{len(cells)} {cell.task}: {cell.slug}", flush=True)
        process = context.Process(target=work, args=(cell, data, threads, root))
        process.start()
        try:
            process.join()
        except KeyboardInterrupt:
            process.join(_PATIENCE)  # Ctrl-C reached it as well: it ends its step and removes what it had for itself
            process.terminate()
            process.join()
            raise
        if process.exitcode != 0:
            print(f"  its process ended with {process.exitcode}; going on with the next", flush=True)
            broken.append(cell)
    return broken


def _by_ray(cells: Sequence[Cell], data: Path, workers: int, threads: int, root: Path) -> list[Cell]:
    try:
        import ray
    except ImportError:
        raise UserError(
            f"--workers is {workers}, which takes Ray: pip install 'turnrow[ray]'; or leave it out"
        ) from None
    # An address in the environment is that of a cluster; without one, this machine is it.
    ray.init(
        num_cpus=None if "RAY_ADDRESS" in os.environ else workers * threads,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}},
    )
    task = ray.remote(num_cpus=threads, max_retries=0, max_calls=1)(work)
    waiting = {task.remote(cell, data.resolve(), threads, root.resolve()): cell for cell in cells}
    broken, done = [], 0
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            cell, done = waiting.pop(ready), done + 1
            try:
                ray.get(ready)
                print(f"{done}/{len(cells)} {cell.task}: {cell.slug}", flush=True)
            except ray.exceptions.RayError as error:
                print(f"{done}/{len(cells)} {cell.task}: {cell.slug}: {error}", flush=True)
                broken.append(cell)
    finally:
        ray.shutdown()
    return broken
