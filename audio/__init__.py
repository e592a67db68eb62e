"""Sound itself: neural codecs, exact when streamed."""
