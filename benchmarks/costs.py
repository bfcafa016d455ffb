"""What a merge costs, computed from the machine and a few measured constants; docs/scale.md explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Method:
    """What a method costs a core.

    Attributes:
        fixed: Nanoseconds for each element of the result.
        each: Nanoseconds for each element of each model, the base not counted.
        readings: How often it reads its inputs: one that measures a whole tensor first reads twice.
        has_base: Whether it reads a base.
        giving: Seconds that each group of spans costs the machine that gives them out to a cluster.
    """

    fixed: float
    each: float
    readings: int
    has_base: bool
    giving: float


@dataclass(frozen=True, slots=True)
class Constants:
    """What was measured.

    Attributes:
        methods: By their names.
        start: Seconds that a process needs before it plans, and after it has written all.
        joining: Seconds that a Ray cluster adds to them.
        plan: Seconds for each tensor of each model.
        handling: Nanoseconds of a core for each byte that is read or written: copied, summed up, looked through.
        group: Bytes that a group of spans reads and writes, which a cluster is given at a time.
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
    """What a merge runs on; all rates in GB/s.

    Attributes:
        number: How many machines; more than one read and write a shared storage, through the network.
        cores: Of each.
        read: What each reads from its disk.
        write: What each writes to its disk.
        network: What each receives, and sends at the same time, over the network.
        storage: What the shared storage gives to all, and takes at the same time; None: as much as they ask for.
        pcie: What goes to each one's GPU, and comes back at the same time; None: the cores compute.
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
        """What all of them read, in GB/s."""
        return self.read if self.number == 1 else self._shared()

    @property
    def output(self) -> float:
        """What all of them write, in GB/s."""
        return self.write if self.number == 1 else self._shared()

    def _shared(self) -> float:
        asked = self.network * self.number
        return asked if self.storage is None else min(asked, self.storage)


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge of models of one shape.

    Attributes:
        method: Its name.
        parameters: Of each model.
        models: How many, the base not counted.
        base: Whether there is a base; it is read by methods that need one.
        tensors: Of each model.
        itemsize: Bytes of a parameter.
    """

    method: str
    parameters: float
    models: int
    base: bool
    tensors: int = 1000
    itemsize: int = 2

    @property
    def sources(self) -> int:
        """The models that are read, the base included."""
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
    """Seconds that a merge takes, and where they go. The terms from ``reading`` on overlap: the longest one counts.

    Attributes:
        start: Starting up, on a cluster too.
        plan: Reading the headers.
        reading: Waiting for the disk, or for the shared storage.
        writing: The same for the output, until it is synced.
        computing: The cores, or what goes through a GPU's bus.
        giving: The one machine that gives out a cluster's work.
    """

    start: float
    plan: float
    reading: float
    writing: float
    computing: float
    giving: float

    @property
    def overlapping(self) -> dict[str, float]:
        """The terms of which the longest counts."""
        terms = ("reading", "writing", "computing", "giving")
        return {name: getattr(self, name) for name in terms}

    @property
    def binding(self) -> str:
        """The name of that term."""
        terms = self.overlapping
        return max(terms, key=terms.__getitem__)

    @property
    def seconds(self) -> float:
        """The whole."""
        return self.start + self.plan + max(self.overlapping.values())


def cost(merge: Merge, machines: Machines, constants: Constants = MEASURED) -> Cost:
    """Compute what a merge takes.

    Args:
        merge: What is merged.
        machines: On what.
        constants: What work costs a core.
    """
    method = constants.methods[merge.method]
    clustered = machines.number > 1
    walked = merge.inputs * method.readings
    # One machine has a tensor in its page cache when it reads it again; on a cluster, another node may.
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
