"""A rank of a command line; rank 1 kills itself, or falls asleep, in step 5: python -m tests.distributed.dying {kill,sleep} train .."""

import os
import signal
import sys
import time
from typing import Any

import torch

from st_ar.cli import main
from st_ar.training import loop

if __name__ == "__main__":
    torch.set_num_threads(1)
    how, *arguments = sys.argv[1:]
    backward, passes = loop.forward_backward, 0

    def armed(*args: Any) -> Any:
        global passes
        passes += 1
        if os.environ["RANK"] == "1" and passes == 5:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun need not wait until it kills
            time.sleep(600)
        return backward(*args)

    loop.forward_backward = armed
    main(arguments)
