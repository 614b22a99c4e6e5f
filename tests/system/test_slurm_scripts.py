"""The job scripts among fake Slurm commands: exit codes, restarts, names, command lines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.slurm_jobs import FakeCluster

TERMINATED = -15  # Slurm's end of a job that is requeued


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    return FakeCluster(tmp_path)


# --- what a run's exit code does to the job ------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "job", "requeued"),
    [("0", 0, []), ("78", 78, []), ("93", 93, []), ("75", TERMINATED, ["77"]), ("1", -15, ["77"])],
)
def test_slurm_job_ends_as_its_run_asks(
    cluster: FakeCluster, run: str, job: int, requeued: list[str]
) -> None:
    # A peer that is killed on the way out makes srun's own code useless.
    code, log = cluster.job("a.yaml", FAKE_RUN_CODE=run, FAKE_SRUN_CODE="137")
    assert (code, cluster.requeued()) == (job, requeued), log
    assert "rank 0 runs" in log, "the end of rank 0's log"


@pytest.mark.parametrize(
    ("srun", "job", "requeued"), [("0", -15, ["77"]), ("137", -15, ["77"]), ("78", 78, [])]
)
def test_slurm_run_without_a_word_has_crashed(
    cluster: FakeCluster, srun: str, job: int, requeued: list[str]
) -> None:
    code, log = cluster.job("a.yaml", FAKE_RUN_CODE="none", FAKE_SRUN_CODE=srun)
    assert (code, cluster.requeued()) == (job, requeued), log


def test_slurm_exit_code_of_an_earlier_start_is_not_believed(cluster: FakeCluster) -> None:
    assert cluster.job("a.yaml", FAKE_RUN_CODE="0")[0] == 0
    assert (cluster.work / "logs" / "soar-77" / "exit_code").read_text() == "0\n"
    code, log = cluster.job("a.yaml", FAKE_RUN_CODE="none")
    assert code == TERMINATED and "crashed (srun's code 1), number 1" in log


def test_slurm_crashes_in_a_row_end_the_job_and_a_save_forgives_them(cluster: FakeCluster) -> None:
    cluster.environ["MAX_CRASHES"] = "2"
    codes = []
    for start, run in enumerate(["none", "75", "1", "1"]):
        code, log = cluster.job("a.yaml", FAKE_RUN_CODE=run, SLURM_RESTART_COUNT=str(start))
        assert f"start {start + 1} of a.yaml" in log
        codes.append(code)
    assert codes == [TERMINATED, TERMINATED, TERMINATED, 93]
    assert "MAX_CRASHES = 2" in log and cluster.requeued() == ["77"] * 3
    assert cluster.job("a.yaml", FAKE_RUN_CODE="1", SLURM_JOB_ID="78")[0] == TERMINATED


def test_slurm_requeues_are_limited(cluster: FakeCluster) -> None:
    cluster.environ |= {"MAX_REQUEUES": "3", "FAKE_RUN_CODE": "75"}
    assert cluster.job("a.yaml", SLURM_RESTART_COUNT="2")[0] == TERMINATED
    code, log = cluster.job("a.yaml", SLURM_RESTART_COUNT="3")
    assert code == 93 and "MAX_REQUEUES = 3" in log and cluster.requeued() == ["77"]


def test_slurm_job_that_cannot_requeue_itself_says_so(cluster: FakeCluster) -> None:
    code, log = cluster.job("a.yaml", FAKE_RUN_CODE="75", FAKE_REQUEUE="refuse")
    assert code == 75 and "--no-requeue" in log and "submit it again" in log
    (cluster.fakes / "bin" / "scontrol").unlink()
    code, log = cluster.job("a.yaml", FAKE_RUN_CODE="75")
    assert code == 75 and "no scontrol" in log and "submit it again" in log


# --- names ---------------------------------------------------------------------------------------


def test_slurm_array_task_has_its_own_logs_and_requeues_itself_alone(cluster: FakeCluster) -> None:
    # The last task of an array has the array's own number, which means all tasks.
    array = {"SLURM_ARRAY_JOB_ID": "77", "FAKE_RUN_CODE": "75"}
    cluster.job("a.yaml", SLURM_JOB_ID="78", SLURM_ARRAY_TASK_ID="0", **array)
    cluster.job("a.yaml", SLURM_JOB_ID="77", SLURM_ARRAY_TASK_ID="1", **array)
    assert cluster.requeued() == ["77_0", "77_1"]
    logs = {path.name: path for path in (cluster.work / "logs").iterdir()}
    assert set(logs) == {"soar-77_0", "soar-77_1"}
    names = {path.name for path in logs["soar-77_1"].iterdir()}
    assert names == {"exit_code", "rank-0.log", "rank-1.log"}


def test_slurm_jobs_on_one_node_share_no_port_and_no_logs(cluster: FakeCluster) -> None:
    cluster.environ |= {"LAUNCHER": "torchrun", "FAKE_HOSTS": "n1", "FAKE_SRUN_CODE": "0"}
    # What srun starts is another test's.
    cluster.program(cluster.home / "slurm" / "torchrun_node.sh", "exit 0")
    for job in ("77", "78"):
        cluster.job("a.yaml", SLURM_JOB_ID=job, FAKE_REQUEUE="refuse")
    endpoints = {a for c in cluster.calls("srun") for a in c["arguments"] if "rdzv-endpoint" in a}
    assert endpoints == {"--rdzv-endpoint=n1:16001", "--rdzv-endpoint=n1:16014"}
    assert {path.name for path in (cluster.work / "logs").iterdir()} == {"soar-77", "soar-78"}


def test_slurm_arguments_arrive_verbatim_and_ranks_are_the_tasks(cluster: FakeCluster) -> None:
    given = [
        'my $HOME\'s "config".yaml',
        "run.name=two  words",
        "data.shards=['a b', \"it's\"]",
        "",
    ]
    code, log = cluster.job(*given)
    assert code == 0, log
    run = cluster.run(0)
    assert run["arguments"] == [given[0], "checkpoint.resume=latest", *given[1:]]
    assert run["folder"] == str(cluster.work)
    assert run["environ"]["PYTHONPATH"] == str(cluster.home)
    assert run["environ"]["SRUN_CPUS_PER_TASK"] == "3"
    assert run["environ"]["SOAR_MEGA_SIGNAL_LEAD_S"] == "300"
    # The batch shell has SLURM_PROCID = 0 itself.
    assert [cluster.run(rank)["environ"]["SLURM_PROCID"] for rank in (0, 1)] == ["0", "1"]
    log_1 = cluster.work / "logs" / "soar-77" / "rank-1.log"
    assert log_1.read_text() == "rank 1 runs\n"


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ("encode.sbatch", "encode_data.py"),
        ("convert.sbatch", "convert_to_diffusers.py"),
        ("evaluate.sbatch", "evaluate.py"),
    ],
)
def test_slurm_other_scripts_pass_arguments_and_codes_on(
    cluster: FakeCluster, script: str, program: str
) -> None:
    code, log = cluster.job("a b", "--x=it's", script=script, FAKE_RUN_CODE="none")
    assert code == 1, log
    assert cluster.run()["arguments"] == ["a b", "--x=it's"]
    (call,) = cluster.calls("srun")
    assert str(cluster.home / "tools" / program) in call["arguments"]
    code, log = cluster.job(script=script, SOAR_MEGA_HOME="/nowhere")
    assert code == 78 and "set SOAR_MEGA_HOME" in log


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SOAR_MEGA_HOME": "/nowhere"}, "/nowhere is not the repository"),
        ({"SOAR_MEGA_HOME": "", "SLURM_SUBMIT_DIR": "/nowhere"}, "/nowhere is not the repository"),
        ({"VENV": "/no/venv"}, "VENV: /no/venv/bin/python is no program"),
        ({"RUNTIME": "docker"}, "RUNTIME = docker must be venv, pyxis or apptainer"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER = mpirun must be srun or torchrun"),
        ({"RUNTIME": "pyxis"}, "needs CONTAINER_IMAGE"),
        ({"RUNTIME": "apptainer"}, "needs CONTAINER_IMAGE"),
        ({"CLUSTER_ENV": "/no/cluster.env"}, "CLUSTER_ENV = /no/cluster.env must be a file"),
        ({"LAUNCHER": "torchrun"}, "set MASTER_ADDR"),
    ],
)
def test_slurm_job_that_cannot_work_is_refused(
    cluster: FakeCluster, environ: dict[str, str], expected: str
) -> None:
    code, log = cluster.job("a.yaml", **environ)
    assert code == 78 and expected in log
    assert cluster.calls("srun") == [] and cluster.requeued() == []


def test_slurm_job_without_a_configuration_is_refused(cluster: FakeCluster) -> None:
    code, log = cluster.job()
    assert code == 78 and "no configuration" in log
    assert cluster.calls("srun") == []


# --- command lines -------------------------------------------------------------------------------

MOUNTS = "/data:/data,/my runs:/my runs:rw"


def test_slurm_pyxis_command_line(cluster: FakeCluster) -> None:
    shutil.copy(cluster.home / ".venv" / "bin" / "python", cluster.fakes / "bin" / "python")
    image = "/images/a b.sqsh"
    cluster.environ |= {"RUNTIME": "pyxis", "CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": MOUNTS}
    code, log = cluster.job("a.yaml")
    assert code == 0, log
    command = cluster.training()
    assert command[:3] == [
        f"--container-image={image}",
        f"--container-workdir={cluster.work}",
        f"--container-mounts={MOUNTS}",
    ]
    assert command[-5:] == ["python", "-m", "soar_mega.train", "a.yaml", "checkpoint.resume=latest"]


@pytest.mark.parametrize("mounts", ["", MOUNTS])
def test_slurm_apptainer_command_line(cluster: FakeCluster, mounts: str) -> None:
    cluster.environ |= {"RUNTIME": "apptainer", "CONTAINER_IMAGE": "/images/a b.sif"}
    code, log = cluster.job("a.yaml", CONTAINER_MOUNTS=mounts)
    assert code == 0, log
    command = cluster.training()
    bind = ["--bind", mounts] if mounts else []
    start = ["apptainer", "exec", "--nv", "--pwd", str(cluster.work), *bind, "/images/a b.sif"]
    assert command[command.index("apptainer") : command.index("-m")] == [*start, "python"]
    assert not any("container" in argument for argument in command)


@pytest.mark.parametrize("named", [False, True])
def test_slurm_torchrun_command_line(cluster: FakeCluster, named: bool) -> None:
    cluster.program(cluster.home / "slurm" / "torchrun_node.sh", "exit 0")
    cluster.environ |= {"LAUNCHER": "torchrun", "FAKE_HOSTS": "node-01 node-02", "FAKE_TASKS": "1"}
    if named:
        cluster.environ |= {"MASTER_ADDR": "login", "MASTER_PORT": "29500"}
    cluster.job("a.yaml", SLURM_JOB_NUM_NODES="2", SLURM_RESTART_COUNT="4", FAKE_REQUEUE="refuse")
    command = cluster.training()
    node = command.index(str(cluster.home / "slurm" / "torchrun_node.sh"))
    assert command[node - 2 : node] == ["--ntasks=2", "--ntasks-per-node=1"]
    assert command[node + 1 :] == [
        str(cluster.home / ".venv" / "bin" / "python"),
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
        *("--rdzv-backend=c10d", "--rdzv-id=77-4"),
        f"--rdzv-endpoint={'login:29500' if named else 'node-01:31957'}",
        *("-m", "soar_mega.train", "a.yaml", "checkpoint.resume=latest"),
    ]
    (call,) = cluster.calls("srun")
    assert call["environ"]["SRUN_CPUS_PER_TASK"] == "6", "the CPUs of all processes of a node"
    if not named:
        shown = next(c["arguments"] for c in cluster.calls("scontrol") if "show" in c["arguments"])
        assert shown == ["show", "hostnames", "node-[01-03,7]"]
