"""Merging on a Ray cluster of several nodes: the bytes of one machine, whatever happens to the nodes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from adapting import UP, Q, adapter_of, make_base
from conftest import ROOT, Said, base_and_two, bf16, make_model, snapshot, start
from failing_inputs import make_fail
from ray.cluster_utils import Cluster as Simulated

import modelfuse as package
from modelfuse.checkpoints.adapters.arrays import Recent
from modelfuse.checkpoints.formats.paddle_tensors import Landmarks
from modelfuse.checkpoints.made_files import CONFIG_NAME, REPORT_NAME
from modelfuse.checkpoints.output.atomic_folder import OutputFolder
from modelfuse.dtypes import BY_NAME
from modelfuse.errors import _installed_from
from modelfuse.execution import run as running
from modelfuse.execution.ray import batches, driver, node_checks
from modelfuse.execution.ray.batches import Batch
from modelfuse.planning import optional_packages
from modelfuse.storage.files import SourceFile

Command = Callable[..., Said]
Words = list[object]

#: The smallest span, so that small tensors have several.
SPAN = 1 << 18
SIZES = {"a": (5 * SPAN + 17,), "b": (5,), "c": (512, 512), "d": (0,), "e": (2 * SPAN,), "f": (64, 4096)}
STORE = {"object_store_memory": 100 << 20}
#: A node that is lost is noticed in seconds, not in half a minute.
WATCHFUL = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 6}


def simulate(nodes: int) -> Simulated:
    """A cluster whose first node has no processor, and so many others with one each."""
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": WATCHFUL, **STORE}
    simulated = Simulated(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        simulated.add_node(num_cpus=1, **STORE)
    return simulated


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Simulated]:
    """Two nodes with a processor each."""
    made = simulate(2)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def simulated(two_nodes: Simulated) -> Simulated:
    """The same, and a connection to them: a merge that makes its own waits for processes to start."""
    if not ray.is_initialized():
        ray.init(two_nodes.address, log_to_driver=False)
    return two_nodes


@pytest.fixture
def disconnected(two_nodes: Simulated) -> Simulated:
    """The same without a connection."""
    ray.shutdown()
    return two_nodes


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SPAN", SPAN)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two models in bfloat16, with a tensor of integers that is copied."""
    return base_and_two(tmp_path, SIZES, SPAN + 9)


@pytest.fixture
def words(models: list[Path], tmp_path: Path) -> Words:
    return ["--model_path_list", *models[1:], "--base_model_path", models[0], "--output_path", tmp_path / "C"]


def on(simulated: Simulated, *more: object) -> Words:
    return ["--engine", "ray", "--ray_address", simulated.address, *more]


def content(folder: Path) -> dict[str, object]:
    """All files of an output; of the settings and the report, what does not tell where it was merged."""
    files: dict[str, Any] = dict(snapshot(folder))
    settings, report = json.loads(str(files[CONFIG_NAME], "utf-8")), json.loads(str(files[REPORT_NAME], "utf-8"))
    for name in ("engine", "ray_address", "ray_timeout", "overwrite"):
        settings.pop(name)
    del report["sha256"][CONFIG_NAME], report["report_sha256"]
    return {**files, CONFIG_NAME: settings, REPORT_NAME: report}


