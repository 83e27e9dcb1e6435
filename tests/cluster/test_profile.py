"""Profiles: where they are found, what is refused, and what `auto` means on this machine."""

from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

import cluster.profile
from cluster.profile import (
    Profile,
    ProfileError,
    ProfileResourceError,
    load_profile,
    profile_names,
    profile_warnings,
    visible_gpus,
)
from cluster.profile_sections import SlurmSection

SHIPPED = sorted((Path(cluster.profile.__file__).parent / "profiles").glob("*.yaml"))


@pytest.fixture(autouse=True)
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder of its own, so that the tester's own profiles play no part."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "zerofleet" / "profiles"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give the machine a number of GPU device files."""
    folder = tmp_path / "dev"
    folder.mkdir()
    monkeypatch.setattr(cluster.profile, "DEVICE_FOLDER", folder)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(count: int) -> None:
        for name in [*(f"nvidia{index}" for index in range(count)), "nvidiactl", "nvidia-uvm", "null"]:
            (folder / name).touch()

    return make


def test_the_shipped_profiles_load_and_open_with_a_command():
    assert [path.stem for path in SHIPPED] == ["local", "ray", "slurm", "ssh"]
    for path in SHIPPED:
        profile = load_profile(path.stem)
        assert profile.name == path.stem
        assert profile.description
        command = "run" if path.stem in ("local", "ray") else "submit"
        assert path.read_text().startswith(f"# zerofleet {command} ")


def test_the_schema_accepts_the_shipped_profiles_and_refuses_an_unknown_key():
    validator = jsonschema.Draft202012Validator(Profile.model_json_schema())
    for path in SHIPPED:
        document = YAML(typ="safe", pure=True).load(path)
        assert list(validator.iter_errors(document)) == []
        assert list(validator.iter_errors({**document, "bakend": "ray"}))


def test_the_default_is_local():
    assert load_profile(None) == load_profile("local")
    assert load_profile().backend == "local"


def test_a_profile_of_ones_own_goes_before_a_shipped_one(own_profiles: Path):
    (own_profiles / "local.yaml").write_text("workers_per_node: 5\n")
    (own_profiles / "lab.yaml").write_text("backend: ray\nname: The lab\n")
    assert load_profile().workers_per_node == 5
    assert load_profile("lab").name == "The lab"
    assert profile_names() == ["lab", "local", "ray", "slurm", "ssh"]


def test_a_profile_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.yaml").write_text("workers_per_node: 3\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "./mine.yaml", str(tmp_path / "mine.yaml"), tmp_path / "mine.yaml"):
        assert load_profile(name).workers_per_node == 3


def test_an_unknown_name_gets_a_near_match():
    with pytest.raises(ProfileError) as caught:
        load_profile("rya")
    assert str(caught.value) == (
        "rya: 1 problem\n  no profile has this name; did you mean ray? (a file is named with its .yaml)"
    )
    with pytest.raises(ProfileError, match="known here: local, ray, slurm, ssh"):
        load_profile("cluster7")
    with pytest.raises(ProfileError, match=r"none\.yaml: 1 problem\n  cannot be read: No such file"):
        load_profile("none.yaml")


def test_all_problems_of_a_profile_at_once(tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "backend: loacl\nnodes: 0\nworkers_per_node: many\ndevice: gpu\ncpus_per_worker: '1'\n"
        "environment:\n  A-B: x\n  OMP_NUM_THREADS: 4\nadress: 10.0.0.1:6379\n"
    )
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 8 problems",
        "  line 1  backend: is 'loacl', but must be one of local, ray, slurm, ssh; did you mean local?",
        "  line 2  nodes: is 0, but must be at least 1",
        "  line 3  workers_per_node: must be a whole number or auto, not 'many'",
        "  line 4  device: is 'gpu', but must be one of auto, cpu, cuda",
        "  line 5  cpus_per_worker: must be a number, not '1'; write it without quotes",
        "  line 7  environment.A-B: is 'A-B', but must match ^[A-Za-z_][A-Za-z0-9_]*$",
        "  line 8  environment.OMP_NUM_THREADS: must be text, not 4; put it in quotes",
        "  line 9  adress: unknown key; did you mean address?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "address: 10.0.0.1:6379\n",
            "address names a Ray cluster, which the local backend does not use; set backend: ray",
        ),
        (
            "backend: slurm\n",
            "workers_per_node and device cannot be auto, .* not at those of the slurm backend; set both",
        ),
        ("slurm: {partition: gpu}\n", "slurm is set, but backend is local; leave one of the two out"),
        ("backend: ssh\nworkers_per_node: 1\ndevice: cpu\n", "the ssh backend needs ssh.hosts or ssh.hostfile"),
        (
            "backend: ssh\nworkers_per_node: 1\ndevice: cpu\nnodes: 3\nssh: {hosts: [a, b]}\n",
            "nodes is 3, but ssh.hosts has 2; name more or ask for less",
        ),
        (
            "backend: ssh\nworkers_per_node: 1\ndevice: cpu\nssh: {hosts: [a], hostfile: h}\n",
            "ssh: set exactly one of hosts and hostfile",
        ),
        (
            "backend: slurm\nworkers_per_node: 1\ndevice: cpu\nslurm: {time_limit: 2h}\n",
            r"slurm: time_limit is '2h'; write minutes \(90\), HH:MM:SS",
        ),
        (
            "backend: slurm\nworkers_per_node: 1\ndevice: cpu\nslurm: {options: {nodes: 4}}\n",
            "slurm: options: nodes follow from other fields",
        ),
        (
            "backend: slurm\nworkers_per_node: 1\ndevice: cpu\nslurm: {options: {job-name: mine}}\n",
            "slurm: options: job-name follow from other fields of the profile or the recipe",
        ),
        (
            "backend: slurm\nworkers_per_node: 1\ndevice: cpu\nmemory_per_worker_gib: 8\n"
            "slurm: {memory_per_node: 64G}\n",
            "memory_per_worker_gib and slurm.memory_per_node both say what --mem is; set one of them",
        ),
        (
            "backend: slurm\nworkers_per_node: 1\ndevice: cpu\nslurm: {options: {partition: x, mem: 1G}}\n",
            "slurm: options: mem, partition are fields of their own; set them there",
        ),
        (
            "backend: slurm\nworkers_per_node: 1\ndevice: cpu\nslurm: {options: {array: 1-9}}\n",
            "slurm: options: array is '1-9', but its tasks would train one run at the same time; end it with %1",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=expected):
        load_profile(path)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("0:30", 1), ("10:00", 10), ("01:30:00", 90), ("2-0", 2880), ("1-12:30", 2190), ("1-00:00:01", 1441)],
)
def test_time_limits_as_sbatch_reads_them(text: str, minutes: int):
    assert SlurmSection(time_limit=text).time_limit_minutes == minutes


