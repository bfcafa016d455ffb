"""The demo: merge the five models in every way, judge every merge, print what came out.

    python -m demo.run [--full] [--save RESULTS.json]

Needs what modelfuse needs and nothing more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.progress import track

import modelfuse
from demo.evaluate import Exam, Score
from demo.llama import Llama
from demo.recipes import DOMAIN_MERGES, MODELS, Merge, paths, towards_aligned, with_aligned
from demo.show import show_domains, show_path
from demo.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "models"
SHORT, FULL = (30, 100), (10_000, 300)  # windows of each domain, preference pairs
WORKERS = 2

_exam: Exam


def _prepare(windows: int, pairs: int, tuning: bool) -> None:
    global _exam
    _exam = Exam(Tokenizer(SHIPPED / "base" / "tokenizer.json"), windows, pairs, tuning)


def _judge(folder: Path) -> Score:
    return _exam.score(Llama(folder))


def judge(folders: dict[str, Path], size: tuple[int, int], tuning: bool = False) -> dict[str, Score]:
    """The marks of models, several judged at a time."""
    # numpy's matrix products would otherwise start threads of their own in every worker.
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, _prepare, (*size, tuning)) as pool:
        scores = track(pool.map(_judge, folders.values()), "Judging", total=len(folders), transient=True)
        return dict(zip(folders, scores, strict=True))


def merge_all(merges: Iterable[Merge], folders: dict[str, Path], into: Path) -> None:
    """Carry out merges one after the other; each one's folder joins ``folders``."""
    for merge in merges:
        output = into / merge.name.replace("/", " of ")
        modelfuse.merge(
            model_path_list=[folders[name] for name in merge.models],
            base_model_path=folders[merge.base] if merge.base else None,
            output_path=output,
            n_process=WORKERS,
            **merge.settings,
        )
        folders[merge.name] = output


def results(size: tuple[int, int]) -> dict[str, Score]:
    """Every model's and every merge's marks, by name."""
    folders = {name: SHIPPED / name for name in MODELS}
    merges = [*DOMAIN_MERGES, *towards_aligned(), *with_aligned()]
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.monotonic()
        merge_all(merges, folders, Path(scratch))
        print(f"{len(merges)} merges took {time.monotonic() - begun:.1f} s.")
        for merge in merges:
            if not merge.shown:
                del folders[merge.name]
        return judge(folders, size)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__)
    parser.add_argument("--full", action="store_true", help="judge on all of the held-out text (several minutes)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the marks as JSON")
    words = parser.parse_args()
    begun = time.monotonic()
    scores = results(FULL if words.full else SHORT)
    show_domains(scores, [merge.name for merge in DOMAIN_MERGES if merge.shown])
    for title, names in paths().items():
        show_path(title, [scores[name] for name in names])
    if words.save:
        marks = {name: score.rounded() for name, score in scores.items()}
        words.save.write_text(json.dumps(marks, indent=1) + "\n", encoding="utf-8")
    print(f"The demo took {time.monotonic() - begun:.0f} s.")


if __name__ == "__main__":
    main()
