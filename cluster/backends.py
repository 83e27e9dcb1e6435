"""Which backend a job belongs to."""

from cluster.types import Backend


def backend_for(name: str) -> Backend:
    """The backend of this name (`Profile.backend`, `JobRecord.backend`); each is imported when it is asked for."""
    if name == "slurm":
        from cluster.slurm import SlurmBackend

        return SlurmBackend()
    if name == "ray":
        from cluster.ray_jobs import RayJobsBackend

        return RayJobsBackend()
    if name == "ssh":
        from cluster.ssh import SshBackend

        return SshBackend()
    from cluster.local import LocalBackend

    return LocalBackend()
