"""What tools/doctor.py says of machines, told facts that real ones do not show here."""

from __future__ import annotations

import errno
import shutil
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from soar_mega.install import requirements
from soar_mega.install.requirements import version_range
from soar_mega.launch import machine_facts
from soar_mega.launch.addresses import address_problem, unreachable
from soar_mega.launch.all_reduce import all_reduce_findings, bandwidth
from soar_mega.launch.bounded import BEAT_S, bounded
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.findings import Finding, exit_code, ranks_at, spans
from soar_mega.launch.machine_facts import (
    Facts,
    Gpu,
    gpu_findings,
    look,
    name_findings,
    version_findings,
)
from soar_mega.launch.roll_call import LostRank0Error, RollCall
from soar_mega.launch.shared_storage import (
    Token,
    clock_findings,
    problem_of_token,
    token_findings,
)
from soar_mega.training.doctor_data import data_findings, room_findings
from tests.runs import Tiny
from tools import doctor

HOSTS = ["a", "a", "b", "b"]
GIB = 2**30
VERSIONS = {"torch": "2.11.0", "diffusers": "1", "transformers": "2", "webdataset": "3"}
PLAIN = Facts(
    0, {"Python": "3.11.7", "CUDA": "13.0", **VERSIONS}, [], False, [], None, None, [], ""
)


def everyone(**changes: object) -> dict[int, Facts]:
    """Four ranks alike but for their GPU."""
    return {rank: replace(PLAIN, local_rank=rank % 2, **changes) for rank in range(4)}


def with_gpus() -> dict[int, Facts]:
    """Two of them on each of two hosts, one for each rank, of which it asked for free memory."""
    facts = everyone()
    for rank, one in facts.items():
        seen = [
            Gpu("H", f"{HOSTS[rank]}{n}", "9.0", 80 * GIB, 79 * GIB if n == rank % 2 else None)
            for n in range(2)
        ]
        facts[rank] = replace(one, gpus=seen, own_gpu=rank % 2)
    return facts


def problems(findings: Iterable[Finding]) -> list[Finding]:
    found = [finding for finding in findings if finding.level == "PROBLEM"]
    assert all(finding.fix for finding in found)
    return found


def said(findings: Iterable[Finding]) -> str:
    return "\n".join(map(str, findings))


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.11.0", True),
        ("2.11.0+cu130", True),
        ("2.11.0a0+a6c236b9fd.nv26.03.46836102", True),
        ("2.13.0a0+8145d630e8.nv26.06", True),
        ("2.10.0a0+b4e4ee81d3.nv25.12", False),
        ("2.14.0a0+4fdf77b940.nv26.8.63802676", False),
        ("2.14.0.dev20260901", False),
        ("2.9.1", False),
        ("of our own", False),
    ],
)
def test_nvidias_builds_of_torch_count_as_the_release_they_become(version: str, fits: bool) -> None:
    assert version_range("torch") == ">=2.11,<2.14"
    facts = everyone(versions={**PLAIN.versions, "torch": version})
    found = list(version_findings(facts, HOSTS, {}))
    assert not problems(found)
    assert (f"torch {version} is outside the >=2.11,<2.14" in said(found)) is not fits


def test_the_range_of_torch_is_ours_or_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package may have somebody else's pyproject.toml where a checkout has ours."""
    other = tmp_path / "pyproject.toml"
    monkeypatch.setattr(requirements, "PYPROJECT", other)
    asked = ["torch<2.20,>=2.12", "torch>=3; extra == 'gpu'"]
    monkeypatch.setattr(requirements.importlib.metadata, "requires", lambda name: asked)
    assert version_range("torch") == "<2.20,>=2.12"
    other.write_text('[project]\nname = "other"\ndependencies = ["torch>=1"]\n')
    assert version_range("torch") == "<2.20,>=2.12"
    assert version_range("numpy") is None


def test_two_builds_of_one_release_are_not_the_same_everywhere() -> None:
    facts = everyone()
    other = {**PLAIN.versions, "torch": "2.11.0a0+a6c236b9fd.nv26.03"}
    facts[3] = replace(facts[3], versions=other)
    (problem,) = problems(version_findings(facts, HOSTS, {}))
    assert (
        "torch is not the same everywhere" in problem.text and "nv26.03 on rank 3" in problem.text
    )


