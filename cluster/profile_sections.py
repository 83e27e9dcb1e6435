"""The parts of a profile that only one backend reads."""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
OWN_OPTIONS = frozenset(
    {
        *("job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node"),
        *("signal", "output", "error", "open-mode"),
    }
)
"""sbatch options that follow from the recipe and from the profile's other fields."""


class ProfileSection(BaseModel):
    """Base of every part of a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ContainerSection(ProfileSection):
    """A container that the job's processes run in on every node."""

    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """`pyxis`: a plugin of srun that takes `--container-...`; `apptainer`: the command of this name."""
    image: str
    """Image, in the runtime's own notation; ZeroFleet must be installed in it."""
    mounts: tuple[str, ...] = ()
    """`HOST:INSIDE` each. The run directory must have the same path inside."""
    arguments: tuple[str, ...] = ()
    """Passed to the runtime as they are."""
    python: str = "python3"
    """Python inside the container."""


class SlurmSection(ProfileSection):
    """What is asked of Slurm. A field that is left out is left to the site's defaults."""

    partition: str | None = None
    """`--partition`."""
    account: str | None = None
    """`--account`."""
    qos: str | None = None
    """`--qos`."""
    constraint: str | None = None
    """`--constraint`: features that the nodes must have."""
    exclude: str | None = None
    """`--exclude`: nodes not to use."""
    nodelist: str | None = None
    """`--nodelist`: nodes to use."""
    gres: str | None = None
    """`--gres`, such as `gpu:a100:8`; default for device cuda: `--gpus-per-node` with one GPU a worker."""
    dependency: str | None = None
    """`--dependency`, such as `afterok:1234`."""
    time_limit: str | None = None
    """`--time`: `MINUTES`, `HH:MM:SS` or `D-HH:MM:SS`. A run that needs longer saves, requeues itself and goes on.
    Default: the partition's own."""
    memory_per_node: str | None = None
    """`--mem`, such as `64G`; `0` is all of a node's."""
    exclusive: bool = False
    """`--exclusive`: share the nodes with no other job."""
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], str | int | bool] = Field(default_factory=dict)
    """Any other sbatch option by its long name, such as `{reservation: maintenance, array: "1-3%1"}`; true for one
    without a value, false to leave out what is set otherwise (`requeue: false`)."""
    srun_arguments: tuple[str, ...] = ()
    """Passed to srun as they are."""
    setup: tuple[str, ...] = ()
    """Shell commands for the first node, before srun: `module load ...`."""
    container: ContainerSection | None = None
    """Run inside a container."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.time_limit is not None and self.time_limit_minutes is None:
            raise ValueError(
                f"time_limit is {self.time_limit!r}; write minutes (90), HH:MM:SS (01:30:00) or D-HH:MM:SS, in quotes"
            )
        if clash := sorted(OWN_OPTIONS & self.options.keys()):
            raise ValueError(
                f"options: {', '.join(clash)} follow from other fields of the profile or the recipe; leave them out"
            )
        named = {name.replace("_", "-") for name in SlurmSection.model_fields} | {"time", "mem"}
        if clash := sorted(named & self.options.keys()):
            raise ValueError(f"options: {', '.join(clash)} are fields of their own; set them there")
        array = self.options.get("array")
        if array is not None and not str(array).endswith("%1"):
            raise ValueError(
                f"options: array is {array!r}, but its tasks would train one run at the same time; end it with %1 to "
                "run one after the other"
            )
        return self

    @property
    def time_limit_minutes(self) -> int | None:
        """`time_limit` in whole minutes, rounded up, by the rules of sbatch(1); `None` when there is none."""
        match = _TIME.fullmatch(self.time_limit or "")
        if match is None:
            return None
        days = int(match["days"] or 0)
        parts = [int(match[name]) for name in ("first", "second", "third") if match[name] is not None]
        if match["days"] is not None:
            hours, minutes, seconds = [*parts, 0, 0][:3]
        elif len(parts) == 3:
            hours, minutes, seconds = parts
        else:
            hours, (minutes, seconds) = 0, [*parts, 0][:2]
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        return -(-total // 60)


class SshSection(ProfileSection):
    """Which hosts, and how ssh gets there; whatever is left out is up to your own ssh configuration."""

    hosts: tuple[str, ...] = ()
    """Hosts as you would name them to ssh (`gpu1`, `me@gpu1`); the driver runs on the first."""
    hostfile: str | None = None
    """A DeepSpeed hostfile (`HOST slots=N` a line) instead of hosts."""
    addresses: tuple[str, ...] = ()
    """Addresses at which the hosts reach each other; default: those at which ssh reached them."""
    options: tuple[str, ...] = ()
    """Passed to ssh as they are, such as `-p`, `2222`."""
    python: str | None = None
    """Python on the hosts; default: the path of this one."""
    setup: tuple[str, ...] = ()
    """Shell commands on each host, before the job starts."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.hosts) == (self.hostfile is not None):
            raise ValueError("set exactly one of hosts and hostfile")
        if self.addresses and len(self.addresses) != len(self.hosts):
            raise ValueError(
                f"addresses holds {len(self.addresses)} entries and hosts {len(self.hosts)}; give one each"
            )
        return self


class RayJobSection(ProfileSection):
    """What travels with a job to a Ray cluster that runs already."""

    dashboard_address: str | None = None
    """Where the Jobs API listens (`http://10.0.0.1:8265`); default: what the head at `address` says."""
    working_directory: str | None = None
    """Folder to send along; the driver runs in its copy. Default: none, and ZeroFleet must be installed there."""
    excludes: tuple[str, ...] = ()
    """What of working_directory not to send, as in a .gitignore."""
    requirements: tuple[str, ...] = ()
    """Packages that Ray installs for the job, as in a requirements file."""
    python: str = "python"
    """Python on the cluster."""
