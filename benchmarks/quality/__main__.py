"""Evaluate every method in every regime: ``python -m benchmarks.quality [--workers 2] [--save]``.

It needs only modelfuse's own dependencies, and no network. With --save, the results are written to
``docs/quality.json``, and the tables and the chart in ``docs`` are made from them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from modelfuse.kernels.blas_threads import one_thread

from .evaluation import Known
from .merges import PLAIN, Merged, Variant, judge_all, variants
from .regimes import REGIMES, Regime
from .report import RESULTS, show, write_pages
from .scores import Score, scores

#: Methods per job: few, so that all workers end at about the same time, but several, as each job evaluates all experts.
TOGETHER = 8

Job = tuple[str, int, list[Variant]]
Found = tuple[Job, dict[str, Known], dict[str, Merged]]


def main() -> None:
    """Evaluate, print tables, and save the results if requested."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--save", action="store_true", help="write docs/quality.json, the tables and the chart")
    parser.add_argument("--regimes", nargs="+", choices=[each.name for each in REGIMES], help="default: all")
    parser.add_argument("--methods", nargs="+", help="default: all")
    words = parser.parse_args()
    begun = time.monotonic()
    regimes = [each for each in REGIMES if not words.regimes or each.name in words.regimes]
    results = judge(regimes, words.methods, words.workers)
    for regime in regimes:
        show(regime, results[regime.name])
    print(f"Took {time.monotonic() - begun:.0f} s.")
    if words.save:
        save(results)
        write_pages()


def save(results: Mapping[str, Sequence[Score]]) -> None:
    """Write results; earlier results of other regimes and methods are kept."""
    known: dict[str, list[dict[str, Any]]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, own in results.items():
        by_label = {each["label"]: each for each in known.get(name, [])} | {each.label: each.rounded() for each in own}
        known[name] = sorted(by_label.values(), key=lambda each: each["share"], reverse=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def judge(regimes: Sequence[Regime], methods: Sequence[str] | None, workers: int) -> dict[str, list[Score]]:
    """The scores of some methods, or all, in some regimes, by the names of the regimes."""
    jobs: list[Job] = []
    for regime in regimes:
        chosen = [variant for variant in variants() if not methods or variant.method in (PLAIN, *methods)]
        jobs += [
            (regime.name, number, chosen[start : start + TOGETHER])
            for number in range(len(regime.experts))
            for start in range(0, len(chosen), TOGETHER)
        ]
    known: dict[tuple[str, int], Known] = {}
    merged: dict[tuple[str, int], dict[str, Merged]] = defaultdict(dict)
    for (name, number, _), own, found in _run(jobs, workers):
        known[name, number] = own["test"]
        merged[name, number] |= found
    results = {}
    for regime in regimes:
        keys = [(regime.name, number) for number in range(len(regime.experts))]
        results[regime.name] = scores([known[key] for key in keys], [merged[key] for key in keys])
    return results


def _run(jobs: Sequence[Job], workers: int) -> Iterator[Found]:
    if workers <= 1:
        with one_thread():  # As in several workers, so that results are the same.
            yield from map(_work, jobs)
        return
    # Otherwise numpy's matrix products would start threads in every worker.
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_work, jobs)


def _work(job: Job) -> Found:
    name, number, chosen = job
    regime = next(each for each in REGIMES if each.name == name)
    return job, *judge_all(regime, number, chosen)


if __name__ == "__main__":
    main()
