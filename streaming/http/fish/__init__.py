"""The shapes of Fish Audio's cloud and of its self-hosted server. Start reading at `routes.py`."""
