"""Tests text over HTTP with a tokenizer of pieces: spaces, positions in the sent text, bytes."""

import json

import pytest
from support.models.tokenizer_folders import byte_level, folder, pieces, with_bos
from support.server.fake_engine import TEMPLATE, FakeEngine, served
from tokenizers import normalizers

from jmoe.engine.text.codec import TextCodec

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = folder(tmp_path_factory.mktemp("pieces"), with_bos(pieces(), "<s>"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    with served_with(TextCodec(directory, 300), directory) as client:
        yield client


def served_with(codec: TextCodec, directory=None):
    return served(FakeEngine(codec, vocab_size=codec.vocab_size), directory)


def choice(client, **fields) -> dict:
    answer = client.post(TEXT, json={"logprobs": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_places_are_characters_of_the_text_that_was_sent(client):
    made = choice(client, prompt="hello 😀a", echo=True, max_tokens=9)
    # The prompt is <s>, hello, a space, four bytes, a. The answer is the same tokens, and <s> again.
    assert made["text"] == "hello 😀a" + " hello 😀a"
    scores = made["logprobs"]
    assert scores["tokens"][:3] == ["<s>", " hello", " "] and scores["tokens"][7] == "a"
    assert scores["text_offset"][:8] == [0, 0, 5, 6, 6, 6, 6, 7], "a character's parts begin where it does"
    assert scores["text_offset"][8:16] == [8, 8, 14, 15, 15, 15, 15, 16], "<s> is not written"


def test_an_answer_without_the_echo_begins_at_0(client):
    made = choice(client, prompt=[270, 1, 270], max_tokens=3)
    assert made["text"] == " hello hello" and made["logprobs"]["text_offset"] == [0, 6, 6]


def test_special_tokens_of_an_echoed_list_are_in_its_text(client):
    made = choice(client, prompt=[1, 270, 270], echo=True, max_tokens=1)
    assert made["text"] == "<s> hello hello" and made["logprobs"]["text_offset"] == [0, 3, 9, 15]
    made = choice(client, prompt="</s>hello", echo=True, max_tokens=1)
    assert made["text"] == "</s>hello", "spelled in the text, so it is there"
    assert made["logprobs"]["text_offset"][:2] == [0, 0], "<s> that was added is not"


def test_places_in_a_text_that_the_tokenizer_changes(tmp_path):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    with served_with(TextCodec(folder(tmp_path, tokenizer), 300)) as client:
        made = choice(client, prompt="e\u0301e\u0301a", echo=True, max_tokens=0)
    assert made["text"] == "e\u0301e\u0301a"
    assert made["logprobs"]["text_offset"] == [0, 0, 2, 2, 4]


def test_stream_and_whole_answer_are_one(client):
    fields = {"prompt": "hello 😀a", "echo": True, "max_tokens": 9, "logprobs": 0, "n": 2}
    whole = client.post(TEXT, json=fields).json()["choices"]
    parts = [dict.fromkeys(("text", "offsets"), None) | {"text": "", "offsets": []} for _ in whole]
    for line in client.post(TEXT, json={**fields, "stream": True}).text.splitlines():
        if line.startswith("data: {"):
            for each in json.loads(line[6:])["choices"]:
                parts[each["index"]]["text"] += each["text"]
                parts[each["index"]]["offsets"] += each["logprobs"]["text_offset"]
    for one, other in zip(whole, parts, strict=True):
        assert one["text"] == other["text"] and one["logprobs"]["text_offset"] == other["offsets"]


def test_the_bytes_of_logprobs_are_the_text(client):
    user = [{"role": "user", "content": "😀"}]
    answer = client.post(CHAT, json={"messages": user, "logprobs": True, "max_tokens": 11}).json()["choices"][
        0
    ]
    tokens = answer["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in tokens).decode() == answer["message"]["content"]
    assert sum(each["token"] == "\ufffd" for each in tokens) >= 4


def test_a_prompt_that_cannot_fit_is_refused_by_its_characters(client):
    for path, fields in ((TEXT, {"prompt": "a " * 100_000}),
                         (CHAT, {"messages": [{"role": "user", "content": "a " * 100_000}]})):  # fmt: skip
        error = client.post(path, json=fields).json()["error"]
        assert (
            error["code"] == "context_length_exceeded"
            and "characters, which are at least" in error["message"]
        )


def test_a_tokenizer_that_panics_fails_one_request(tmp_path):
    damaged = json.loads(byte_level().to_str())
    strip = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    damaged["decoder"] = {"type": "Sequence", "decoders": [damaged["decoder"], strip]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with served_with(TextCodec(tmp_path, 300)) as client:
        fields = {"prompt": [259], "echo": True, "max_tokens": 1}
        failed = client.post(TEXT, json=fields | {"prompt": [299]})  # an id without a token
        assert failed.status_code == 400 and "the tokenizer cannot decode these tokens" in failed.text
        assert client.get("/live").status_code == 200 == client.post(TEXT, json=fields).status_code
        assert client.post("/tokenize", json={"prompt": "hello"}).json()["tokens"] == [259]
