"""tools/submit.py and the chain among fake Slurm commands; whose setting wins; no secrets."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.runs import REPOSITORY, Tiny
from tests.slurm_jobs import FakeCluster
from tools import submit

SECRETS = {"WANDB_API_KEY": "a1secret0wandb", "HF_TOKEN": "hf_secret0token"}


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    return FakeCluster(tmp_path)


def settings(cluster: FakeCluster, text: str) -> None:
    (cluster.home / "slurm" / "cluster.env").write_text(text)


def bash(cluster: FakeCluster, *command: str, **environ: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", *command],
        cwd=cluster.work,
        env=cluster.environ | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


# --- whose setting wins --------------------------------------------------------------------------


def test_slurm_environment_wins_over_cluster_env_and_that_over_the_example(
    cluster: FakeCluster,
) -> None:
    # A copy from before there was a MAX_REQUEUES, among others.
    settings(cluster, ': "${LOG_DIR:=of the file}"\n: "${SIGNAL_LEAD_S:=120}"\n')
    code, log = cluster.job("a.yaml", LOG_DIR="of the environment")
    assert code == 0, log
    assert (cluster.work / "of the environment" / "soar-77" / "rank-0.log").is_file()
    assert not (cluster.work / "of the file").exists()
    assert cluster.run()["environ"]["SOAR_MEGA_SIGNAL_LEAD_S"] == "120"
    other = cluster.fakes / "other.env"
    other.write_text("export NCCL_SOCKET_IFNAME=ib0\n")
    assert cluster.job("a.yaml", CLUSTER_ENV=str(other))[0] == 0
    run = cluster.run()["environ"]
    assert (run["NCCL_SOCKET_IFNAME"], run["SOAR_MEGA_SIGNAL_LEAD_S"]) == ("ib0", "300")


def test_slurm_plain_sbatch_has_the_partition_as_the_example_says(cluster: FakeCluster) -> None:
    example = (cluster.home / "slurm" / "cluster.env.example").read_text()
    (line,) = (text for text in example.splitlines() if text.startswith("#   set -a; source"))
    commented = '# : "${SBATCH_PARTITION:=gpu}"'
    assert commented in example
    settings(cluster, example.replace(commented, commented.removeprefix("# ")))
    command = f'cd "$SOAR_MEGA_HOME" && {line.removeprefix("#")}; sbatch slurm/train.sbatch'
    code, log = bash(cluster, "-c", command)
    assert code == 0, log
    (call,) = cluster.calls("sbatch")
    found = {name: value for name, value in call["environ"].items() if name.startswith("SBATCH_")}
    assert found == {"SBATCH_PARTITION": "gpu"}


@pytest.fixture
def submitting(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """The fake cluster is what tools/submit.py sees."""
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)
    file = cluster.fakes / "cluster.env"
    file.write_text(
        ': "${SBATCH_PARTITION:=of-the-file}"\n: "${SBATCH_ACCOUNT:=project}"\nSBATCH_QOS=\n'
    )
    for name, value in {"CLUSTER_ENV": str(file), **cluster.environ}.items():
        monkeypatch.setenv(name, value)
    return cluster


def submitted(cluster: FakeCluster, tiny: Tiny, *options: str) -> int:
    arguments = tiny.arguments("soar", cluster.work / "run")
    return submit.main([*arguments, "--nodes", "1", "--gpus-per-node", "2", *options])


def test_slurm_submit_takes_the_partition_of_cluster_env(
    submitting: FakeCluster,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    assert submitted(submitting, tiny) == 0
    (call,) = submitting.calls("sbatch")
    found = {name: value for name, value in call["environ"].items() if name.startswith("SBATCH_")}
    assert found == {"SBATCH_PARTITION": "of-the-file", "SBATCH_ACCOUNT": "mine"}
    assert "LAUNCHER" not in call["environ"], "the job reads cluster.env itself, when it starts"
    capfd.readouterr()
    assert submitted(submitting, tiny, "--dry-run") == 0
    assert call["stdin"] == capfd.readouterr().out


def test_slurm_options_of_submit_win_over_cluster_env(submitting: FakeCluster, tiny: Tiny) -> None:
    more = ["--sbatch", "partition=mine", "--sbatch=--exclusive", "--sbatch", "comment=two words"]
    assert submitted(submitting, tiny, *more, "--signal-lead", "600") == 0
    (call,) = submitting.calls("sbatch")
    # SBATCH_PARTITION wins over a script's #SBATCH, but not over sbatch's command line.
    expected = {"--partition=mine", "--exclusive", "--comment=two words", "--signal=USR1@600"}
    assert expected | {"--nodes=1", "--gpus-per-node=2"} <= set(call["arguments"])


def test_slurm_submit_tells_sbatchs_refusal(
    submitting: FakeCluster,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_SBATCH_FAILS_AT", "1")
    assert submitted(submitting, tiny) == 1
    assert "invalid partition" in capfd.readouterr().err
    monkeypatch.setenv("CLUSTER_ENV", "/no/cluster.env")
    assert submitted(submitting, tiny) == 78
    assert "CLUSTER_ENV = /no/cluster.env" in capfd.readouterr().err
    assert len(submitting.calls("sbatch")) == 1


# --- secrets -------------------------------------------------------------------------------------


def test_slurm_secrets_are_in_no_script_log_or_command_line(
    submitting: FakeCluster,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    submitting.environ |= SECRETS
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert submitted(submitting, tiny) == 0
    (call,) = submitting.calls("sbatch")
    script = submitting.fakes / "rendered"
    script.write_text(call["stdin"])
    outputs = ["".join(capfd.readouterr()), call["stdin"]]
    for launcher in ("srun", "torchrun"):
        submitting.program(submitting.home / "slurm" / "torchrun_node.sh", "exit 0")
        code, log = submitting.job(
            "a.yaml", LAUNCHER=launcher, MASTER_ADDR="n1", FAKE_REQUEUE="refuse"
        )
        assert code == {"srun": 0, "torchrun": 1}[launcher]
        outputs.append(log)
    assert submitting.run()["environ"] | SECRETS == submitting.run()["environ"], "the run has them"
    outputs += [path.read_text() for path in (submitting.work / "logs").rglob("*.log")]
    programs = ("sbatch", "srun", "scontrol")
    outputs += [" ".join(call["arguments"]) for p in programs for call in submitting.calls(p)]
    assert len(outputs) >= 8
    assert not [text for text in outputs for secret in SECRETS.values() if secret in text]


# --- the chain -----------------------------------------------------------------------------------

CHAIN = "slurm/pretrain_to_soar.sh"


@pytest.fixture
def chain(cluster: FakeCluster) -> FakeCluster:
    """With configurations that inherit their run.dir."""
    tiny = REPOSITORY / "configs" / "tiny_soar.yaml"
    (cluster.work / "base.yaml").write_text(
        f"base: {tiny}\nrun: {{name: a, dir: 'runs/my: ''first'' # run'}}\n"
    )
    (cluster.work / "pre train.yaml").write_text("base: base.yaml\nrun: {name: b}\n")
    (cluster.work / "soar.yaml").write_text(
        f'base: {tiny}\nrun: {{dir: "runs/\\"two\\"  words"}}\n'
    )
    del cluster.environ["SOAR_MEGA_HOME"]  # the script knows where it is
    return cluster


def submit_chain(cluster: FakeCluster, *options: str, **environ: str) -> tuple[int, str]:
    arguments = ["pre train.yaml", "soar.yaml", "my export", *options]
    return bash(cluster, str(cluster.home / CHAIN), *arguments, **environ)


@pytest.mark.parametrize("federation", ["", ";north"])
def test_slurm_chain_is_three_jobs_that_wait_for_each_other(
    chain: FakeCluster, federation: str
) -> None:
    settings(chain, ': "${SBATCH_PARTITION:=gpu}"\n')
    code, log = submit_chain(chain, "--nodes=2", "--comment=a b", FAKE_CLUSTER=federation)
    assert code == 0, log
    assert log == "pretraining 100 -> SOAR 101 -> export 102 to my export\n"
    pretrain_dir, soar_dir = "runs/my: 'first' # run", 'runs/"two"  words'
    train, after = str(chain.home / "slurm" / "train.sbatch"), "--dependency=afterok:"
    chained = ["--parsable", "--kill-on-invalid-dep=yes"]
    options = ["--nodes=2", "--comment=a b"]
    soar = [f"run.dir={soar_dir}", f"model.init_from={pretrain_dir}"]
    convert = str(chain.home / "slurm" / "convert.sbatch")
    assert [call["arguments"] for call in chain.calls("sbatch")] == [
        ["--parsable", *options, train, "pre train.yaml", f"run.dir={pretrain_dir}"],
        [*chained, f"{after}100", *options, train, "soar.yaml", *soar],
        [*chained, f"{after}101", convert, soar_dir, "my export"],
    ]
    for call in chain.calls("sbatch"):
        assert call["environ"]["SOAR_MEGA_HOME"] == str(chain.home)
        assert call["environ"]["SBATCH_PARTITION"] == "gpu"


def test_slurm_chain_takes_folders_that_are_given(chain: FakeCluster) -> None:
    # As where Python is only in a container.
    environ = {"RUNTIME": "pyxis", "CONTAINER_IMAGE": "image"}
    code, log = submit_chain(chain, **environ, PRETRAIN_DIR="p q", SOAR_DIR="s")
    assert code == 0, log
    second = chain.calls("sbatch")[1]["arguments"]
    assert second[-2:] == ["run.dir=s", "model.init_from=p q"]
    code, log = submit_chain(chain, **environ, PRETRAIN_DIR="p q")
    assert code == 78 and "set PRETRAIN_DIR and SOAR_DIR" in log
    assert len(chain.calls("sbatch")) == 3


@pytest.mark.parametrize(
    ("fails", "stand"), [(1, None), (2, "scancel 100\n"), (3, "scancel 100 101\n")]
)
def test_slurm_chain_that_breaks_says_what_stands(
    chain: FakeCluster, fails: int, stand: str | None
) -> None:
    code, log = submit_chain(chain, FAKE_SBATCH_FAILS_AT=str(fails))
    assert code == 1 and "invalid partition" in log and "sbatch refused the" in log
    assert log.endswith(stand) if stand else "scancel" not in log
    assert len(chain.calls("sbatch")) == fails


def test_slurm_chain_with_a_broken_configuration_submits_nothing(chain: FakeCluster) -> None:
    (chain.work / "soar.yaml").write_text("run: {no_such: 1}\n")
    code, log = submit_chain(chain)
    assert code == 78 and "no_such" in log and chain.calls("sbatch") == []
    assert bash(chain, str(chain.home / CHAIN), "a.yaml")[0] == 78
