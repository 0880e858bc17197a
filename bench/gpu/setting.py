"""Settings that every stage receives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from configs import Config, gpu_configs
from rows import AbsentError, Rows
from timer import Timer


@dataclass(frozen=True)
class Setting:
    rows: Rows
    device_name: str
    quick: bool
    cells: Path  # .h5ad file for the end-to-end stage

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def timer(self) -> Timer:
        return Timer(self.device, self.quick)

    @property
    def configs(self) -> dict[str, Config]:
        return gpu_configs(self.quick)

    @property
    def batch(self) -> int:
        """Cells per batch of the headline."""
        return 4 if self.quick else 1024

    def need_gpu(self) -> None:
        """Raise AbsentError without a GPU."""
        if not self.on_gpu:
            raise AbsentError("needs a GPU")

    def free(self) -> None:
        """Release the GPU memory that PyTorch caches."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def ceiling(self, row: str) -> float | None:
        """Return a ceiling of the current run in bytes or FLOPs per second; None if it was not measured."""
        line: dict[str, Any] = self.rows.earlier("ceilings").get(row, {})
        return line.get("bytes_per_second") or line.get("flops_per_second")
