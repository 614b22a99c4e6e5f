"""Which file system a path lies on, and whether other nodes see it too."""

from __future__ import annotations

import os
import re
from pathlib import Path

# By the names the kernel gives them; what FUSE carries is named fuse.<something>.
_SHARED = re.compile(
    r"nfs.*|lustre|gpfs|beegfs.*|ceph|cifs|smb3|wekafs|panfs|pvfs2|orangefs|glusterfs|afs|ocfs2|gfs2"
    r"|9p|virtiofs|vast.*|fuse\..*|quobyte.*|daos"
)


def file_system_of(path: Path, mounts: str) -> tuple[str, str]:
    """Mount point and kind of the file system a path lies on.

    Args:
        path: Need not exist yet.
        mounts: Text of ``/proc/mounts``.
    """
    place = os.path.realpath(path)
    best = ("/", "unknown")
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1])
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):  # of two on one point the later one is seen
            best = (point, fields[2])
    return best


def local_file_system(path: Path, mounts: str) -> str | None:
    """Its kind and place in words if only one node sees the path; None if it is shared."""
    point, kind = file_system_of(path, mounts)
    return None if _SHARED.fullmatch(kind) else f"{kind} at {point}"
