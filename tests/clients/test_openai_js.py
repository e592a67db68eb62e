"""The JavaScript package of OpenAI against a real server."""

from __future__ import annotations

import json
from collections.abc import Callable


def test_a_chat_and_a_completion_stream(node: Callable[[str], str]) -> None:
    said = json.loads(node("stream.js"))
    chat = said["chat"]
    assert said["model"] == "smollm2-135m-instruct"
    assert chat["role"] == "assistant"
    assert len(chat["pieces"]) > 1
    assert "".join(chat["pieces"]) == said["wholeChat"]
    assert chat["finish"] in {"stop", "length"}
    assert 1 <= chat["usage"]["completion_tokens"] <= 24
    assert len(said["completion"]["pieces"]) > 1
    assert "".join(said["completion"]["pieces"]) == said["wholeCompletion"]
    assert said["refusal"] == {"kind": "NotFoundError", "status": 404, "code": "model_not_found"}
