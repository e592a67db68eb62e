"""Speech and voices in OpenAI's shapes, and the neighbours' socket. Start reading at `routes.py`."""
