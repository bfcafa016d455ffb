"""Time merges over S3, and reading the same objects with the client library alone, on one machine.

    python benchmarks/storage.py --workdir DIR

The objects are those of the reference work, served by ``object_server.py``. The client (``object_client.py``, obstore)
reads every byte once and discards it, with the best of several sizes and numbers of requests; optionally it uploads as
many bytes as the output has. The merge is linear, of three models; its output goes to the disk or to the server. All
are whole processes. Merges that upload are compared with the client that uploads. With ``--beside DIR``, the version of
modelfuse in that folder is timed, too.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from levelling import level_memory
from measure import Sample, measure
from reference import Shape, make_reference
from rich.console import Console

HERE = Path(__file__).resolve().parent
#: Concurrent requests, and bytes of each.
CLIENTS = ((8, 8 << 20), (16, 4 << 20), (16, 8 << 20), (32, 8 << 20), (8, 16 << 20), (16, 16 << 20))
MODELS = ("model_1", "model_2", "model_3")
#: Names of the client's and the merges' rows.
ALONE, ALONE_TO_S3, TO_S3, OTHER = "obstore alone", "obstore alone, to S3", "merge, output to S3", "other version"
#: The bucket of the inputs is the folder of that name.
BUCKET = "models"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def serving(folder: Path, delay: float, bandwidth: float) -> Iterator[str]:
    """The address of a server of a folder, whose subfolders are buckets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "object_server.py"), str(folder), str(port), str(delay), str(bandwidth)]
    process = subprocess.Popen(command)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Contest:
    """The commands and their samples.

    Args:
        workdir: The folder of the bucket.
        endpoint: The URL of the server.
        words: Further settings of the merges.
    """

    def __init__(self, workdir: Path, endpoint: str, words: Sequence[str]) -> None:
        self._workdir, self._words = workdir, list(words)
        self._env = {**CREDENTIALS, "AWS_ENDPOINT_URL_S3": endpoint, "PYTHONPATH": str(HERE.parent)}
        self.samples: dict[str, list[Sample]] = {}

    def client(self, requests: int, size: int, *words: str) -> list[str]:
        """The command line of the client."""
        urls = [f"s3://{BUCKET}/{name}/model.safetensors" for name in MODELS]
        return [sys.executable, str(HERE / "object_client.py"), str(requests), str(size), *words, *urls]

    def merge(self, output: str, source: Path = HERE.parent) -> list[str]:
        """The command line of a merge with the version of modelfuse in the folder ``source``."""
        command = [
            "env",
            f"PYTHONPATH={source}",
            sys.executable,
            "-m",
            "modelfuse",
            "merge",
            "--quiet",
            "--overwrite",
            "--merge_method",
            "linear",
        ]
        command += ["--model_path_list", *(f"s3://{BUCKET}/{name}" for name in MODELS), "--output_path", output]
        return [*command, *self._words]

    def run(self, name: str, command: Sequence[str]) -> float:
        """Run a command and keep its sample under a name; returns its seconds."""
        level_memory((self._workdir / BUCKET / MODELS[-1] / "model.safetensors").stat().st_size, self._workdir)
        os.sync()  # Unwritten data of an earlier run would slow this one down.
        sample = measure(command, log=self._workdir / "log", env=self._env)
        self.samples.setdefault(name, []).append(sample)
        return sample.seconds

    def best_client(self) -> tuple[int, int]:
        """The fastest number and size of the client's requests."""
        times = {each: self.run("", self.client(*each)) for each in CLIENTS for _ in range(2)}
        del self.samples[""]
        return min(times, key=lambda each: times[each])


def main() -> None:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="keeps the inputs for the next run")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--layers", type=int, default=Shape().layers, help="layers of the models")
    parser.add_argument("--delay", type=float, default=0.0, help="latency of the server in seconds")
    parser.add_argument("--bandwidth", type=float, default=math.inf, help="MB/s of the link to the server")
    parser.add_argument("--beside", type=Path, help="a folder with another version of modelfuse")
    parser.add_argument("words", nargs="*", help="settings of the merges, after --")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = options.workdir or Path(temporary)
        make_reference(workdir / BUCKET, Shape(layers=options.layers))
        sizes = [(workdir / BUCKET / name / "model.safetensors").stat().st_size for name in MODELS]
        try:
            with serving(workdir, options.delay, options.bandwidth * 1e6) as endpoint:
                contest = Contest(workdir, endpoint, options.words)
                requests, size = contest.best_client()
                console.print(
                    f"client: {requests} requests of {size >> 20} MiB; server's delay {options.delay * 1e3:g} ms, "
                    f"link of {options.bandwidth:g} MB/s"
                )
                kinds = {
                    ALONE: contest.client(requests, size),
                    ALONE_TO_S3: contest.client(requests, size, "--send", f"s3://{BUCKET}/output/sent"),
                    "merge, output on the disk": contest.merge(str(workdir / "output")),
                    TO_S3: contest.merge(f"s3://{BUCKET}/output"),
                }
                if options.beside:
                    kinds[f"{OTHER}, output on the disk"] = contest.merge(str(workdir / "output"), options.beside)
                    kinds[f"{OTHER}, output to S3"] = contest.merge(f"s3://{BUCKET}/output", options.beside)
                for _ in range(options.repeat):
                    for name, command in kinds.items():
                        contest.run(name, command)
        finally:
            for left in (workdir / "output", workdir / BUCKET / "output", workdir / ".parts"):
                shutil.rmtree(left, ignore_errors=True)
        carried = {name: sum(sizes) + (sizes[-1] if name.endswith("S3") else 0) for name in kinds}
        _print(console, contest.samples, carried)


def _print(console: Console, samples: Mapping[str, Sequence[Sample]], carried: Mapping[str, int]) -> None:
    """Print the table.

    Processor seconds are those of the command, without the server's; they are the most reliable if other programs run.
    """
    console.print("| | median s | min s | × client | GB/s carried | cpu s | peak memory |")
    console.print("|---|---|---|---|---|---|---|")
    for name, each in samples.items():
        seconds = [sample.seconds for sample in each]
        alone = [sample.seconds for sample in samples[ALONE_TO_S3 if name.endswith("S3") else ALONE]]
        # Ratios within a round, as other load on the machine affects both.
        ratio = statistics.median(one / other for one, other in zip(seconds, alone, strict=True))
        median, peak = statistics.median(seconds), max(sample.peak_bytes for sample in each)
        console.print(
            f"| {name} | {median:.2f} | {min(seconds):.2f} | {ratio:.2f} | {carried[name] / median / 1e9:.2f} | "
            f"{statistics.median(sample.cpu_seconds for sample in each):.2f} | {peak / 1e6:.0f} MB |"
        )


if __name__ == "__main__":
    main()
