"""Which device and which number format an engine uses."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"device is {name!r}; this machine has {count} CUDA devices")
    return torch.device("cuda", device.index or 0)
