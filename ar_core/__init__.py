"""The autoregressive engine: it knows positions, never modalities. Start reading at `engine.py`."""

import os

# Before torch is loaded. Its threads spin for each other by default, and where another process takes one of the cores a
# step then waits for whole time slices of the system's: a hundred times as long. Sleeping costs microseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
