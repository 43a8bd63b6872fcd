"""Print by how many MiB the memory of this process grows while it measures 60 batches of images."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

from support.devices import keep_freed_memory  # noqa: E402
from support.feature_stats import measure_features  # noqa: E402


class Blocks(torch.nn.Conv2d):
    """Branches of several widths that are concatenated, as in Inception, and then averaged over the map."""

    def forward(self, images):
        x = images.new_ones(16, 288, 35, 35, dtype=torch.float32)
        for _ in range(4):
            x = torch.cat([x[:, :width] * 1.0 for width in (64, 96, 128)], 1)
        return x.mean((2, 3))


def batches():
    for number in range(70):
        if number == 10:
            before.append(resident())
        yield torch.zeros(16, 3, 8, 8, dtype=torch.uint8)


def resident():
    """MiB of memory that this process has."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


before = []
keep_freed_memory()
measure_features(Blocks(1, 1, 1), batches(), 1120, "images")
print(resident() - before[0])
