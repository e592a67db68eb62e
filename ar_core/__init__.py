"""The autoregressive engine: it knows positions, never modalities. Start reading at `engine.py`."""

import os

# What torch's libraries read when they are loaded, so it is said before torch is imported.
for _name, _value in (
    # Threads spin for each other before they sleep. By default so long that, where another process takes one of the
    # cores, a step waits for whole time slices of the system's: a hundred times as long. Not at all is half as fast.
    ("GOMP_SPINCOUNT", "10000"),
    # oneDNN keeps a prepared product for each number of rows that it meets, a thousand by default, and they add up to
    # hundreds of megabytes.
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128"),
    ("LRU_CACHE_CAPACITY", "128"),
):
    os.environ.setdefault(_name, _value)
