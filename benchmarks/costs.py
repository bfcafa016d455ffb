"""Compute the time of a merge from the machine's rates and measured constants, by the model of docs/scale.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Method:
    """The cost of a method.

    Attributes:
        fixed: Nanoseconds of a core per element of the result.
        each: Nanoseconds of a core per element of each model, without the base.
        readings: How many times it reads its inputs: twice if it measures whole tensors first.
        has_base: Whether it reads a base.
        giving: Seconds of the driver per batch of spans on a cluster.
    """

    fixed: float
    each: float
    readings: int
    has_base: bool
    giving: float


@dataclass(frozen=True, slots=True)
class Constants:
    """Measured constants.

    Attributes:
        methods: The costs of methods, by name.
        start: Seconds of a process before planning and after writing.
        joining: Additional seconds on a Ray cluster.
        plan: Seconds per tensor of each model.
        handling: Nanoseconds of a core per byte read or written: copies, checksums, counting NaN.
        group: Bytes that a batch of spans reads and writes on a cluster.
    """

    methods: Mapping[str, Method]
    start: float
    joining: float
    plan: float
    handling: float
    group: float


#: On one core of the machine that docs/scale.md names.
MEASURED = Constants(
    methods={
        "linear": Method(0.11, 0.085, 1, False, 2e-3),
        "dare_ties": Method(0.29, 0.28, 1, True, 2e-3),
        "ties": Method(0.50, 0.58, 2, True, 5e-3),
        "della": Method(0.32, 0.90, 2, True, 5e-3),
    },
    start=0.2,
    joining=3.0,
    plan=12e-6,
    handling=0.25,
    group=256e6,
)


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of a merge; all rates are in GB/s.

    Attributes:
        number: The number of machines; several use a shared storage over the network.
        cores: Cores of each machine.
        read: Read rate of each machine's disk.
        write: Write rate of each machine's disk.
        network: Receive rate of each machine, and its simultaneous send rate.
        storage: Total read rate of the shared storage, and its simultaneous write rate; None: not limiting.
        pcie: Transfer rate to each machine's GPU, and back simultaneously; None: the cores compute.
    """

    number: int
    cores: int
    read: float
    write: float
    network: float
    storage: float | None = None
    pcie: float | None = None

    @property
    def input(self) -> float:
        """The total read rate in GB/s."""
        return self.read if self.number == 1 else self._shared()

    @property
    def output(self) -> float:
        """The total write rate in GB/s."""
        return self.write if self.number == 1 else self._shared()

    def _shared(self) -> float:
        asked = self.network * self.number
        return asked if self.storage is None else min(asked, self.storage)


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge of models of the same shape.

    Attributes:
        method: The method's name.
        parameters: Parameters of each model.
        models: The number of models, without the base.
        base: Whether there is a base; it is read by methods that need one.
        tensors: Tensors of each model.
        itemsize: Bytes per parameter.
    """

    method: str
    parameters: float
    models: int
    base: bool
    tensors: int = 1000
    itemsize: int = 2

    @property
    def sources(self) -> int:
        """The number of models that are read, including the base."""
        return self.models + self.base

    @property
    def inputs(self) -> float:
        """Bytes of all inputs."""
        return self.parameters * self.itemsize * self.sources

    @property
    def outputs(self) -> float:
        """Bytes of the output."""
        return self.parameters * self.itemsize


@dataclass(frozen=True, slots=True)
class Cost:
    """The time of a merge in seconds, by term. The terms from ``reading`` on overlap: only the largest counts.

    Attributes:
        start: Starting and ending the process, and joining a cluster.
        plan: Reading the headers.
        reading: Reading from the disk or the shared storage.
        writing: Writing the output, including the sync.
        computing: The cores, or transfers to a GPU.
        giving: The driver of a cluster, which sends the batches.
    """

    start: float
    plan: float
    reading: float
    writing: float
    computing: float
    giving: float

    @property
    def overlapping(self) -> dict[str, float]:
        """The terms of which only the largest counts."""
        terms = ("reading", "writing", "computing", "giving")
        return {name: getattr(self, name) for name in terms}

    @property
    def binding(self) -> str:
        """The name of the largest of these."""
        terms = self.overlapping
        return max(terms, key=terms.__getitem__)

    @property
    def seconds(self) -> float:
        """The total."""
        return self.start + self.plan + max(self.overlapping.values())


def cost(merge: Merge, machines: Machines, constants: Constants = MEASURED) -> Cost:
    """Compute the time of a merge.

    Args:
        merge: The merge.
        machines: The machines.
        constants: The measured constants.
    """
    method = constants.methods[merge.method]
    clustered = machines.number > 1
    walked = merge.inputs * method.readings
    # One machine reads a tensor from its page cache the second time; on a cluster, another node may read it.
    fetched = walked if clustered else merge.inputs
    kernels = merge.parameters * (method.fixed + method.each * merge.models) if machines.pcie is None else 0.0
    cores = (kernels + constants.handling * (walked + merge.outputs)) / 1e9 / machines.cores / machines.number
    bus = walked / 1e9 / machines.pcie / machines.number if machines.pcie else 0.0
    groups = (walked + merge.outputs) / constants.group
    return Cost(
        start=constants.start + constants.joining * clustered,
        plan=constants.plan * merge.tensors * merge.sources,
        reading=fetched / 1e9 / machines.input,
        writing=merge.outputs / 1e9 / machines.output,
        computing=max(cores, bus),
        giving=method.giving * groups * clustered,
    )
