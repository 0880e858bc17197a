"""What every stage works with."""

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
    cells: Path  # an .h5ad to train on from end to end

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
        """Cells per batch that the headline is measured at."""
        return 4 if self.quick else 1024

    def need_gpu(self) -> None:
        """Raise where there is none."""
        if not self.on_gpu:
            raise AbsentError("it needs a GPU")

    def free(self) -> None:
        """Give back what PyTorch keeps of the card's memory."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def ceiling(self, row: str) -> float | None:
        """Return a ceiling of this very run in bytes or FLOPs per second; None where it could not be measured."""
        line: dict[str, Any] = self.rows.earlier("ceilings").get(row, {})
        return line.get("bytes_per_second") or line.get("flops_per_second")
