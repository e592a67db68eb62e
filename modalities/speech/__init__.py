"""Speech: what dual-AR models are asked with."""
