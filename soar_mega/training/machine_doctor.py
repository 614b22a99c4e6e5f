"""What is wrong with the machines of a job, and with what a configuration needs of them.

Every process of the job runs it (srun, torchrun, or one alone). They meet, rank 0 asks one
question after the other, all answer, and rank 0 tells what it found. Each wait has an end, so that
a job with a sick node ends with that node's name instead of hanging.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soar_mega.config import Config, ConfigError, dump_yaml, load_config
from soar_mega.launch.addresses import address_problem
from soar_mega.launch.bounded import bounded
from soar_mega.launch.environment import ProcessEnvironment, host_of, nodes_of
from soar_mega.launch.exit_codes import CONFIG_ERROR, FAILED
from soar_mega.launch.findings import Finding, exit_code, ranks_at, sick, spans
from soar_mega.launch.machine_facts import (
    Facts,
    gpu_findings,
    look,
    name_findings,
    version_findings,
)
from soar_mega.launch.roll_call import (
    LostRank0Error,
    MeetingError,
    RollCall,
    meet,
)
from soar_mega.launch.shared_storage import (
    Token,
    clock_findings,
    problem_of_token,
    token_findings,
    where_is,
)

Tell = Callable[[Finding], None]
# Seconds: for what takes none of its own, and beyond what a question allows until all have said so.
_LOOK_S, _STORAGE_S, _VISIBLE_S, _GRACE_S = 120.0, 120.0, 30.0, 15.0
_QUIET_S = 30.0  # a process that lives gives a sign every BEAT_S


def consult(
    settings: Sequence[str], environ: Mapping[str, str], *, limit_s: float, tell: Tell
) -> int:
    """Look at the machines of this job; every process of it calls it.

    Args:
        settings: Configuration file and overrides, or nothing.
        environ: The launcher's variables.
        limit_s: Longest wait for all processes to come, and for an all-reduce.
        tell: Gets each finding, on rank 0 and on ranks that cannot reach it.

    Returns:
        Exit code, the same for all who could talk: 0, 78 for a problem of configuration, data or
        model, 1 for problems of machines.
    """
    try:
        process = ProcessEnvironment.read(environ)
    except ConfigError as error:
        tell(Finding("PROBLEM", f"launcher: {error}", cause="input"))
        return CONFIG_ERROR
    host = host_of(environ)
    try:
        roll = meet(process, environ, limit_s)
        began = time.monotonic()
        return _Visit(settings, environ, process, host, roll, limit_s, began, tell).run()
    except MeetingError as error:
        tell(error.finding)
    except LostRank0Error as error:
        where = f"{process.master_address}:{process.master_port}"
        text = f"roll call: rank {process.rank} on {host} lost rank 0 at {where}; {error}"
        tell(Finding("PROBLEM", text, "see what rank 0 says, or that it is gone"))
    return FAILED


class _Visit:
    """The questions of one visit, in order; each method of a question is called by all ranks."""

    def __init__(
        self,
        settings: Sequence[str],
        environ: Mapping[str, str],
        process: ProcessEnvironment,
        host: str,
        roll: RollCall,
        limit_s: float,
        began: float,
        tell: Tell,
    ) -> None:
        self._settings, self._environ, self._process = settings, environ, process
        self._roll, self._limit_s, self._began, self._tell = roll, limit_s, began, tell
        self._first = process.rank == 0
        self._hosts = [host]
        self._told: list[Finding] = []
        self._patience = limit_s  # how long rank 0 may take until it says the next thing
        self._config: Config | None = None
        self._facts: Facts | None = None
        self._token: Token | None = None

    def run(self) -> int:
        """Exit code."""
        if self._meet():
            self._machines()
            for over in self._agreed("all-reduce", self._reduces_over()) or []:
                self._all_reduce(over)
            if self._agreed("configuration", self._config is not None):
                try:
                    self._storage()
                    self._data()
                finally:
                    if self._token is not None:
                        with suppress(TimeoutError):
                            bounded(self._token.remove, _GRACE_S)
        code = exit_code(self._told) if self._first else None
        return self._roll.part(code, self._patience + _GRACE_S)

    def _say(self, *findings: Finding) -> None:
        for finding in findings:
            self._told.append(finding)
            self._tell(finding)

    def _agreed(self, topic: str, value: Any) -> Any:
        """Rank 0's value on all ranks."""
        value = self._roll.share(f"rank 0's {topic}", value, self._patience + _GRACE_S)
        self._patience = _GRACE_S
        return value

    def _ask(self, topic: str, work: Callable[[], Any], seconds: float) -> dict[int, Any]:
        """What ``work`` returns on each rank, on rank 0; who fails or says nothing is told."""
        deadline = time.monotonic() + seconds + _GRACE_S
        try:
            answer = {"value": bounded(work, seconds, self._roll.beat)}
        except LostRank0Error:
            raise
        except Exception as error:  # whatever it is, it is what a doctor is here to tell
            answer = {"error": f"{type(error).__name__}: {error}"}
        silent = set(self._roll.silent)
        answers = self._roll.collect(topic, answer, deadline, _QUIET_S)
        self._patience += seconds + 2 * _GRACE_S
        if not self._first:
            return {}
        if missing := self._roll.silent - silent:
            self._say(
                Finding(
                    "PROBLEM",
                    f"{topic}: no answer, nor a sign of life, from "
                    f"{ranks_at(missing, self._hosts)}",
                    "see what these processes say, if they are not gone; leave out a node that "
                    "hangs (sbatch --exclude)",
                )
            )
        failed: dict[str, list[int]] = {}
        for rank, given in answers.items():
            if "error" in given:
                failed.setdefault(given["error"], []).append(rank)
        for words, ranks in failed.items():
            text = f"{topic}: {ranks_at(ranks, self._hosts)}: {words}"
            self._say(Finding("PROBLEM", text, _FIXES.get(topic)))
        return {rank: given["value"] for rank, given in answers.items() if "value" in given}

    def _meet(self) -> bool:
        """Whether all came."""
        size, here = self._process.world_size, self._hosts[0]
        answers = self._roll.collect("roll call", here, self._began + self._limit_s)
        missing = spans(self._roll.silent)
        self._hosts = [answers.get(rank, "") for rank in range(size)]
        reply = self._agreed("roll call", {"missing": missing, "time": time.time()})
        ahead_s = time.time() - reply["time"]
        if self._first and size > 1:
            self._tell_of_roll_call(answers, missing)
        if reply["missing"]:
            return False
        clocks = self._ask("clocks", lambda: ahead_s, _GRACE_S)
        if self._first:
            self._say(*clock_findings(clocks, self._hosts))
        return True

    def _tell_of_roll_call(self, answers: Mapping[int, str], missing: str) -> None:
        process, seconds = self._process, time.monotonic() - self._began
        hosts = list(dict.fromkeys(answers.values()))
        came = ranks_at(answers, self._hosts)
        if missing:
            nodes = nodes_of(self._environ)
            of = f" of {nodes}" if nodes else ""
            text = (
                f"roll call: {process.world_size - len(answers)} of {process.world_size} ranks did "
                f"not come within {self._limit_s:g} s: {missing}\nhere are {came}{of}"
            )
            if problem := address_problem(process.master_address):
                text += f"\n{problem}"
            self._say(
                Finding(
                    "PROBLEM",
                    text,
                    "see what the missing ones say: each that runs tells why it cannot reach "
                    f"{process.master_address}:{process.master_port}; one that says nothing never "
                    "started (leave its node out: sbatch --exclude)",
                )
            )
            return
        where = f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}"
        text = f"roll call: all {process.world_size} ranks on {where} in {seconds:.1f} s: {came}"
        self._say(Finding("ok", text))
        port, host = self._roll.port, self._hosts[0]
        if process.agent_store:
            self._say(Finding("ok", f"port: torchrun's agent has {port}"))
        elif port == process.master_port:
            self._say(Finding("ok", f"port: rank 0 listens on {port} of {host}"))
        else:
            taken = f"port: something on {host} has {process.master_port}; rank 0 took {port}"
            self._say(Finding("note", taken))

    def _machines(self) -> None:
        """Versions, names and GPUs; and whether all read the same configuration."""
        config_error = ""
        if self._settings:
            try:
                self._config = load_config(self._settings[0], self._settings[1:])
            except (ConfigError, OSError) as error:
                config_error = str(error)
        text = dump_yaml(self._config) if self._config is not None else config_error
        digest = hashlib.sha256(text.encode()).hexdigest()

        def examine() -> dict[str, Any]:
            self._facts = look(self._process)
            return {"facts": asdict(self._facts), "digest": digest, "refused": config_error}

        answers = self._ask("versions and GPUs", examine, _LOOK_S)
        if not answers:
            return
        facts = {rank: Facts.from_json(answer["facts"]) for rank, answer in answers.items()}
        config = self._config
        device = config.run.device if config is not None else "auto"
        self._say(
            *version_findings(facts, self._hosts, _needs(config)),
            *gpu_findings(facts, self._hosts, device),
            *(name_findings(facts, self._hosts) if _uses_gloo(config, facts) else ()),
        )
        refused = {rank: a["refused"] for rank, a in answers.items() if a["refused"]}
        self._say(*self._refusals("configuration", refused))
        digests = {rank: a["digest"] for rank, a in answers.items() if rank not in refused}
        others = [rank for rank, one in digests.items() if one != digest]
        if others and not refused:
            self._say(
                Finding(
                    "PROBLEM",
                    f"configuration: {ranks_at(others, self._hosts)} read another one than rank 0",
                    "start all processes with the same files and arguments",
                    cause="input",
                )
            )
        if others or refused:
            self._config = None  # what it needs differs from rank to rank
        elif config is not None:
            self._say(Finding("ok", f"configuration: {self._settings[0]} is valid"))

    def _reduces_over(self) -> list[str]:
        """What a run uses of NCCL and gloo; nothing where some rank could not take part."""
        gpus = [finding for finding in self._told if finding.text.startswith("GPUs: ")]
        if self._process.world_size == 1 or self._roll.silent or sick(gpus):
            return []
        on_cpu = self._config is not None and self._config.run.device == "cpu"
        if on_cpu or self._facts is None or not self._facts.gpus:
            return ["gloo"]
        return ["NCCL", "gloo"] if _uses_gloo(self._config, {0: self._facts}) else ["NCCL"]

    def _all_reduce(self, over: str) -> None:
        from soar_mega.launch.all_reduce import all_reduce, all_reduce_findings

        process, limit_s = self._process, self._limit_s
        gpu = self._facts.own_gpu if over == "NCCL" and self._facts is not None else None

        def reduce() -> dict[str, Any]:
            import torch.distributed as dist

            store = dist.PrefixStore(f"all-reduce over {over}", self._roll.connect())
            # Its own end, later than ours, would be an abort.
            return all_reduce(store, process.rank, process.world_size, gpu, 2 * limit_s)

        answers = self._ask(f"all-reduce over {over}", reduce, limit_s)
        if self._first and len(answers) == process.world_size:
            self._say(all_reduce_findings(answers, self._hosts, over))

    def _storage(self) -> None:
        """Whether the run folder is one for all, fast, and has room."""
        assert self._config is not None
        folder, offer = Path(self._config.run.dir), None
        if self._first:
            try:
                self._token = bounded(lambda: Token(folder), _STORAGE_S)
                offer = {"name": self._token.name, "value": self._token.value}
            except (OSError, TimeoutError) as error:
                text = f"storage: run.dir = {folder} cannot be written: {error}"
                fix = "name a folder that you may write to, or mend its file system"
                self._say(Finding("PROBLEM", text, fix, cause="input"))
        self._patience += _STORAGE_S
        offer = self._agreed("token", offer)
        if offer is None:
            return

        def find() -> str | None:
            return problem_of_token(folder, offer["name"], offer["value"], _VISIBLE_S)

        seen = self._ask("storage", find, _VISIBLE_S + _GRACE_S)
        self._patience += 2 * _STORAGE_S
        if self._token is None:
            return
        try:
            place = bounded(lambda: where_is(folder), _STORAGE_S)
            self._say(token_findings(seen, self._hosts, str(folder), place))
            speed = bounded(self._token.write_speed, _STORAGE_S)
            text = f"storage: rank 0 writes {speed / 1e6:,.0f} MB/s to run.dir"
            self._say(Finding("note", text))
        except (OSError, TimeoutError) as error:
            text = f"storage: run.dir = {folder}: 64 MiB cannot be written: {error}"
            fix = "free space or quota, or mend the file system"
            self._say(Finding("PROBLEM", text, fix, cause="input"))

    def _data(self) -> None:
        """What a start would refuse, on every rank; and whether samples can be read."""
        assert self._config is not None
        config, process = self._config, self._process
        from soar_mega.training.doctor_data import data_findings, examine_data, room_findings

        # A run that takes longer for it is ended by its watchdog.
        seconds = config.watchdog.start_minutes * 60
        answers = self._ask("data and model", lambda: examine_data(config, process), seconds)
        if not answers:
            return
        refused = {rank: a["refused"] for rank, a in answers.items() if a["refused"]}
        self._say(*self._refusals("data and model", refused))
        read = {rank: a for rank, a in answers.items() if not a["refused"]}
        if read:
            self._say(*data_findings(read, self._hosts))
        if 0 in read and self._token is not None:
            try:
                room = bounded(lambda: list(room_findings(config, read)), _STORAGE_S)
                self._say(*room)
            except (OSError, TimeoutError) as error:
                text = f"storage: run.dir = {config.run.dir}: {error}"
                self._say(Finding("PROBLEM", text, "mend its file system", cause="input"))

    def _refusals(self, topic: str, refused: Mapping[int, str]) -> list[Finding]:
        """One finding for each message; where only some nodes refuse, others may be better."""
        ranks_of: dict[str, list[int]] = {}
        for rank, words in refused.items():
            ranks_of.setdefault(words, []).append(rank)
        healthy = {host for rank, host in enumerate(self._hosts) if rank not in refused}
        sick_hosts = {self._hosts[rank] for rank in refused}
        nodes_alone = bool(healthy) and not healthy & sick_hosts
        found = []
        for words, ranks in ranks_of.items():
            everywhere = len(ranks) == self._process.world_size
            where = "" if everywhere else f" on {ranks_at(ranks, self._hosts)}"
            text, fix = f"{topic}{where}: {words}", None  # the words have it
            if nodes_alone:
                fix = "give these nodes what the others have, or leave them out (sbatch --exclude)"
            found.append(Finding("PROBLEM", text, fix, cause="machine" if nodes_alone else "input"))
        return found


