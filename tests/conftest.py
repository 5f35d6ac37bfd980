"""Settings of every test process."""

import os

import torch


if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core of its own, and so has what it starts: more threads in each would wait for one another.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
