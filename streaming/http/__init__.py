"""The HTTP face: OpenAI's shapes over the engines. Start reading at `app.py`."""
