"""Speech as it is asked for over any protocol: voices, and synthesis from a request to bytes of a format."""
