"""Run train.py with worker processes that read 2 images at a time: train_small_chunks.py IN_MEMORY FLAG ...

IN_MEMORY is "True" when all images are decoded before the training, and "False" when each batch is read from files.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dataloader  # noqa: E402
import train  # noqa: E402

if __name__ == "__main__":
    in_memory = sys.argv[1] == "True"
    dataloader.CHUNK = 2
    train.fits_in_memory = lambda *_: in_memory
    train.main(sys.argv[2:])
