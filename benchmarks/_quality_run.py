"""Runs a benchmark's tasks one after the other or in processes, each kept as it is done."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from _quality_cells import NOT_INSTALLED, Work, start_process


def run(
    kind: str, compute: Callable[[Any, Work], dict], tasks: list[Any], work: Work, jobs: int
) -> int:
    """Compute all tasks, saying after each what it gave and how long the rest will take.

    Returns:
        How many failed; their errors are printed and the others go on.
    """
    failed, began = 0, time.monotonic()
    for done, (task, outcome) in enumerate(outcomes(compute, tasks, work, jobs), 1):
        if isinstance(outcome, Exception):
            failed += 1
            what = "".join(traceback.format_exception(outcome)).strip()
        else:
            what = summary(outcome)
        left = (time.monotonic() - began) / done * (len(tasks) - done)
        print(
            f"{time.strftime('%H:%M')} {kind} {done}/{len(tasks)}, {spoken(left)} left: "
            f"{task.name(work.setting)}: {what}",
            flush=True,
        )
    return failed


def outcomes(
    compute: Callable[[Any, Work], dict], tasks: list[Any], work: Work, jobs: int
) -> Iterator[tuple[Any, dict | Exception]]:
    """Each task and its record, or the error it ended with, as they come."""
    if jobs == 1:
        start_process()
        for task in tasks:
            try:
                yield task, compute(task, work)
            except Exception as error:  # whatever it is, the other tasks go on
                yield task, error
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start_process) as pool:
        futures = {pool.submit(until_stopped, compute, task, work): task for task in tasks}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, Exception) or error is None:
                    yield futures[future], error or future.result()
                else:
                    raise error
        finally:
            pool.shutdown(cancel_futures=True)


def until_stopped(compute: Callable[[Any, Work], dict], task: Any, work: Work) -> dict:
    """In a process of the pool: Ctrl-C or SIGTERM ends it, else it would take the next task."""
    try:
        return compute(task, work)
    except KeyboardInterrupt:
        os._exit(130)


def summary(record: dict[str, Any]) -> str:
    """One record in a line."""
    words = [f"CA {100 * record['ca']['value']:.1f}"] if "ca" in record else []
    if "asr_nontarget" in record:
        words.append(f"ASR {100 * record['asr_nontarget']['value']:.1f}")
    if "rebound" in record:
        words.append(f"rebound {100 * record['rebound']['highest']:.1f}")
    if record["status"] == NOT_INSTALLED:
        words.append(NOT_INSTALLED)
    if "cpu_seconds" in record:
        words.append(f"{record['cpu_seconds']:.0f} s of a core")
    return ", ".join(words)


def spoken(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
