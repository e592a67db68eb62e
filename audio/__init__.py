"""Sound itself: codec networks, streaming decode, file formats, voices on disk."""