def test_ranks_in_words() -> None:
    assert spans([5, 0, 1, 2, 2]) == "0-2, 5"
    assert spans([]) == ""
    assert ranks_at([3], HOSTS) == "rank 3 on b"
    assert ranks_at([0, 1, 3], HOSTS) == "ranks 0-1 on a, 3 on b"
    assert ranks_at(range(20), list(map(str, range(20)))).endswith("and 12 more hosts")


def test_exit_codes() -> None:
    fine, noted = Finding("ok", "x"), Finding("note", "x")
    machine, given = Finding("PROBLEM", "x", "y"), Finding("PROBLEM", "x", "y", cause="input")
    assert exit_code([fine, noted]) == 0
    assert exit_code([fine, machine]) == 1
    assert exit_code([given, machine]) == 78


def test_versions_that_agree() -> None:
    text = said(version_findings(everyone(), HOSTS, {}))
    assert "torch 2.11.0" in text and "the same on all 4 ranks" in text
    assert "PROBLEM" not in text


def test_a_version_that_differs_is_named_with_its_ranks() -> None:
    facts = everyone()
    facts[3] = replace(PLAIN, versions=PLAIN.versions | {"torch": "2.12.0"})
    (found,) = problems(version_findings(facts, HOSTS, {}))
    assert "torch is not the same" in found.text
    assert "2.11.0 on ranks 0-1 on a, 2 on b; 2.12.0 on rank 3 on b" in found.text
    assert found.cause == "machine"


def test_a_package_that_is_needed_and_not_there() -> None:
    (found,) = problems(version_findings(everyone(versions={"torch": "2"}), HOSTS, {}))
    assert "not installed: diffusers, transformers, webdataset" in found.text


def test_optional_packages() -> None:
    text = said(version_findings(everyone(optional=["wandb"]), HOSTS, {"wandb": "logging.x = y"}))
    assert "optional packages: wandb\n" in text
    assert "not installed: Transformer Engine, apex, DALI" in text
    needs = {"nvidia.dali": "data.decoder = dali"}
    (found,) = problems(version_findings(everyone(), HOSTS, needs))
    assert found.text.startswith("versions: data.decoder = dali needs DALI")
    assert found.cause == "input"
    facts = everyone() | {0: replace(PLAIN, optional=["nvidia.dali"])}
    (found,) = problems(version_findings(facts, HOSTS, needs))
    assert "not installed on ranks 1 on a, 2-3 on b" in found.text
    assert found.cause == "machine"


def test_the_apex_of_pypi_is_not_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apex = tmp_path / "apex"
    apex.mkdir()
    (apex / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine_facts, "git_state", lambda _: None)
    facts = look(ProcessEnvironment.read({}))
    assert facts.other_apex and "apex" not in facts.optional
    assert "FusedAdam" in said(version_findings({0: facts}, HOSTS, {}))
    assert problems(version_findings({0: facts}, HOSTS, {"apex": "optimizer = apex"}))
    (apex / "optimizers").mkdir()
    (apex / "optimizers" / "fused_adam.py").touch()
    facts = look(ProcessEnvironment.read({}))
    assert not facts.other_apex and "apex" in facts.optional


def test_gpus_that_are_well() -> None:
    text = said(gpu_findings(with_gpus(), HOSTS, "auto"))
    assert text == f"{'ok':<9}GPUs: 4 x H (compute capability 9.0, 80.0 GiB)"
    few = {rank: one for rank, one in with_gpus().items() if rank != 1}
    assert "a has 2 for rank 0 on a; the others stay idle" in said(gpu_findings(few, HOSTS, "auto"))
    mixed = with_gpus()
    gpus = [replace(gpu, name="A") for gpu in mixed[3].gpus]
    mixed[3] = replace(mixed[3], gpus=gpus)
    assert "3 x H (compute capability 9.0, 80.0 GiB), 1 x A" in said(
        gpu_findings(mixed, HOSTS, "auto")
    )


def test_no_gpu_anywhere() -> None:
    assert not problems(gpu_findings(everyone(), HOSTS, "auto"))
    assert not problems(gpu_findings(everyone(), HOSTS, "cpu"))
    (found,) = problems(gpu_findings(everyone(), HOSTS, "cuda"))
    assert found.cause == "machine"
    blind = everyone(versions={**PLAIN.versions, "CUDA": None})
    (found,) = problems(gpu_findings(blind, HOSTS, "cuda"))
    assert "built without CUDA" in found.text and found.cause == "input"


