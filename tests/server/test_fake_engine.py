"""Tests the fake engine that the server's tests use."""

import pytest
from support.server.fake_engine import ByteCodec, FakeEngine, served


@pytest.mark.parametrize(("codec", "text"), [(ByteCodec(), "abab"), (None, "")])
def test_the_fake_repeats_its_prompt(codec, text):
    with served(FakeEngine(codec)) as client:
        answer = client.post("/v1/completions", json={"prompt": [97, 98], "max_tokens": 4}).json()
    assert answer["choices"][0]["text"] == text
    counts = {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert answer["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
