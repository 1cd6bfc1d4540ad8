"""Takes from the process that runs users' SQL whatever it does not need: for good, and without the help of DuckDB.

Should a statement get past the guard and DuckDB's own settings, the operating system still refuses to open a file for writing,
to remove or make one, to start a program or to connect anywhere. Landlock does that where the kernel has it (Linux 5.13,
networks 6.7); without it, the files of the archive are write-protected, and root's process may not overlook that.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct

_GIB = 1024**3
#: Address space: above what DuckDB (1 GB), Arrow and Python map, below what hurts the machine.
ADDRESS_SPACE = 4 * _GIB
#: Nothing may be written: temporary files neither.
FILE_SIZE = 0
OPEN_FILES = 256
#: On top of the projector's own: what users ask may take the processors that nobody else wants.
NICENESS = 5

# linux/prctl.h, linux/landlock.h, linux/capability.h; the numbers of system calls above 423 are those of every architecture.
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CREATE_RULESET, _RESTRICT_SELF, _VERSION_FLAG = 444, 446, 1
#: What Landlock can refuse: executing, writing, removing, making of every kind; and what later versions of it know.
_EXECUTE_AND_WRITE = 1 << 0 | 1 << 1 | sum(1 << bit for bit in range(4, 13))
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_BIND_AND_CONNECT = 1 << 0 | 1 << 1
_CAPABILITIES_VERSION, _READ_SEARCH = 0x20080522, 1 << 2


def confine() -> None:
    """Put this process under its limits; irrevocable."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    drop_capabilities(libc)
    forbid_writing(libc)


def forbid_writing(libc: ctypes.CDLL) -> bool:
    """Have the kernel refuse all that changes a file system, starts a program or reaches a network; whether it can."""
    known = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)
    if known < 1:
        return False
    files = _EXECUTE_AND_WRITE
    files |= _REFER if known >= 2 else 0
    files |= _TRUNCATE if known >= 3 else 0
    files |= _IOCTL_DEVICE if known >= 5 else 0
    ruleset = struct.pack("=QQ", files, _BIND_AND_CONNECT) if known >= 4 else struct.pack("=Q", files)
    handle = libc.syscall(_CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0)
    if handle < 0:
        return False
    try:
        return bool(libc.syscall(_RESTRICT_SELF, handle, 0) == 0)
    finally:
        os.close(handle)


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Of what root may, keep the right to read alone: the history can belong to somebody else."""
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    present = ctypes.create_string_buffer(24)
    if libc.capget(header, present) != 0:
        return
    permitted = struct.unpack("=6I", present.raw)[1]
    kept = permitted & _READ_SEARCH
    libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))
