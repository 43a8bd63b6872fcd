"""train.py up to its first training step -> one line of JSON on standard output. speed.py runs this program.

    python benchmarks/first_step.py --dataroot data --outdir /tmp/run      # takes the flags of train.py

The line holds the seconds that decoding took and the time (Unix, seconds) at which the first step began.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from support.cli import run


def main() -> None:
    result = {"decode_sec": 0.0}
    train_step, decode_all = train.train_step, train.DataGenerater.decode_all

    def timed_decode_all(dataset):
        start = time.time()
        decode_all(dataset)
        result["decode_sec"] += time.time() - start

    def first_step(*arguments):
        result["first_step_unix_sec"] = time.time()
        train_step(*arguments)  # the peak memory includes one step
        print(json.dumps(result), flush=True)
        raise SystemExit

    train.train_step, train.DataGenerater.decode_all = first_step, timed_decode_all
    train.main(sys.argv[1:])


if __name__ == "__main__":
    run(main)