def on_one_machine(merge: Command, words: Words, tmp_path: Path) -> dict[str, object]:
    """What the same merge makes without a cluster; removed again."""
    merge(*words)
    made = content(tmp_path / "C")
    (tmp_path / "C").rename(tmp_path / "made on one machine")
    return made


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that are given out."""
    given: list[Batch] = []
    send = driver.Cluster._send

    def noted(cluster: driver.Cluster, batch: Batch) -> Any:
        given.append(batch)
        return send(cluster, batch)

    monkeypatch.setattr(driver.Cluster, "_send", noted)
    return given


METHODS = [
    ["linear"],
    ["slerp"],
    ["ties", "--sparsify_type", "trim"],
    ["ties", "--sparsify_type", "magprune"],
    ["linear", "--sparsify_type", "dare"],
]


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_the_bytes_are_those_of_one_machine(
    merge: Command, simulated: Simulated, words: Words, tmp_path: Path, method: list[str]
) -> None:
    words += ["--merge_type", *method]
    expected = on_one_machine(merge, words, tmp_path)
    merge(*words, *on(simulated))
    assert content(tmp_path / "C") == expected
    assert not [each.name for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_every_tensor_has_its_rule_on_the_nodes_too(
    merge: Command, simulated: Simulated, words: Words, models: list[Path], tmp_path: Path
) -> None:
    rules = [
        {"tensors": "[ab]", "merge_method": "ties", "reserve_p": 0.5},
        {"tensors": "c", "take": str(models[1])},
        {"tensors": "e", "merge_method": "dare_linear"},
    ]
    (tmp_path / "rules.json").write_text(json.dumps({"rules": rules}))
    words = [tmp_path / "rules.json", *words]
    expected = on_one_machine(merge, words, tmp_path)
    merge(*words, *on(simulated))
    assert content(tmp_path / "C") == expected


@pytest.mark.parametrize("method", ["iso_c", "ridge", "tsv_m", "swudi_a"])
def test_whole_matrices_are_merged_on_the_nodes_too(
    merge: Command, simulated: Simulated, tmp_path: Path, method: str
) -> None:
    shapes = {f"layers.{layer}.up_proj.weight": (60, 40) for layer in range(3)}
    base, *models = base_and_two(tmp_path, {**shapes, "layers.3.down_proj.weight": (40, 60), "norm.weight": 40}, 9)
    words = ["--model_path_list", *models, "--base_model_path", base, "--output_path", tmp_path / "C"]
    words += ["--merge_method", method]
    expected = on_one_machine(merge, words, tmp_path)
    merge(*words, *on(simulated))
    assert content(tmp_path / "C") == expected


@pytest.mark.parametrize(
    "more",
    [
        ["--output_format", "pdparams", "--input_layout", "paddle"],
        ["--max_shard_size", "2MB"],
        ["--output_dtype", "float32"],
    ],
    ids=lambda more: more[0],
)
def test_every_output_is_that_of_one_machine(
    merge: Command, simulated: Simulated, words: Words, tmp_path: Path, more: Words
) -> None:
    expected = on_one_machine(merge, [*words, *more], tmp_path)
    merge(*words, *more, *on(simulated))
    assert content(tmp_path / "C") == expected


def test_models_are_compared_on_the_nodes_too(
    simulated: Simulated, models: list[Path], tmp_path: Path, sent: list[Batch]
) -> None:
    """To the same numbers, a tensor's spans on several nodes."""
    counted: list[tuple[int, int]] = []
    here = package.diff(*models[1:], base=models[0], progress=False)
    there = package.diff(
        *models[1:],
        base=models[0],
        engine="ray",
        ray_address=simulated.address,
        progress=lambda *all: counted.append(all),
    )
    assert sent
    assert replace(there, seconds=0.0) == replace(here, seconds=0.0)
    assert sum(nbytes for nbytes, _ in counted) == counted[0][1] == here.bytes_read


@pytest.mark.parametrize("method", ["ties", "iso_c"])
@pytest.mark.parametrize("form", [[], ["--output_format", "lora", "--lora_rank", 2]], ids=["model", "lora"])
def test_adapters_are_computed_on_the_nodes(
    merge: Command, simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Words, method: str
) -> None:
    """Both factors of one merged difference may be made on different nodes, and tell the same error of it."""
    base, _ = make_base(tmp_path / "base")
    adapters = [adapter_of(tmp_path / f"L{seed}", seed, Q, UP)[0] for seed in (1, 2)]
    words = ["--model_path_list", *adapters, "--base_model_path", base, "--merge_method", method, *form]
    words += ["--output_path", tmp_path / "C"]
    expected = on_one_machine(merge, words, tmp_path)
    monkeypatch.setattr(batches, "MOST_BYTES", 1)
    merge(*words, *on(simulated))
    assert content(tmp_path / "C") == expected