def test_a_profile_with_secrets_that_others_can_read_is_warned_of(own_profiles: Path):
    path = own_profiles / "lab.yaml"
    path.write_text("environment: {WANDB_API_KEY: abc, HF_TOKEN: def, NCCL_DEBUG: INFO}\n")
    path.chmod(0o644)
    assert profile_warnings("lab") == [f"{path} holds HF_TOKEN, WANDB_API_KEY and can be read by others; chmod 600 it"]
    path.chmod(0o600)
    assert profile_warnings("lab") == []
    path.write_text("environment: {NCCL_DEBUG: INFO}\n")
    path.chmod(0o644)
    assert profile_warnings("lab") == []
    path.write_text(
        "backend: slurm\nworkers_per_node: 1\ndevice: cpu\n"
        "slurm: {setup: [module load cuda, 'export A=b HF_TOKEN=abc']}\n"
    )
    assert profile_warnings("lab") == [f"{path} holds HF_TOKEN and can be read by others; chmod 600 it"]


@pytest.mark.parametrize(
    ("devices", "visible", "count"),
    [
        (0, None, 0),
        (4, None, 4),
        (4, "0,2", 2),
        (4, "", 0),
        (4, "-1", 0),
        (4, "1,-1,2", 1),
        (2, "1, 5, 0", 1),
        (2, "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        (1, "MIG-1,MIG-2", 2),
        (0, "0,1", 0),
        (2, "NoDevFiles", 0),
    ],
)
def test_visible_gpus_are_counted_as_cuda_counts_them(gpus, monkeypatch, devices, visible, count):
    gpus(devices)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == count


def test_auto_is_one_worker_a_gpu_or_two_on_the_cpu(gpus):
    assert Profile().counts() == (1, 2, "cpu")
    gpus(4)
    assert Profile().counts() == (1, 4, "cuda")
    assert Profile(device="cpu").counts() == (1, 2, "cpu")
    assert Profile(backend="ray", nodes=3, workers_per_node=8).counts() == (3, 8, "cuda")


def test_cuda_without_a_gpu_needs_a_number_of_workers(gpus):
    gpus(0)
    assert Profile(device="cuda", workers_per_node=8).counts() == (1, 8, "cuda")
    with pytest.raises(ProfileResourceError, match="this machine shows no GPU; set workers_per_node to a number"):
        Profile(name="p", device="cuda").counts()


def test_an_elastic_number_of_nodes(tmp_path: Path):
    path = tmp_path / "p.yaml"
    for text in ("nodes: {min: 2, max: 8}", "nodes: 8\nmin_nodes: 2"):
        for backend in ("ray", "slurm", "local"):
            path.write_text(f"backend: {backend}\nworkers_per_node: 1\ndevice: cpu\n{text}\n")
            profile = load_profile(path)
            assert (profile.nodes, profile.min_nodes) == (8, 2)
    path.write_text("backend: ray\nnodes: {min: 9, max: 8}\n")
    with pytest.raises(ProfileError, match="min_nodes is 9, more than nodes 8"):
        load_profile(path)
    for text, told in (("2-8", "'2-8'"), ("{min: 2, maximum: 8}", "{min: 2, maximum: 8}"), ("{max: 8}", "{max: 8}")):
        path.write_text(f"backend: ray\nnodes: {text}\n")
        with pytest.raises(ProfileError) as caught:
            load_profile(path)
        assert f"line 2  nodes: must be a whole number or {{min: 2, max: 8}}, not {told}" in str(caught.value)
    path.write_text("backend: ssh\nworkers_per_node: 1\ndevice: cpu\nnodes: {min: 1, max: 3}\nssh: {hosts: [a, b]}\n")
    with pytest.raises(ProfileError, match=r"nodes is 3, but ssh.hosts has 2"):
        load_profile(path)
