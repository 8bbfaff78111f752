"""Tells whether a path is on a network file system."""

from __future__ import annotations

import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs"),
    *("panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"),
)


def is_on_network(path: Path) -> bool:
    """Whether a path is on a network or FUSE file system.

    Only Linux lists its mounts. On other systems, and for unknown file systems, the result is False.
    """
    try:
        device = os.stat(path).st_dev
        mounts = _MOUNTS.read_bytes()  # a path in it may be any bytes
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    for line in mounts.split(b"\n"):
        mount, _, source = line.partition(b" - ")
        if number in mount.split()[2:3]:
            kind = source.split()[0].decode()
            return kind in _NETWORK or kind == "fuse" or kind.startswith("fuse.")
    return False