def test_gpus_that_are_not_enough_shared_busy_or_broken() -> None:
    facts = with_gpus()
    facts[3] = replace(facts[3], own_gpu=None)
    (found,) = problems(gpu_findings(facts, HOSTS, "auto"))
    assert "none left for rank 3 on b (2 seen by rank 3)" in found.text

    facts = with_gpus()
    facts[1] = replace(facts[1], gpus=facts[0].gpus[:1], own_gpu=0)
    (found,) = problems(gpu_findings(facts, HOSTS, "auto"))
    assert "ranks 0-1 on a have one and the same GPU" in found.text

    facts = with_gpus()
    facts[2] = replace(facts[2], gpus=[replace(facts[2].gpus[0], free=30 * GIB), facts[2].gpus[1]])
    (found,) = problems(gpu_findings(facts, HOSTS, "auto"))
    assert "rank 2 on b: others hold 50.0 of 80.0 GiB of GPU 0 (H)" in found.text

    facts = with_gpus() | {2: replace(PLAIN, gpu_error="uncorrectable ECC error")}
    text = said(problems(gpu_findings(facts, HOSTS, "auto")))
    assert "rank 2 on b: CUDA fails: uncorrectable ECC error" in text


def test_a_host_that_is_loopback_to_itself() -> None:
    """Debian's /etc/hosts: 127.0.1.1 and the host's own name."""
    facts = everyone(addresses=["10.0.0.1"])
    assert not list(name_findings(facts, HOSTS))
    for rank in (2, 3):
        facts[rank] = replace(PLAIN, addresses=["127.0.1.1"])
    (found,) = name_findings(facts, HOSTS)
    assert "resolves to 127.0.1.1 on b, and gloo" in found.text
    assert "GLOO_SOCKET_IFNAME" in found.text
    assert not list(name_findings(facts, ["b"] * 4)), "alone it does not matter"
    facts[2] = replace(facts[2], interface="ib0")
    assert not list(name_findings(facts, HOSTS))


PROCESS = ProcessEnvironment(3, 4, 1, 2, "gpu003", 15013, "slurm")


@pytest.mark.parametrize(
    ("addresses", "problem", "words", "fix"),
    [
        ([], socket.gaierror(-2, "Name or service not known"), "does not resolve", "DNS"),
        (["127.0.1.1"], OSError(errno.ECONNREFUSED, "refused"), "which is this node itself", "127"),
        (["10.0.0.3"], OSError(errno.ECONNREFUSED, "refused"), "nobody listens", "whether rank 0"),
        (["10.0.0.3"], TimeoutError("timed out"), "no answer (timed out)", "firewall"),
    ],
)
def test_why_rank_0_cannot_be_reached(
    addresses: list[str], problem: OSError, words: str, fix: str
) -> None:
    (found,) = problems([unreachable(PROCESS, "gpu004", addresses, problem)])
    assert "rank 3 on gpu004 cannot reach rank 0 at gpu003:15013" in found.text
    assert words in found.text
    assert found.fix is not None and fix in found.fix


def test_rank_0_knows_its_own_address() -> None:
    assert "leads every node to itself" in (address_problem("localhost") or "")
    assert "does not resolve" in (address_problem("no-such-host.invalid") or "")
    assert "another host" in (address_problem("192.0.2.1") or "")


def test_what_hangs_is_left_behind() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        bounded(lambda: time.sleep(5), 0.1)
    assert time.monotonic() - began < 3
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 / 0, 5)


def test_a_rank_that_says_nothing_is_waited_for_once() -> None:
    store = dist.HashStore()
    zero, one = (RollCall(lambda: store, rank, 2) for rank in range(2))
    assert one.collect("first", "here", 0) == {}
    began = time.monotonic()
    assert zero.collect("first", 5, began + 30) == {0: 5, 1: "here"}
    assert time.monotonic() < began + 10, "all have answered"
    assert zero.collect("second", 6, time.monotonic() + 30, quiet_s=0.1) == {0: 6}
    assert zero.silent == {1}
    assert time.monotonic() < began + 20, "no sign of life"
    assert zero.collect("third", 7, time.monotonic() + 600) == {0: 7}
    assert zero.share("x", [1], 1) == [1] == one.share("x", None, 1)
    with pytest.raises(LostRank0Error, match="never"):
        one.share("never", None, 0.1)


