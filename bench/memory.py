# SPDX-License-Identifier: Apache-2.0
"""What the memory of a process does in a measurement: what its allocator keeps, and the peak of one call."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from .registry import Step

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, as PyTorch does on a GPU; False where that is not possible.

    Otherwise glibc hands large blocks back to the system, or not, as the layout of its heap happens to be, and the next
    call takes a page fault for every 4 KiB of its result: several times what an activation costs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(*option) for option in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    )


def peak_extra_bytes(step: Step, device: torch.device) -> int | None:
    """Bytes that a call holds at its peak above those held before it; None where the system cannot tell.

    Call it on a step that has run before, so that states exist. On a GPU it is the caching allocator's count. On Linux
    it is the resident set of the process: free heap pages are handed back first, so that reused ones count as well.
    """
    step.before(0)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    if not _reset_resident_peak():
        return None
    held = _status_bytes("VmRSS")
    step.run()
    return max(0, _status_bytes("VmHWM") - held)


def _reset_resident_peak() -> bool:
    """Give free heap pages back and make the resident set's peak equal to its present size."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"memory: expected {key} in {_STATUS}; got none. Run on Linux with /proc mounted")


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 8 << 30
