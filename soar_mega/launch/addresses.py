"""Names, addresses and ports at which processes meet, and what is wrong with them."""

from __future__ import annotations

import errno
import ipaddress
import socket

from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.findings import Finding


def resolve(name: str) -> list[str]:
    """Addresses of a host.

    Raises:
        OSError: The name does not resolve.
    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def only_loopback(addresses: list[str]) -> bool:
    """Whether a name leads every machine that resolves it so to itself."""
    return bool(addresses) and all(
        ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses
    )


def address_problem(name: str) -> str | None:
    """What is wrong with rank 0's address, as rank 0 itself sees it; None: nothing.

    Args:
        name: ``master_address``.
    """
    try:
        addresses = resolve(name)
    except OSError as error:
        return f"{name} does not resolve on rank 0's host ({error.strerror or error})"
    shown = name if addresses == [name] else f"{name} ({', '.join(addresses)})"
    if only_loopback(addresses):
        return f"{shown} leads every node to itself, if it resolves there as it does here"
    if not any(map(_is_own, addresses)):
        return f"{shown} is another host than rank 0's"
    return None


def _is_own(address: str) -> bool:
    """Whether this machine has the address: nobody can bind to another one's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def unreachable(
    process: ProcessEnvironment, host: str, addresses: list[str], problem: OSError
) -> Finding:
    """Why this process does not reach rank 0.

    Args:
        process: Its place.
        host: Its machine.
        addresses: Of ``master_address``; none: it does not resolve.
        problem: Of the last try.
    """
    name = process.master_address
    # Nodes take ranks one after the other, so only on the first one the two numbers agree.
    elsewhere = process.rank != process.local_rank
    if isinstance(problem, socket.gaierror):
        what = f"the name {name} does not resolve here ({problem.strerror})"
        fix = "give this node the cluster's DNS or /etc/hosts, or set MASTER_ADDR to rank 0's "
        return unreachable_because(process, host, addresses, what, fix + "address")
    if elsewhere and only_loopback(addresses):
        what = (
            f"the name {name} resolves to {', '.join(addresses)} here, which is this node itself "
            "and not rank 0's (Debian's /etc/hosts gives 127.0.1.1 to a node's own name)"
        )
        fix = (
            "set MASTER_ADDR to rank 0's address in the cluster's network, or take the name off "
            "the 127.x line of /etc/hosts"
        )
        return unreachable_because(process, host, addresses, what, fix)
    if problem.errno == errno.ECONNREFUSED:
        what = "the connection is refused: nobody listens there"
        fix = (
            "see whether rank 0 runs and what it says; if it does, MASTER_ADDR must be its host, "
            "and a firewall must let this port through"
        )
        return unreachable_because(process, host, addresses, what, fix)
    what = f"no answer ({problem.strerror or problem})"
    fix = (
        "a firewall between the nodes drops it, or the address is of a network this node is not "
        "in: open the ports between the nodes, or set MASTER_ADDR to an address of another network"
    )
    return unreachable_because(process, host, addresses, what, fix)


def unreachable_because(
    process: ProcessEnvironment,
    host: str,
    addresses: list[str],
    what: str,
    fix: str | None = None,
) -> Finding:
    """``unreachable`` with the reason and its fix in words; by default another port."""
    at = f"{process.master_address}:{process.master_port}"
    if addresses and addresses != [process.master_address]:
        at += f" ({', '.join(addresses)})"
    return Finding(
        "PROBLEM",
        f"roll call: rank {process.rank} on {host} cannot reach rank 0 at {at}: {what}",
        fix or "set MASTER_PORT to a port that nothing else uses on rank 0's host",
    )