def test_a_rank_that_works_is_waited_for() -> None:
    store = dist.HashStore()
    zero, one = (RollCall(lambda: store, rank, 2) for rank in range(2))

    def slowly() -> None:
        bounded(lambda: time.sleep(5 * BEAT_S), 60, one.beat)
        one.collect("data", "there", 0)

    thread = threading.Thread(target=slowly)
    thread.start()
    answers = zero.collect("data", "here", time.monotonic() + 60, quiet_s=3 * BEAT_S)
    thread.join()
    assert answers == {0: "here", 1: "there"}


def test_a_wrong_sum_and_bandwidth() -> None:
    answers = {rank: {"wrong": False, "seconds": {"1048576": 0.001 * rank}} for rank in range(4)}
    found = all_reduce_findings(answers, HOSTS, "NCCL")
    assert found.level == "note" and "1 MiB in 3 ms (0.52 GB/s per rank)" in found.text
    assert bandwidth(10**9, 1.0, 2) == 1.0
    answers[2]["wrong"] = True
    assert (
        "the sum is wrong on rank 2 on b"
        in problems([all_reduce_findings(answers, HOSTS, "NCCL")])[0].text
    )


def test_a_token_on_storage(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    token = Token(folder)
    assert problem_of_token(folder, token.name, token.value, 1) is None
    assert "other content" in (problem_of_token(folder, token.name, "else", 0) or "")
    assert "is not there" in (problem_of_token(folder, "nothing", token.value, 0) or "")
    assert token.write_speed() > 0
    assert [path.name for path in folder.iterdir()] == [token.name]
    token.remove()
    assert not (tmp_path / "new").exists(), "the folders were made for it"
    folder.mkdir(parents=True)
    Token(folder).remove()
    assert folder.is_dir()


def test_storage_that_is_not_shared() -> None:
    seen: dict[int, str | None] = dict.fromkeys(range(4))
    shared, local = {"words": "nfs4 at /s", "local": False}, {"words": "ext4 at /", "local": True}
    assert "seen by all 4 ranks" in token_findings(seen, HOSTS, "/s/run", shared).text
    seen[2] = seen[3] = "/s/run/x is not there"
    (found,) = problems([token_findings(seen, HOSTS, "/s/run", shared)])
    assert "ranks 2-3 on b cannot see: /s/run/x is not there" in found.text
    assert found.cause == "machine", "not mounted there"
    (found,) = problems([token_findings(seen, HOSTS, "/s/run", local)])
    assert "which only a sees" in found.text
    assert found.cause == "input", "so it is on all other nodes"


def test_clocks() -> None:
    assert not list(clock_findings({0: 0.0, 1: 9.0}, ["a", "a"]))
    assert "all within 0.5 s" in said(clock_findings({0: 0.0, 3: -0.5}, HOSTS))
    text = said(clock_findings({0: 0.0, 3: -60.0}, HOSTS))
    assert "b -60.0 s" in text and "PROBLEM" not in text


GOOD = {"fingerprint": "f", "shards": 2, "samples": 9, "unread": None, "checkpoint": 1000}


def test_data_that_is_not_the_same_or_not_readable() -> None:
    answers: dict[int, dict[str, object]] = {rank: dict(GOOD) for rank in range(4)}
    assert "9 samples, shards: 2, the same on all 4 ranks" in said(data_findings(answers, HOSTS))
    answers[3]["fingerprint"] = "g"
    (found,) = problems(data_findings(answers, HOSTS))
    assert "rank 3 on b" in found.text and found.cause == "input"
    answers[3]["fingerprint"] = "f"
    answers[2]["unread"] = "x.tar: cannot be read"
    (found,) = problems(data_findings(answers, HOSTS))
    assert "on rank 2 on b: x.tar" in found.text and found.cause == "machine"
    answers[0]["unread"] = "x.tar: cannot be read"
    (found,) = problems(data_findings(answers, HOSTS))
    assert found.cause == "input"


def test_a_disk_without_room(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("sft", tmp_path, "checkpoint.checkpoints_total_limit=2")
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((3000, True), (2999, False)):  # two, and the third before one goes
        monkeypatch.setattr(shutil, "disk_usage", lambda _, f=free: usage._replace(free=f))
        found = problems(room_findings(config, {0: GOOD}))
        assert (not found) == enough
    assert "1 bytes are missing" in found[0].text and found[0].cause == "input"


@pytest.mark.parametrize(
    "arguments", [["a.yaml", "--quick"], ["runs/x", "a.b=1"], ["--limit", "0"]]
)
def test_arguments_that_do_not_go_together(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.main(arguments)
