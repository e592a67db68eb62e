"""The network face: HTTP, the engine processes behind it, and the command line. Start reading at `supervisor.py`."""
