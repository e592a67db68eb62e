"""What can be wrong with sound that somebody sent or asked for."""

from __future__ import annotations


class AudioError(ValueError):
    """A caller's mistake; the message says what was got and what would be right."""
