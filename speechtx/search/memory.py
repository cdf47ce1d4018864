"""Running out of memory: as an error that can be handled, instead of a process that the kernel kills."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

_SHARE = 0.9  # of what is free now; the rest is for what other processes still ask for


@contextlib.contextmanager
def bounded_memory(device: str) -> Iterator[None]:
    """Limits this process to the memory that is free now, while the block runs.

    Linux promises memory that it does not have, and kills the process that touches it: the utterance at hand is then not even
    named. With a limit on its data segment the allocation fails where it is asked for. A GPU's driver maps more than it uses,
    so there is no limit when decoding on one; PyTorch raises an error of its own when the GPU's memory is full.
    """
    free = _available_bytes() if device == "cpu" else None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if free is None or before[0] != resource.RLIM_INFINITY:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + int(_SHARE * free), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def what_was_asked(err: BaseException) -> str:
    """` (31.4 GiB at once)` if the error tells it, else nothing."""
    if match := re.search(r"[Tt]ried to allocate (\d+) bytes", str(err)):
        return f" ({int(match[1]) / 2**30:.1f} GiB at once)"
    if match := re.search(r"[Tt]ried to allocate ([\d.]+ [KMG]iB)", str(err)):
        return f" ({match[1]} at once)"
    return ""


def _available_bytes() -> int | None:
    """What the machine, and the control groups of the process, can still give; None where nobody tells."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        found += _left_in_groups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    return min(found) if found else None


def _left_in_groups(membership: str, root: Path) -> Iterator[int]:
    """Bytes that each control group with a limit, up to the root, can still give (cgroups(7), versions 2 and 1).

    Args:
        membership: /proc/self/cgroup. In a container it may name groups that are not to be seen there; what is seen counts.
        root: where they are mounted.
    """
    for line in membership.splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            mount, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / name.strip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(mount.parts)]):
            with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                yield max(0, int((folder / limit).read_text()) - int((folder / used).read_text()) + _page_cache(folder))


def _page_cache(group: Path) -> int:
    """Bytes of files that a control group is charged for; the kernel drops them before it kills anyone."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(stat.get(f"total_{key}", stat.get(key, 0))) for key in ("inactive_file", "active_file"))


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process already."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0
