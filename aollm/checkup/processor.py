"""What computes: how torch was built, how many threads it takes, which devices there are, and how fast memory is read."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..buffers import size
from ..meter import rate
from .check import Check

MATRIX_NBYTES, MEASURED_S = 256 << 20, 0.5
NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
"""What the driver of a GPU makes."""


def check_torch() -> Check:
    """Version, build, and the instructions that bfloat16 is multiplied with."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    level = torch.backends.cpu.get_cpu_capability()
    tell = getattr(torch.cpu, "get_capabilities", dict)  # torch before 2.12 does not know
    able: Mapping[str, Any] = tell()
    bf16 = "AMX" if able.get("amx_bf16") or able.get("amx_tile") else "AVX-512" if able.get("avx512_bf16") else None
    figures = {"version": torch.__version__, "cuda": torch.version.cuda, "instructions": level, "bfloat16": bf16}
    told = f"{torch.__version__}, built for {build}; instructions: {level}"
    if level in ("DEFAULT", "NO AVX"):
        return Check(
            "torch", "warning", told, "this processor or this build has no vector instructions: expect a tenth of the speed", figures
        )
    if platform.machine() in ("x86_64", "AMD64"):
        told += f", bfloat16 by {bf16}" if bf16 else ", none for bfloat16"
    return Check("torch", "ok", told, None, figures)


def check_threads(threads: int, processors: int, quota: float | None) -> Check:
    """Whether torch takes as many threads as there are processors that this process may use, of which control groups grant `quota`."""
    figures = {"threads": threads, "processors": processors, "quota": quota}
    most = processors if quota is None else min(processors, max(round(quota), 1))
    told = f"{threads} for {processors} processors" + (
        f", of which {quota:.3g} are granted" if quota is not None and quota < processors else ""
    )
    if threads > most:
        return Check("threads", "warning", told, f"threads wait for each other: set OMP_NUM_THREADS={most}", figures)
    if 2 * threads <= most:
        why = "OMP_NUM_THREADS says so: raise or unset it" if "OMP_NUM_THREADS" in os.environ else f"set OMP_NUM_THREADS={most}"
        return Check("threads", "warning", told, f"{most - threads} processors are left idle; {why}", figures)
    return Check("threads", "ok", told, None, figures)


def quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors that the control groups (v2) of this process, and those above them, grant it; None where they do not limit it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    group = groups / next((line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), "")
    least: float | None = None
    for folder in (group, *group.parents):
        if not folder.is_relative_to(groups):
            break
        try:
            granted, period = (folder / "cpu.max").read_text().split()
            share = int(granted) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
            continue
        least = share if least is None else min(least, share)
    return least


def check_device() -> Check:
    """The CUDA devices that torch can use."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if there:
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        figures = {"devices": [{"name": each.name, "memory": each.total_memory} for each in found]}
        return Check(
            "device", "ok", "; ".join(f"cuda:{n}: {each.name}, {size(each.total_memory)}" for n, each in enumerate(found)), None, figures
        )
    nodes = [node for node in NODES if os.path.exists(node)]
    if told:
        return Check(
            "device", "warning", " ".join(str(told[0].message).split()), "a run computes on the processor; mend the driver", {"devices": []}
        )
    if nodes and torch.version.cuda is None:
        return Check(
            "device", "warning", f"{nodes[0]} is there, and torch is built for the CPU", "install torch's build for CUDA: see pytorch.org",
            {"devices": []},
        )  # fmt: skip
    return Check("device", "ok", "no CUDA device: a run computes on the processor", None, {"devices": []})


def check_gds() -> Check:
    """Whether kvikio is there, and whether it would read past the processor. It is not imported where it is absent."""
    if find_spec("kvikio") is None:
        return Check(
            "GDS", "ok", "kvikio is not installed; it serves reads into a GPU's memory", None, {"installed": False, "compat_mode": None}
        )
    try:
        kvikio = import_module("kvikio")
        mode = str(kvikio.defaults.get("compat_mode")).rpartition(".")[2]
        compatible = bool(kvikio.defaults.is_compat_mode_preferred())
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError, KeyError, TypeError) as error:
        told = " ".join(str(error).split())
        return Check(
            "GDS",
            "warning",
            f"kvikio is installed and cannot be asked ({told})",
            "install it again: pip install 'aollm[gds]'",
            {"installed": True},
        )
    figures = {"installed": True, "compat_mode": mode, "reads_past_processor": not compatible}
    told = f"kvikio {kvikio.__version__}, compatibility mode {mode}"
    if compatible:
        return Check(
            "GDS", "warning", f"{told}: it reads through the processor",
            "GDS needs NVIDIA's cuFile library and a readable /run/udev; without a GPU it is of no use", figures,
        )  # fmt: skip
    return Check("GDS", "ok", told, None, figures)


def check_memory_speed(free: int) -> Check:
    """How fast torch reads a matrix from memory, multiplied with one row: what bounds models that fit."""
    if free < 4 * MATRIX_NBYTES:
        return Check("memory speed", "unknown", f"not measured: {size(free)} are free, and {size(4 * MATRIX_NBYTES)} are needed")
    matrix, row = torch.ones(MATRIX_NBYTES // 4 // 8192, 8192), torch.ones(8192)
    took, begin = list[float](), perf_counter()
    while len(took) < 3 or perf_counter() - begin < MEASURED_S:
        start = perf_counter()
        torch.mv(matrix, row)
        took.append(perf_counter() - start)
    speed = matrix.nbytes / min(took)
    told = f"{rate(speed)}, the best of {len(took)} products of a row and {size(matrix.nbytes)}"
    return Check("memory speed", "ok", told, None, {"bytes_per_second": speed})
