"""The setting of the C library's memory: whether it takes, in a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
from bus.allocator import keep_buffers

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(1000):
        block = bytearray(256 * 1024)
        del block[1024:]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_buffers()
faults()
print(before, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no such setting")
def test_the_memory_of_a_read_is_used_again() -> None:
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    assert after < before / 10
