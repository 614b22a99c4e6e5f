"""Models of the Hugging Face hub: ``owner/name@COMMIT`` becomes a local folder.

A model is named with its commit, never with a branch: a branch may move between two processes of
one run and between a run and its restart. One process of a machine downloads, the others wait for a
file lock and find the files in the cache (``HF_HOME``). Several machines may share one cache.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")

_WITH_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_SMALL = (
    "model_index.json",
    "scheduler/*",
    "tokenizer*/*",
    *(f"{p}/*.json" for p in _WITH_WEIGHTS),
)
_WEIGHTS = tuple(f"{part}/*.safetensors" for part in _WITH_WEIGHTS)
_LEFT_OUT = "*.fp16*"  # halves that lie beside the whole weights
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


class HubError(ValueError):
    """A model of the hub cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class _Wanted:
    """What is downloaded of a repository, and when it is whole.

    Attributes:
        patterns: File names to download, shell-style.
        missing: What a folder lacks.
        hint: What to name instead of a commit that lacks something.
        options: Those of ``hf download`` that leave out the rest.
    """

    patterns: Sequence[str]
    missing: Callable[[Path], Iterator[str]]
    hint: str
    options: str


def parse(source: str | Path) -> tuple[str, str] | None:
    """Name and commit of ``owner/name@COMMIT``; None: ``source`` is something else."""
    name, at, commit = str(source).rpartition("@")
    if at and HUB_NAME.fullmatch(name) and COMMIT.fullmatch(commit):
        return name, commit
    return None


def recorded(source: str | Path) -> str:
    """How a checkpoint names a model: ``owner/name@COMMIT``, or the folder's absolute path."""
    return str(source) if parse(source) else str(Path(source).resolve())


def resolve(source: str | Path, *, setting: str, weights: bool = True) -> Path:
    """The folder of a model, downloaded if it has to be.

    Args:
        source: A local folder, or ``owner/name@COMMIT`` of a diffusers SD3 pipeline.
        setting: Who names it, for messages.
        weights: False: configurations and tokenizers alone will do.

    Returns:
        The folder. That a local one exists is for its reader to find out.

    Raises:
        HubError: A hub model without commit, one that the cache does not hold while offline, or
            what the hub answered.
    """
    return _resolve(source, setting, _pipeline(weights))


def resolve_files(
    source: str | Path, *, setting: str, needs: Sequence[str], fetch: Sequence[str]
) -> Path:
    """The folder of a model of any kind, downloaded if it has to be.

    Args:
        source: A local folder, or ``owner/name@COMMIT``.
        setting: Who names it, for messages.
        needs: Shell-style patterns, each of which must match a file at the top of the repository.
        fetch: Patterns of what is downloaded.

    Returns:
        The folder. That a local one exists and is whole is for its reader to find out.

    Raises:
        HubError: As ``resolve``.
    """

    def missing(folder: Path) -> Iterator[str]:
        yield from (pattern for pattern in needs if not any(folder.glob(pattern)))

    wanted = _Wanted(
        patterns=fetch,
        missing=missing,
        hint=f"this commit lacks some of {', '.join(needs)}. Name one that has all of them",
        options=" ".join(f"--include '{pattern}'" for pattern in fetch),
    )
    return _resolve(source, setting, wanted)


def _resolve(source: str | Path, setting: str, wanted: _Wanted) -> Path:
    found = parse(source)
    if found is None:
        path = Path(source).expanduser()
        if HUB_NAME.fullmatch(str(source)) and not path.exists():
            fix = "set model.revision to it" if setting == "model.pretrained" else "add @COMMIT"
            raise HubError(
                f"{setting} = {str(source)!r}: no such folder (working directory {Path.cwd()}). If "
                f"a model of the Hugging Face hub is meant, its commit is missing: {fix}, the 40 "
                f"hex digits that https://huggingface.co/{source}/commits/main shows. A branch "
                "will not do: it may move between processes and between restarts"
            )
        return path
    name, commit = found
    if Path(name).exists():
        raise HubError(
            f"{setting} = {name!r} is a folder here (working directory {Path.cwd()}), but the "
            f"commit {commit} of a model of that name on the hub is asked for, too: leave the "
            "commit out, or start from a directory without such a folder"
        )
    try:
        return _cached(name, commit, wanted) or _download(name, commit, wanted)
    except HubError as error:
        raise HubError(f"{setting} = {name!r} (commit {commit}): {error}") from error


def cached(source: str | Path, *, weights: bool = True) -> Path | None:
    """The folder of ``source`` if all of it is on this machine already; asks no server."""
    found = parse(source)
    if found is None:
        path = Path(source).expanduser()
        return path if path.is_dir() else None
    return _cached(*found, _pipeline(weights))


