"""`load(...)` in one's own process: texts, chats and ids, whole and streamed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ar_core.request import RequestError
from modalities import SamplingParams, load
from modalities.offline import LanguageModel

GREEDY = SamplingParams(max_tokens=12, temperature=0)
FRANCE = "The capital of France is"
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def test_texts_ids_and_chats_are_answered_in_their_order(model: LanguageModel) -> None:
    prompts = [FRANCE, model.encode(FRANCE), CHAT, "1, 2, 3, 4,"]
    together = model.generate(prompts, GREEDY, progress=False)
    assert "Paris" in together[0].text and "Paris" in together[2].text and "5, 6" in together[3].text
    assert together[0].text == together[1].text
    assert [text.prompt_tokens for text in together] == [len(model.encode(prompt)) for prompt in prompts]
    alone = [model.generate([prompt], GREEDY, progress=False)[0] for prompt in prompts]
    assert [text.tokens for text in alone] == [text.tokens for text in together]
    assert str(alone[0]) == alone[0].text == model.chat.decode(alone[0].tokens)


def test_each_prompt_can_have_its_own_sampling(model: LanguageModel) -> None:
    short, long = (replace(GREEDY, max_tokens=n, ignore_eos=True) for n in (2, 5))
    texts = model.generate([FRANCE, FRANCE], [short, long], progress=False)
    assert [len(text.tokens) for text in texts] == [2, 5]
    assert [text.finish for text in texts] == ["length", "length"]
    with pytest.raises(ValueError, match="2 prompts have 1 sampling parameters"):
        model.generate([FRANCE, FRANCE], [short], progress=False)


def test_an_answer_ends_before_a_stop_string_or_token(model: LanguageModel) -> None:
    free = model.generate(["1, 2, 3, 4,"], GREEDY, progress=False)[0]
    stopped = model.generate(["1, 2, 3, 4,"], GREEDY, stop=[" 6"], progress=False)[0]
    assert (stopped.text, stopped.finish) == (free.text[: free.text.index(" 6")], "stop")
    token = free.tokens[3]
    by_token = model.generate(["1, 2, 3, 4,"], replace(GREEDY, stop_token_ids=(token,)), progress=False)[0]
    assert by_token.finish == "stop"
    assert by_token.tokens == free.tokens[: free.tokens.index(token)]
    assert not model.engine.has_work


def test_logprobs_stand_beside_their_tokens(model: LanguageModel) -> None:
    text = model.generate([FRANCE], replace(GREEDY, logprobs=2), progress=False)[0]
    assert text.logprobs is not None
    assert [entry.token for entry in text.logprobs] == text.tokens
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in text.logprobs)


def test_a_stream_says_the_same_piece_by_piece(model: LanguageModel) -> None:
    pieces = list(model.stream(FRANCE, GREEDY))
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate([FRANCE], GREEDY, progress=False)[0].text


def test_a_stream_that_is_closed_early_leaves_the_engine_idle(model: LanguageModel) -> None:
    stream = model.stream(FRANCE, SamplingParams(max_tokens=2000, ignore_eos=True))
    next(stream)
    assert model.engine.has_work
    stream.close()
    assert not model.engine.has_work
    stats = model.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_slots_used) == (0, 0, stats.kv_slots_cached)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(model: LanguageModel) -> None:
    before = model.engine.stats().computed_tokens
    with pytest.raises(RequestError, match=r"\d+"):
        model.generate([FRANCE, [1] * 9000], GREEDY, progress=False)
    with pytest.raises(RequestError, match="empty"):
        model.generate([FRANCE, []], GREEDY, progress=False)
    assert not model.engine.has_work
    assert model.engine.stats().computed_tokens == before


def test_nothing_asked_is_nothing_answered(model: LanguageModel) -> None:
    assert model.generate([], progress=False) == []


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no-such-model"):
        load("no-such-model")
