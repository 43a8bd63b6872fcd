"""Print the number of page faults of a block of 64 MiB, after a block of 128 MiB was freed."""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

from support.devices import keep_freed_memory  # noqa: E402

keep_freed_memory()
torch.ones(2**27, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