def _cached(name: str, commit: str, wanted: _Wanted) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=commit,
                allow_patterns=list(wanted.patterns),
                ignore_patterns=_LEFT_OUT,
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None
    # Older versions of the library return a half-filled folder, too.
    return None if list(wanted.missing(folder)) else folder


def _pipeline(weights: bool) -> _Wanted:
    return _Wanted(
        patterns=[*_SMALL, *(_WEIGHTS if weights else ())],
        missing=lambda folder: _missing(folder, weights),
        hint=(
            "this commit holds no whole diffusers SD3 pipeline. Name one with model_index.json and "
            "safetensors weights of every part"
        ),
        options=f"--exclude '{_LEFT_OUT}'",
    )


def _missing(folder: Path, weights: bool) -> Iterator[str]:
    """Files that a pipeline's own indices name and the folder has not."""
    index = folder / "model_index.json"
    if not index.is_file():
        yield index.name
        return
    for part, entry in json.loads(index.read_text()).items():
        if not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        if part.startswith("tokenizer"):
            kinds = [all((folder / part / file).is_file() for file in kind) for kind in _TOKENIZERS]
            if not any(kinds):
                yield part
        elif part in _WITH_WEIGHTS:
            if not (folder / part / "config.json").is_file():
                yield f"{part}/config.json"
            yield from _missing_weights(folder / part) if weights else ()


def _missing_weights(folder: Path) -> Iterator[str]:
    indices = list(folder.glob("*.safetensors.index.json"))
    if not indices and not any(folder.glob("*.safetensors")):
        yield f"{folder.name}/*.safetensors"
    for index in indices:
        for file in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / file).is_file():
                yield f"{folder.name}/{file}"


def _download(name: str, commit: str, wanted: _Wanted) -> Path:
    """Of all processes that share a cache one downloads; the others get its files or its error."""
    from filelock import FileLock, Timeout
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"it is not in the cache {cache}, and HF_HUB_OFFLINE is set. On a machine with network "
            f"and the same cache run first\n{_command(name, commit, wanted)}"
        )
    locks = cache / ".locks" / f"models--{name.replace('/', '--')}"
    failure = locks / f"soar_mega-{commit}.failed"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock, waited = FileLock(locks / f"soar_mega-{commit}.lock"), False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            lock.acquire()
        try:
            folder = _cached(name, commit, wanted)
            if folder is not None:
                return folder
            if waited and failure.is_file():  # asking again would make a busy hub busier
                raise HubError(failure.read_text())
            failure.unlink(missing_ok=True)
            try:
                return _fetch(name, commit, wanted, cache)
            except HubError as error:
                failure.write_text(str(error))
                raise
        finally:
            lock.release()
    except OSError as error:
        raise HubError(f"the cache {cache} cannot be used: {error}. HF_HOME moves it") from error


def _fetch(name: str, commit: str, wanted: _Wanted, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    print(f"downloading {name}@{commit} to {cache}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        snapshot_download(
            name,
            revision=commit,
            allow_patterns=list(wanted.patterns),
            ignore_patterns=_LEFT_OUT,
        )
    except Exception as error:  # of the library, of the HTTP library below it, of the disk
        raise HubError(_explain(error, name, commit, wanted)) from error
    folder = _cached(name, commit, wanted)
    if folder is None:
        raise HubError(wanted.hint)
    return folder


def _command(name: str, commit: str, wanted: _Wanted) -> str:
    return f"  hf download {name} --revision {commit} {wanted.options}"


def _explain(error: Exception, name: str, commit: str, wanted: _Wanted) -> str:
    """What the hub's or the network's answer means for a person."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    log_in = "`hf auth login` on this machine, or the variable HF_TOKEN"
    causes = list(_causes(error))
    status = {getattr(getattr(c, "response", None), "status_code", None) for c in causes}
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"the model is gated. Accept its licence on {page} with your account, then give the "
            f"account's token: {log_in}"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"the model has no such commit. {page}/commits/main lists them: set model.revision"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            "the hub knows no such model, or it is private. Check the name; for a private one give "
            f"a token that may read it: {log_in}"
        )
    if 401 in status or 403 in status:
        return f"the hub refuses the token. Give another one: {log_in}"
    if 429 in status:
        return (
            "the hub answers 429, too many requests from this address or account. Wait some "
            f"minutes and start again, with a token ({log_in}) if there was none; with many "
            "machines let HF_HOME be on storage they share, or download once with\n"
            f"{_command(name, commit, wanted)}\nand start with HF_HUB_OFFLINE=1"
        )
    first = next((c for c in causes if isinstance(c, OSError) and c.errno is not None), None)
    if first is not None and first.filename is not None:
        return f"the cache cannot be written: {first}. HF_HOME moves it"
    return (
        f"the download failed ({_plain(causes[-1])}). What was downloaded stays in the cache: "
        "start again when the network is back, or on a machine with network and the same cache "
        "run\n"
        f"{_command(name, commit, wanted)}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _plain(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_***", text)[:300]
