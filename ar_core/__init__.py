"""The autoregressive engine: it knows positions, never modalities. Start reading at `engine.py`."""
