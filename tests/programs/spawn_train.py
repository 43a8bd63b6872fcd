"""Run train.py with spawned worker processes that read the image files: spawn_train.py ROOT FLAG ...

ROOT is the repository's root. It is an argument, so that a copy of this file runs from any folder.
"""

import multiprocessing
import sys

sys.path.insert(0, sys.argv[1])
import train  # noqa: E402

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    train.fits_in_memory = lambda *_: False
    train.main(sys.argv[2:])
