"""Job scripts as they are submitted: golden files, quoting, and what is checked before.

``python -m tests.unit.test_slurm_render`` writes the golden files anew; look at the difference.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soar_mega.launch.mounts import file_system_of, local_file_system
from soar_mega.launch.rendering import Job, render
from soar_mega.training.submission import Size, check_submission
from tests.runs import REPOSITORY, Tiny

GOLDEN = REPOSITORY / "tests" / "data" / "slurm"
TEMPLATE = (REPOSITORY / "slurm" / "train.sbatch").read_text()
# Nodes -> launcher, overrides.
GOLDEN_JOBS = {
    1: (None, []),
    2: ("torchrun", ["train.max_train_steps=500"]),
    17: (None, ["run.name=two words", "data.shards=['a b.tar', \"it's.tar\"]"]),
    128: (None, ["parallel.pipeline_model_parallel_size=4"]),
}
MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/export /shared nfs4 rw 0 0
/dev/sdb1 /shared/local\\040disk xfs rw 0 0
mds@tcp:/fs /lustre lustre rw 0 0
s3fs /bucket fuse.s3fs rw 0 0
"""


def golden(nodes: int) -> str:
    launcher, overrides = GOLDEN_JOBS[nodes]
    options = {
        "job-name": "sd35_medium_soar",
        "nodes": str(nodes),
        "signal": "USR1@600",
        "partition": "gpu",
    }
    settings = {"SIGNAL_LEAD_S": "600"} | ({"LAUNCHER": launcher} if launcher else {})
    arguments = ["configs/sd35_medium_soar.yaml", *overrides]
    return render(TEMPLATE, Job(Path("/shared/soar mega"), arguments, options, settings))


@pytest.mark.parametrize("nodes", GOLDEN_JOBS)
def test_slurm_golden_scripts(nodes: int) -> None:
    assert golden(nodes) == (GOLDEN / f"{nodes}_nodes.sbatch").read_text()


@given(st.lists(st.text(st.characters(exclude_characters="\n\0", codec="utf-8"), min_size=1)))
def test_slurm_arguments_arrive_as_they_were_given(arguments: list[str]) -> None:
    script = render(TEMPLATE, Job(Path("/home"), arguments, {}, {}))
    (line,) = (line for line in script.split("\n") if line.startswith("ARGUMENTS="))
    assert shlex.split(line[len("ARGUMENTS=(") : -1]) == arguments


def test_slurm_options_replace_and_are_added_before_the_first_command() -> None:
    job = Job(
        Path("/home"), ["a.yaml"], {"nodes": "3", "comment": "two words", "exclusive": ""}, {}
    )
    lines = render(TEMPLATE, job, ["one\ntwo"]).splitlines()
    shown = [line for line in lines if line.startswith("#SBATCH")]
    assert shown.count("#SBATCH --nodes=3") == 1 and "#SBATCH --nodes=1" not in shown
    assert shown[-2:] == ["#SBATCH --comment='two words'", "#SBATCH --exclusive"]
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(n < first for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert lines[first - 2 : first] == ["# check failed: one", "# check failed: two"]


def test_slurm_line_breaks_are_refused() -> None:
    with pytest.raises(ValueError, match="line break"):
        render(TEMPLATE, Job(Path("/home"), ["a\nb"], {}, {}))


def test_slurm_scripts_pass_shellcheck(tmp_path: Path) -> None:
    folder = REPOSITORY / "slurm"
    scripts = [*folder.glob("*.sh"), *folder.glob("*.sbatch")]
    assert len(scripts) >= 6
    for nodes in GOLDEN_JOBS:
        script = tmp_path / f"{nodes}.sbatch"
        script.write_text(golden(nodes))
        scripts.append(script)
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [program, "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("path", "kind", "shared"),
    [
        ("/shared/runs", "nfs4", True),
        ("/shared/local disk/runs", "xfs", False),
        ("/lustre", "lustre", True),
        ("/bucket/a", "fuse.s3fs", True),
        ("/nowhere/b", "ext4", False),
        ("/sharedness", "ext4", False),
    ],
)
def test_slurm_shared_storage_is_known(path: str, kind: str, shared: bool) -> None:
    assert file_system_of(Path(path), MOUNTS)[1] == kind
    assert (local_file_system(Path(path), MOUNTS) is None) == shared


def checked(tiny: Tiny, folder: Path, size: Size, *overrides: str) -> list[str]:
    path, *rest = tiny.arguments("soar", folder / "run", *overrides)
    return check_submission(path, rest, size, f"/dev/sda1 {os.path.realpath('/')} ext4 rw 0 0\n")


def test_slurm_checks_before_submitting(tiny: Tiny, tmp_path: Path) -> None:
    one = Size(1, 2, "H200", 300)
    assert checked(tiny, tmp_path, one) == []
    assert check_submission("/no/such.yaml", [], one, "")[0].startswith(
        "configuration /no/such.yaml"
    )
    (problem,) = checked(tiny, tmp_path, one, "parallel.tensor_model_parallel_size=4")
    assert "parallel.tensor_model_parallel_size" in problem
    (problem,) = checked(tiny, tmp_path, one, "data.shards=/no/such-*.tar")
    assert "no shard matches" in problem
    (problem,) = checked(tiny, tmp_path, Size(1, 2, "H200", 0))
    assert "--signal-lead" in problem
    problems = checked(tiny, tmp_path, Size(2, 1, "H200", 300))
    assert [p.split(" lies on ")[0] for p in problems] == [
        "run.dir",
        "data.shards",
        "model.pretrained",
    ]
    assert checked(tiny, tmp_path, Size(2, 1, "H200", 300, local_storage=True)) == []


def test_slurm_measured_steps_count(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = "".join(f'{{"step": {n}, "perf/step_time_s": 700.0}}\n' for n in range(1, 4))
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    (problem,) = checked(tiny, tmp_path, Size(1, 2, "H200", 300))
    assert "a step (measured) takes 700.0 s" in problem and "--signal-lead 1051" in problem


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for number in GOLDEN_JOBS:
        (GOLDEN / f"{number}_nodes.sbatch").write_text(golden(number))
