"""How processes find rank 0 when its port is taken, by whatever it is."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.rendezvous import RendezvousError, open_store
from tests.ports import free_ports

LIMIT, SOON = timedelta(seconds=30), timedelta(seconds=0.5)


def place(rank: int, ports: list[int], job: str = "job 7") -> ProcessEnvironment:
    return ProcessEnvironment(
        rank, 3, rank, 3, "127.0.0.1", ports[0], "slurm", tuple(ports[1:]), job
    )


def all_three(ports: list[int]) -> list[TCPStore]:
    """The stores of three ranks, of which the first comes last."""
    stores: dict[int, TCPStore] = {}

    def join(rank: int) -> None:
        stores[rank] = open_store(place(rank, ports), LIMIT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    join(0)
    for thread in threads:
        thread.join()
    return [stores[rank] for rank in range(3)]


def assert_one_store(stores: list[TCPStore], port: int) -> None:
    stores[1].set("said", "by 1")
    assert all(store.get("said") == b"by 1" for store in stores)
    assert {store.port for store in stores} == {port}


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A service that takes connections and says nothing."""
    with socket.socket() as service:
        service.bind(("", 0))
        service.listen()
        yield service.getsockname()[1]


def test_the_derived_port_where_it_is_free() -> None:
    ports = free_ports(2)
    assert_one_store(all_three(ports), ports[0])


def test_a_port_that_some_service_has(silent_port: int) -> None:
    spare = free_ports(1)
    assert_one_store(all_three([silent_port, *spare]), spare[0])


def test_a_port_that_another_run_has() -> None:
    first, spare = free_ports(2)
    other = open_store(place(0, [first], "job 8"), LIMIT)
    stores = all_three([first, spare])
    assert_one_store(stores, spare)
    assert not other.check(["said"])


def test_no_port_is_free(silent_port: int) -> None:
    with pytest.raises(RendezvousError, match=rf"cannot listen on {silent_port} of its host"):
        open_store(place(0, [silent_port]), LIMIT)


def test_rank_0_that_does_not_come() -> None:
    (port,) = free_ports(1)
    with pytest.raises(RendezvousError, match=rf"process 2 .* 127.0.0.1 \({port}: .*refused"):
        open_store(place(2, [port]), SOON)


def test_only_another_run_is_there() -> None:
    (port,) = free_ports(1)
    other = open_store(place(0, [port], "job 8"), LIMIT)
    with pytest.raises(RendezvousError, match=r"the store of another run \(job 8\)"):
        open_store(place(1, [port]), SOON)
    assert other.check(["soar_mega/owner"])
