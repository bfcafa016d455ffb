"""Judge every method in every regime: ``python -m benchmarks.quality [--workers 2] [--save]``.

Needs what modelfuse needs and nothing more, and no network. With --save the results go to ``docs/quality.json``, and
the tables and the picture in ``docs`` are made of them.
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

from .marks import Known
from .merges import PLAIN, Merged, Way, judge_all, ways
from .regimes import REGIMES, Regime
from .report import RESULTS, show, write_pages
from .scores import Score, scores

#: The methods of a job: short enough for all workers to end at about the same time.
TOGETHER = 4

Job = tuple[str, int, list[Way]]
Found = tuple[Job, dict[str, Known], dict[str, Merged]]


def main() -> None:
    """Judge, and show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--save", action="store_true", help="write docs/quality.json, and make the docs of it")
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
    """Write results, beside those of other regimes and methods that were written before."""
    known: dict[str, list[dict[str, Any]]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, own in results.items():
        by_label = {each["label"]: each for each in known.get(name, [])} | {each.label: each.rounded() for each in own}
        known[name] = sorted(by_label.values(), key=lambda each: each["share"], reverse=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def judge(regimes: Sequence[Regime], methods: Sequence[str] | None, workers: int) -> dict[str, list[Score]]:
    """The marks of some methods, or of all, in some regimes, by the regimes' names."""
    jobs: list[Job] = []
    for regime in regimes:
        chosen = [way for way in ways() if not methods or way.method in (PLAIN, *methods)]
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
        yield from map(_work, jobs)
        return
    # numpy's matrix products would otherwise start threads of their own in every worker.
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_work, jobs)


def _work(job: Job) -> Found:
    name, number, chosen = job
    regime = next(each for each in REGIMES if each.name == name)
    return job, *judge_all(regime, number, chosen)


if __name__ == "__main__":
    main()