_FIXES = {
    "all-reduce over NCCL": "look for what it says with NCCL_DEBUG=INFO; set NCCL_SOCKET_IFNAME to "
    "the network between the nodes (slurm/cluster.env), and let all ports through between them",
    "all-reduce over gloo": "set GLOO_SOCKET_IFNAME to the network between the nodes "
    "(slurm/cluster.env), and let all ports through between them",
}


def _uses_gloo(config: Config | None, facts: Mapping[int, Facts]) -> bool:
    """On CPUs, and where saves go on in the background."""
    on_cpu = not any(one.gpus for one in facts.values())
    if config is None:
        return True
    return on_cpu or config.run.device == "cpu" or config.checkpoint.async_save


def _needs(config: Config | None) -> dict[str, str]:
    """Import name of an optional package -> the setting that asks for it."""
    from soar_mega.training.optimizer import package_of
    from soar_mega.training.precision import PACKAGE

    needs: dict[str, str] = {}
    if config is None:
        return needs
    if config.data.decoder == "dali":
        needs["nvidia.dali"] = "data.decoder = dali"
    if (package := package_of(config.optimizer)) is not None:
        needs[package] = f"optimizer.name = {config.optimizer.name}"
    if config.precision.backend == "te":
        needs[PACKAGE] = "precision.backend = te"
    if config.logging.wandb_project is not None:
        needs["wandb"] = f"logging.wandb_project = {config.logging.wandb_project}"
    return needs
