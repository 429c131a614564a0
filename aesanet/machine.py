"""The processor and the process that code runs on, in the words of reports."""

import os
import platform
import statistics


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def processor_clock_mhz() -> float | None:
    """The clock now of the cores that this process may run on, their mean; None where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [[part.strip() for part in line.partition(":")[::2]] for line in file]
    except OSError:
        return None
    numbers = [value for name, value in lines if name == "processor"]
    clocks = [value for name, value in lines if name == "cpu MHz"]  # which only x86 tells
    usable = {str(number) for number in os.sched_getaffinity(0)}
    found = [float(clock) for number, clock in zip(numbers, clocks, strict=False) if number in usable]
    return statistics.fmean(found) if found else None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_mib() -> int | None:
    """Of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
