"""The profile: where to train. It names machines, never a model."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.errors import DocumentError, ExpectedError, Problem
from cluster.profile_sections import RayJobSection, SlurmSection, SshSection
from cluster.strict_yaml import read_yaml
from cluster.validation import near_match, validate

DEVICE_FOLDER = Path("/dev")
"""Where the NVIDIA driver puts one file a GPU."""

SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
"""Of environment variables whose values are written nowhere."""

SECRET_ASSIGNMENT = re.compile(r"""(\w*(?:TOKEN|KEY|SECRET|PASSWORD)\w*=)("[^"]*"|'[^']*'|\S+)""", re.IGNORECASE)
"""Of such a variable in a line of shell, as in `export HF_TOKEN=...`: the name, and the value."""

_SUFFIXES = (".yaml", ".yml")
_GPU_DEVICE = re.compile(r"nvidia\d+")

EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class ProfileError(DocumentError):
    """A profile is wrong; lists every bad field with file and line."""


class ProfileResourceError(ExpectedError):
    """A profile asks for what this machine does not have."""


class Profile(BaseModel):
    """Where to train: backend, machines and workers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = ""
    """For people; default: the name of the file."""
    description: str = ""
    """For people."""
    backend: Literal["local", "ray", "slurm", "ssh"] = "local"
    """`local`: a Ray of our own on this machine, or the one in `RAY_ADDRESS`; `ray`: a cluster that runs already;
    `slurm` and `ssh`: machines on which Ray is started for the job."""
    nodes: int = Field(default=1, ge=1)
    """Machines; on the local backend, Ray nodes on this one. `{min: 2, max: 8}`: elastic, as many of them as there
    are."""
    min_nodes: int | None = Field(default=None, ge=1)
    """Fewest machines to train on when others are lost; what `nodes: {min: ...}` sets. Default: all are needed."""
    workers_per_node: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Training processes on each machine; `auto`: one a GPU that this machine shows, or 2 where there is none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What a worker computes on, one GPU a worker for `cuda`; `auto`: `cuda` when this machine shows a GPU."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Cores that Ray reserves for each worker."""
    accelerator: str | None = None
    """GPU of each worker, as `zerofleet plan --gpu` names it (`H100-80GB`) or a file that describes one: plans then say
    how long a step takes and refuse what does not fit."""
    host_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of each machine, which bounds what can be offloaded; default: what its workers have by
    `memory_per_worker_gib`, or this machine's on the local backend."""
    memory_per_worker_gib: float | None = Field(default=None, gt=0)
    """Memory that Ray reserves for each worker; Slurm is asked for that of all workers of a node and 1 GiB for Ray
    (`--mem`). Default: not counted."""
    address: str | None = None
    """Where the Ray cluster listens (`10.0.0.1:6379`); default: `RAY_ADDRESS` of the environment."""
    environment: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Environment variables of the workers."""
    runs_directory: str | None = None
    """Where run directories are made unless `--run-dir` names one; all nodes must see it. Default: `runs`."""
    log_directory: str | None = None
    """Where the logs of drivers and ranks go, in a folder for each run, to which the run directory has a link; all
    nodes must see it. Default: in the run directory."""
    join_timeout_seconds: float = Field(default=300.0, gt=0)
    """How long a job waits for all its nodes to join Ray."""
    hours_between_failures: float | None = Field(default=None, gt=0)
    """Of one machine, on average, as its operators know it; `zerofleet plan` then says how often to save."""
    dashboard: bool = False
    """Serve Ray's dashboard on the first node, on loopback."""
    slurm: SlurmSection = SlurmSection()
    """Of the slurm backend."""
    ssh: SshSection | None = None
    """Of the ssh backend."""
    ray: RayJobSection = RayJobSection()
    """Of jobs submitted to the ray backend."""

    @field_validator("nodes", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        if isinstance(value, dict | str):  # load_profile has taken {min: ..., max: ...} apart
            raise ValueError(f"must be a whole number or {{min: 2, max: 8}}, not {_on_a_line(value)}")
        return value

    @model_validator(mode="after")
    def _elastic_between(self) -> Self:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes is {self.min_nodes}, more than nodes {self.nodes}")
        return self

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        if self.backend != "ray" and self.address is not None:
            raise ValueError(
                f"address names a Ray cluster, which the {self.backend} backend does not use; set backend: ray"
            )
        if self.backend in ("slurm", "ssh") and "auto" in (self.workers_per_node, self.device):
            raise ValueError(
                "workers_per_node and device cannot be auto, which looks at this machine and not at those of the "
                f"{self.backend} backend; set both"
            )
        for section in ("slurm", "ssh", "ray"):
            if section in self.model_fields_set and section != self.backend:
                raise ValueError(f"{section} is set, but backend is {self.backend}; leave one of the two out")
        if self.memory_per_worker_gib is not None and self.slurm.memory_per_node is not None:
            raise ValueError("memory_per_worker_gib and slurm.memory_per_node both say what --mem is; set one of them")
        return self._fits_its_hosts()

    def _fits_its_hosts(self) -> Self:
        if self.backend == "ssh" and self.ssh is None:
            raise ValueError("the ssh backend needs ssh.hosts or ssh.hostfile")
        if self.ssh is not None and self.ssh.hosts and len(self.ssh.hosts) < self.nodes:
            raise ValueError(
                f"nodes is {self.nodes}, but ssh.hosts has {len(self.ssh.hosts)}; name more or ask for less"
            )
        return self

    @property
    def memory_per_worker(self) -> int | None:
        """Bytes of `memory_per_worker_gib`."""
        return None if self.memory_per_worker_gib is None else int(self.memory_per_worker_gib * 2**30)

    @property
    def plain_environment(self) -> dict[str, str]:
        """Of the environment what may be written down."""
        return {name: value for name, value in self.environment.items() if not SECRET_NAME.search(name)}

    @property
    def secrets(self) -> dict[str, str]:
        """The rest of it: handed from process to process, and written nowhere."""
        return {name: value for name, value in self.environment.items() if SECRET_NAME.search(name)}

    def counts(self) -> tuple[int, int, Literal["cpu", "cuda"]]:
        """Resolve `auto` on this machine.

        Returns:
            Nodes, workers per node, device.

        Raises:
            ProfileResourceError: the number of workers follows the GPUs, and this machine shows none.
        """
        gpus = visible_gpus()
        device: Literal["cpu", "cuda"] = ("cuda" if gpus else "cpu") if self.device == "auto" else self.device
        if self.workers_per_node != "auto":
            return self.nodes, self.workers_per_node, device
        if device == "cuda" and not gpus:
            raise ProfileResourceError(
                f"profile {self.name}: device is cuda and workers_per_node is auto, but this machine shows no GPU; "
                "set workers_per_node to a number, or device to cpu"
            )
        return self.nodes, gpus if device == "cuda" else 2, device


def _on_a_line(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {inner}' for key, inner in value.items())}}}"
    return repr(value)


def visible_gpus() -> int:
    """Count the NVIDIA GPUs that a process started here would see, from device files and `CUDA_VISIBLE_DEVICES`."""
    present = sum(1 for path in DEVICE_FOLDER.glob("nvidia*") if _GPU_DEVICE.fullmatch(path.name))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    count = 0
    for entry in chosen.split(","):
        name = entry.strip()
        if not name.startswith(("GPU-", "MIG-")) and not (name.isdecimal() and int(name) < present):
            break  # as CUDA does: the first invalid entry hides itself and all that follow
        count += 1
    return count if present else 0


def load_profile(name_or_path: str | Path | None = None) -> Profile:
    """Load a profile.

    Args:
        name_or_path: a file (it ends in .yaml, or holds a /), or a name, looked for among the user's own profiles
            (`~/.config/zerofleet/profiles/NAME.yaml`) and then among the shipped ones; default: `local`.

    Raises:
        ProfileError: there is no such profile, or it is wrong; lists everything that is.
    """
    path = find_profile(name_or_path or "local")
    document = read_yaml(path, ProfileError)
    document.data.setdefault("name", path.stem)
    nodes = document.data.get("nodes")
    if isinstance(nodes, dict) and set(nodes) == {"min", "max"} and "min_nodes" not in document.data:
        document.data.update(nodes=nodes["max"], min_nodes=nodes["min"])
    return validate(Profile, document, ProfileError)


def profile_warnings(name_or_path: str | Path | None = None) -> list[str]:
    """What a person should know of a profile that loads: secrets in a file that others can read."""
    path = find_profile(name_or_path or "local")
    profile = load_profile(path)
    setup = [*profile.slurm.setup, *(profile.ssh.setup if profile.ssh else ())]
    in_setup = [match[1].rstrip("=") for line in setup for match in SECRET_ASSIGNMENT.finditer(line)]
    secret = sorted({*profile.secrets, *in_setup})
    if not secret or not path.stat().st_mode & 0o044:
        return []
    return [f"{path} holds {', '.join(secret)} and can be read by others; chmod 600 it"]


def profile_names() -> list[str]:
    """Names of the user's own and the shipped profiles, sorted."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def _folders() -> tuple[Path, Path]:
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return configuration / "zerofleet" / "profiles", Path(__file__).resolve().parent / "profiles"


def find_profile(name_or_path: str | Path) -> Path:
    """The file of a profile; see `load_profile`.

    Raises:
        ProfileError: no profile has this name.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(_SUFFIXES):
        return Path(name_or_path)
    for folder in _folders():
        path = folder / f"{text}.yaml"
        if path.exists():
            return path
    problem = f"no profile has this name; {near_match(text, profile_names())} (a file is named with its .yaml)"
    raise ProfileError(text, [Problem(problem)])