def test_what_nodes_do_not_write_is_written_here(
    merge: Command, simulated: Simulated, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the output is no folder that nodes could write to."""
    expected = on_one_machine(merge, words, tmp_path)
    monkeypatch.setattr(OutputFolder, "share", lambda folder: None)
    merge(*words, *on(simulated))
    assert content(tmp_path / "C") == expected


def test_an_output_verifies_where_there_is_no_cluster(
    modelfuse: Command, merge: Command, simulated: Simulated, words: Words, tmp_path: Path
) -> None:
    merge(*words, *on(simulated))
    settings = json.loads((tmp_path / "C" / CONFIG_NAME).read_text())
    # Which cluster it was changes no byte, and a file is not to say where code runs.
    assert (settings["engine"], settings["ray_address"]) == ("ray", None)
    said = modelfuse("verify", tmp_path / "C", "--full")
    assert said.status == 0, said.err


def test_small_tensors_go_together(merge: Command, simulated: Simulated, tmp_path: Path, sent: list[Batch]) -> None:
    tensors = {f"layers.{number}.norm": bf16(np.full(100, number)) for number in range(500)}
    pair = [make_model(tmp_path / name, tensors) for name in "AB"]
    merge("--model_path_list", *pair, "--output_path", tmp_path / "C", *on(simulated))
    assert sum(len(spans) for batch in sent for spans in batch.spans) == 500
    assert 4 * 2 <= len(sent) <= 4 * 2 + 2
    assert sum(batch.nbytes for batch in sent) == 500 * 100 * 2 * 3


def test_there_are_four_tasks_for_each_processor(
    merge: Command, simulated: Simulated, tmp_path: Path, sent: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model has enough spans; and none of them is too large."""
    pair = [make_model(tmp_path / name, {"w": np.zeros(40 * SPAN + 1, np.int8)}) for name in "AB"]
    words = ["--model_path_list", *pair, "--output_path", tmp_path / "C", "--overwrite", *on(simulated)]
    merge(*words)
    assert 4 * 2 <= len(sent) <= 6 * 2
    sent.clear()
    monkeypatch.setattr(batches, "MOST_BYTES", 2 * 3 * SPAN)
    merge(*words)
    assert len(sent) == 21
    assert max(batch.nbytes for batch in sent) == 2 * 3 * SPAN


def test_progress_comes_to_the_whole(simulated: Simulated, models: list[Path], tmp_path: Path) -> None:
    done: list[int] = []
    settings: dict[str, Any] = {"model_path_list": models[1:], "base_model_path": models[0], "merge_method": "della"}
    plan = package.check(**settings, output_path=tmp_path / "C")
    package.merge(
        **settings, output_path=tmp_path / "C", engine="ray", ray_address=simulated.address, progress=done.append
    )
    assert sum(done) == plan.bytes_read + sum(tensor.nbytes for tensor in plan.tensors)
    assert len(done) > 8


def test_a_connection_of_the_callers_own_is_used_and_kept(
    merge: Command, simulated: Simulated, words: Words, tmp_path: Path
) -> None:
    expected = on_one_machine(merge, words, tmp_path)
    merge(*words, "--engine", "ray")
    assert ray.is_initialized()
    assert content(tmp_path / "C") == expected


def test_a_connection_is_made_and_ended(merge: Command, disconnected: Simulated, words: Words, tmp_path: Path) -> None:
    expected = on_one_machine(merge, words, tmp_path)
    said = merge(*words, *on(disconnected))
    assert not ray.is_initialized()
    assert said.err.splitlines() == [
        "note: With Ray, each CPU of the cluster runs one worker; n_process has no effect.",
        f"merging {len(SIZES) + 1} tensors of 3 checkpoints, 27.3 MB",
    ]
    assert content(tmp_path / "C") == expected


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_refused_with_the_same_words(
    refuse: Callable[..., str], simulated: Simulated, words: Words, tmp_path: Path, sent: list[Batch]
) -> None:
    random = np.random.default_rng(0)
    tensors: dict[str, Any] = {each: random.standard_normal(shape).astype(np.float32) for each, shape in SIZES.items()}
    tensors["a"][[3, 4 * SPAN]] = np.nan
    tensors["ids"] = np.arange(SPAN + 9)
    make_model(tmp_path / "B", tensors)
    said = [refuse("merge", *words, *more, says=["'a' holds NaN", "2 in", "B"]) for more in ([], on(simulated))]
    assert said[1].splitlines()[1:] == said[0].splitlines()  # The first is a note on the memory of the cluster's CPUs.
    assert all(batch.attempts == 1 for batch in sent)


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        ("disk", 2, ["error: ", "model.safetensors: Input/output error at byte 5"]),
        ("memory", 1, ["error: There is not enough memory: a terabyte"]),
        ("bug", 1, ["ZeroDivisionError: nobody had thought of that", "This is a bug in modelfuse."]),
        ("crash", 2, ["error: 'e'", "the Ray task has failed: WorkerCrashedError"]),
    ],
)
def test_what_fails_three_times_ends_the_merge(
    modelfuse: Command, merge: Command, simulated: Simulated, words: Words, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, how: str, status: int, says: list[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(driver, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(batches, "MOST_BYTES", 1)
    with monkeypatch.context() as patch:
        visits = make_fail(patch, tmp_path / "visits", how, lambda name: name == "e")
        said = modelfuse("merge", *words, *on(simulated))
    assert said.status == status, said
    for part in [*says, "This was tried 3 times."]:
        assert part in said.err
    if how != "crash":
        assert "was processing 'e'" in said.err
    assert ("Traceback" in said.err) == (how == "bug")
    assert len(os.listdir(visits)) >= 3
    assert not (tmp_path / "C").exists()


def test_what_fails_once_is_done_again(
    merge: Command, simulated: Simulated, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = on_one_machine(merge, words, tmp_path)
    make_fail(monkeypatch, tmp_path / "visits", "once", lambda name: name == "e")
    merge(*words, *on(simulated))
    assert content(tmp_path / "C") == expected


def test_a_node_that_does_not_see_the_output_is_named(
    refuse: Callable[..., str], simulated: Simulated, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_all = node_checks.look_at_all

    def elsewhere(common: Any) -> None:
        (tmp_path / ".C.modelfuse" / common[1]).unlink()
        look_at_all(common)

    monkeypatch.setattr(driver, "look_at_all", elsewhere)
    says = [f"cannot see {tmp_path / '.C.modelfuse'}", "The node "]
    refuse("merge", *words, *on(simulated), says=says, hint="that all nodes share")


def test_a_node_that_sees_other_inputs_is_named(
    refuse: Callable[..., str], simulated: Simulated, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_all = node_checks.look_at_all
    file, times = tmp_path / "A" / "model.safetensors", (tmp_path / "A" / "model.safetensors").stat()

    def elsewhere(common: Any) -> None:
        os.utime(file, (0, 0))
        try:
            look_at_all(common)
        finally:
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    monkeypatch.setattr(driver, "look_at_all", elsewhere)
    says = ["The node ", f"cannot take part: {file} was changed"]
    refuse("merge", *words, *on(simulated), says=says, hint="that all nodes share")


def test_a_node_with_another_version_is_named(
    refuse: Callable[..., str], simulated: Simulated, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "__version__", "99.0")
    says = [f"has modelfuse {package.__version__}, this machine has 99.0"]
    refuse("merge", *words, *on(simulated), says=says, hint="same version")


def test_an_input_that_is_replaced_meanwhile_is_noticed(
    modelfuse: Command, simulated: Simulated, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its inode, which means nothing on other machines."""
    file, was, walk = tmp_path / "A" / "model.safetensors", tmp_path / "was", driver.Cluster.walk

    def replacing(*words: Any) -> None:
        walk(*words)
        if not was.exists():
            os.link(file, was)  # So that its inode is not used again.
            status, other = file.stat(), tmp_path / "other"
            other.write_bytes(file.read_bytes())
            os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
            other.rename(file)

    monkeypatch.setattr(driver.Cluster, "walk", replacing)
    said = modelfuse("merge", *words, *on(simulated))
    assert said.status == 2
    assert f"{file} was changed while it was being read" in said.err
    assert not (tmp_path / "C").exists()


# Reaching a cluster --------------------------------------------------------------------------------------------------


def test_nobody_listens(refuse: Callable[..., str], words: Words, disconnected: Simulated) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        cluster = ["--engine", "ray", "--ray_address", address, "--ray_timeout", 1]
        says = [f"The Ray cluster at {address} cannot be reached within 1 s: Connection refused"]
        refuse("merge", *words, *cluster, says=says, hint="ray start --head")


def test_somebody_else_listens(
    refuse: Callable[..., str], words: Words, disconnected: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would wait for minutes, and end the process then."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        says = [f"The Ray cluster at {address} cannot be reached: it did not answer within 3 s"]
        refuse("merge", *words, "--engine", "ray", "--ray_timeout", 3, says=says, hint="--ray_timeout waits longer")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--ray_address", "10.0.0.1:6379"], "ray_address is 10.0.0.1:6379, but engine is local"),
        (["--engine", "ray", "--ray_address", "ray://10.0.0.1:10001"], "which is not HOST:PORT"),
        (["--engine", "ray", "--ray_address", "10.0.0.1"], "which is not HOST:PORT"),
        (["--engine", "ray", "--ray_timeout", "0"], "ray_timeout is"),
        (["--engine", "ray", "--tensor_type", "pt"], "tensor_type pt cannot be used"),
        (["--engine", "spark"], "engine is 'spark'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    refuse: Callable[..., str], words: Words, given: Words, says: str
) -> None:
    refuse("merge", *words, *given, says=[says])


@pytest.mark.parametrize("command", ["merge", "check"])
def test_without_ray_the_extra_is_named(
    refuse: Callable[..., str], words: Words, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(optional_packages, "find_spec", lambda module: None)
    refuse(
        command,
        *words,
        "--engine",
        "ray",
        says=["engine ray needs ray"],
        hint=f"pip install '{_installed_from()}[ray]'",
    )


# Nodes and drivers that are lost -------------------------------------------------------------------------------------


#: Merges in small spans, keeps each one at once, and then does something.
DRIVER = """
import os, signal, sys
from modelfuse.execution import run
from modelfuse.checkpoints.output.background_sync import BackgroundSync
from modelfuse.checkpoints.output.atomic_folder import OutputFolder
from modelfuse.cli.main import main
from modelfuse.execution.ray import batches

run.SPAN, batches.MOST_BYTES = {span}, 1
kept, keep = [], OutputFolder.keep

def keep_at_once(folder, *words):
    if len(kept) == 5:
        {action}
    kept.append(keep(folder, *words))
    folder._sync.stop()
    folder._sync.flush()
    folder._sync = BackgroundSync(folder._keep)

OutputFolder.keep = keep_at_once
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda way: way.name)
def test_a_driver_that_is_ended_is_gone_on_with(
    merge: Command, simulated: Simulated, words: Words, tmp_path: Path, sent: list[Batch], way: signal.Signals
) -> None:
    words += ["--merge_method", "ties"]
    expected = on_one_machine(merge, words, tmp_path)
    code = DRIVER.format(span=SPAN, action=f"os.kill(os.getpid(), {int(way)})")
    with start("merge", *words, *on(simulated), code=code) as process:
        _, err = process.communicate()
    assert process.returncode == (130 if way == signal.SIGINT else -way), err
    if way != signal.SIGKILL:
        assert "the same command resumes from there" in err
        assert "Traceback" not in err
    said = merge(*words, *on(simulated))
    assert "Resuming the interrupted run" in said.err
    assert content(tmp_path / "C") == expected
    assert len({id(span) for batch in sent for own in batch.spans for span in own if span.pass_.writes}) <= 14 - 5


@pytest.fixture(scope="module")
def losing() -> Iterator[Simulated]:
    """A cluster that loses nodes."""
    ray.shutdown()
    made = simulate(3)
    yield made
    made.shutdown()


@contextmanager
def lose_after(simulated: Simulated, nodes: list[Any], visits: Path, number: int) -> Iterator[None]:
    """Lose nodes at once, as by a power cut, after so many spans were begun, or after a merge that begins fewer."""
    ended = threading.Event()

    def wait_and_lose() -> None:
        while not ended.wait(0.02) and (not visits.exists() or len(os.listdir(visits)) < number):
            pass
        for node in nodes:
            simulated.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=wait_and_lose, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_the_tasks_of_a_lost_node_run_elsewhere_and_without_any_node_the_merge_ends(
    merge: Command, modelfuse: Command, losing: Simulated, words: Words, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, sent: list[Batch]
) -> None:  # fmt: skip
    expected = on_one_machine(merge, words, tmp_path)
    monkeypatch.setattr(batches, "MOST_BYTES", 1)
    first, *others = losing.worker_nodes
    with monkeypatch.context() as patch:
        visits = make_fail(patch, tmp_path / "visits", "slow", lambda name: name in "ae")
        with lose_after(losing, [first], visits, 4):
            said = merge(*words, *on(losing))
    assert any(batch.attempts == 2 for batch in sent)
    assert "raylet" not in said.out + said.err
    assert content(tmp_path / "C") == expected

    with monkeypatch.context() as patch:
        visits = make_fail(patch, tmp_path / "more visits", "slow", lambda name: name in "ae")
        with lose_after(losing, others, visits, 4):
            said = modelfuse("merge", *words, "--overwrite", *on(losing, "--ray_timeout", 3))
    assert said.status == 2
    assert "has had no processor for 3 s" in said.err or "the Ray task has failed" in said.err
    assert content(tmp_path / "C") == expected
    losing.add_node(num_cpus=1, **STORE)
    merge(*words, "--overwrite", *on(losing))
    assert content(tmp_path / "C") == expected


def test_a_cluster_whose_head_is_lost_is_given_up(
    merge: Command, losing: Simulated, words: Words, tmp_path: Path
) -> None:
    """Ray itself would wait for a minute, and end the process then."""
    expected = on_one_machine(merge, words, tmp_path)
    (head,) = losing.head_node.all_processes["gcs_server"]
    action = f"os.kill({head.process.pid}, 9); __import__('time').sleep(3)"
    with start(
        "merge", *words, *on(losing, "--ray_timeout", 2), code=DRIVER.format(span=SPAN, action=action)
    ) as process:
        _, err = process.communicate()
    assert process.returncode == 2, err
    assert "error: The Ray cluster has not answered for 2 s" in err
    assert "the same command resumes from there" in err
    assert "Resuming the" in merge(*words).err
    assert content(tmp_path / "C") == expected


# What is sent --------------------------------------------------------------------------------------------------------


def test_element_types_are_the_same_in_every_process() -> None:
    assert all(pickle.loads(pickle.dumps(dtype)) is dtype for dtype in BY_NAME.values())


def test_locks_and_what_they_guard_stay_behind() -> None:
    recent, landmarks = Recent(most=3), Landmarks()
    recent.get("key", lambda: "value")
    landmarks.add(5, 7)
    sent = pickle.loads(pickle.dumps((recent, landmarks)))
    assert (sent[0].most, sent[0].get("key", lambda: "made anew")) == (3, "made anew")
    assert sent[1].before(9) == (0, 0)


def test_a_file_has_no_inode_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12")
    file = SourceFile.at(tmp_path / "file")
    sent = pickle.loads(pickle.dumps(file))
    assert (sent.path, sent.size, sent.mtime_ns, sent.inode) == (file.path, file.size, file.mtime_ns, None)
    with sent.open():
        pass
    os.utime(tmp_path / "file", (0, 0))
    with pytest.raises(package.CheckpointError, match="was changed"), sent.open():
        pass
