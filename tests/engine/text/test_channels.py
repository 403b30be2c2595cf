"""Tests answers in channels (harmony): the final one is the text, others are thoughts, headers neither."""

import json

import pytest
from support.models.tokenizer_folders import byte_level, folder
from support.server.fake_engine import FakeEngine, served

from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.detokenizer import Detokenizer

MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|constrain|>")
THOUGHT = "<|channel|>analysis<|message|>Hmm. 😀<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Hello 😀!<|return|>"
COMMENT = "<|start|>assistant<|channel|>commentary<|message|>So<|end|>"
CALL = "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|end|>"


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> TextCodec:
    return TextCodec(folder(tmp_path_factory.mktemp("harmony"), byte_level(*MARKS)), 300)


def read(
    codec: TextCodec, answer: str, prompt: str | None = "<|start|>assistant", stop=()
) -> tuple[str, str]:
    ids = codec.encode(answer)
    detokenizer = Detokenizer(codec, stop, None if prompt is None else codec.encode(prompt))
    texts, thoughts = [], []
    for push in [lambda id=id: detokenizer.push(id) for id in ids] + [detokenizer.flush]:
        texts.append(push())
        thoughts.append(detokenizer.thoughts)
        if detokenizer.stop_match:
            break
    return "".join(texts), "".join(thoughts)


ANSWERS = [
    (THOUGHT + FINAL, "Hello 😀!", "Hmm. 😀"),
    (FINAL.removeprefix("<|start|>assistant"), "Hello 😀!", ""),
    (THOUGHT + COMMENT + FINAL, "Hello 😀!", "Hmm. 😀\nSo"),
    (THOUGHT + CALL, "", "Hmm. 😀\n{}"),
    (THOUGHT + "<|start|>assistant<|message|>plain<|end|>", "plain", "Hmm. 😀"),
    ("analysis of plain words", "analysis of plain words", ""),
    ("<|channel|>analysis<|message|>cut", "", "cut"),
    ("<|channel|>anal", "", ""),
    ("<|channel|>finally<|message|>no<|end|>", "", "no"),
    ("<|channel|> final <|constrain|>json<|message|>{}", "{}", ""),
]


@pytest.mark.parametrize(("answer", "text", "thoughts"), ANSWERS)
@pytest.mark.parametrize("prompt", ["<|start|>assistant", "", None])
def test_the_final_channel_is_the_text(codec, answer, text, thoughts, prompt):
    assert read(codec, answer, prompt) == (text, thoughts)


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("<|start|>assistant<|channel|>analysis<|message|>So", ("Hello 😀!", " on")),
        ("<|start|>assistant<|channel|>final<|message|>So", (" onHello 😀!", "")),
        ("<|channel|>analysis<|message|>So<|end|>", (" onHello 😀!", "")),
        ("<|message|>So", (" onHello 😀!", "")),
    ],
)
def test_an_answer_goes_on_in_the_message_in_which_its_prompt_ends(codec, prompt, want):
    assert read(codec, " on<|end|>" + FINAL, prompt) == want


def test_stop_strings_count_in_the_text_alone(codec):
    thought = "<|channel|>analysis<|message|>Stop!<|end|>"
    assert read(codec, thought + FINAL + "more", stop=("!",)) == ("Hello 😀", "Stop!")


def test_a_character_that_is_cut_ends_with_its_message(codec):
    smile = codec.encode("😀")
    ids = codec.encode("<|channel|>analysis<|message|>") + smile[:2] + codec.encode("<|end|>" + FINAL)
    detokenizer = Detokenizer(codec, (), [])
    text, thoughts = "", ""
    for id in ids:
        text += detokenizer.push(id)
        thoughts += detokenizer.thoughts
    text += detokenizer.flush()
    assert (text, thoughts + detokenizer.thoughts) == ("Hello 😀!", "\ufffd")


def test_without_the_marks_as_special_tokens_words_are_words(tmp_path):
    lacking = TextCodec(folder(tmp_path, byte_level(*MARKS[:3])), 300)
    assert read(lacking, "<|channel|>analysis<|message|>Hmm.") == ("analysisHmm.", "")


@pytest.fixture
def client(codec, tmp_path):
    # No message can spell a control token, but the template can. The tests' engine answers with the prompt.
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}" + THOUGHT + FINAL)
    with served(FakeEngine(codec, max_model_len=400, vocab_size=300), tmp_path) as client:
        yield client


def test_completions_over_http(client, codec):
    """The engine of this test answers with the prompt's tokens."""
    ids = codec.encode(THOUGHT + FINAL)
    fields = {"prompt": ids, "max_tokens": len(ids), "logprobs": 0, "ignore_eos": True}
    whole = client.post("/v1/completions", json=fields).json()["choices"][0]
    assert (whole["text"], whole["reasoning_content"]) == ("Hello 😀!", "Hmm. 😀")
    begins = whole["logprobs"]["text_offset"]
    assert begins[-1] == len("Hello 😀!") and begins[-2] == len("Hello 😀"), (
        "places in the text that was sent"
    )
    assert client.post("/v1/completions", json=fields | {"prompt": [259]}).json()["choices"][0].keys() == (
        whole.keys() - {"reasoning_content"}
    )


def test_chat_over_http_whole_and_streamed(client, codec):
    fields = {"messages": [{"role": "user", "content": "u:<|end|>"}], "ignore_eos": True}
    spelled = len("u:<|end|>")  # a token for each byte
    fields["max_tokens"] = spelled + len(codec.encode(THOUGHT + FINAL))
    message = client.post("/v1/chat/completions", json=fields).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("u:<|end|>Hello 😀!", "Hmm. 😀")
    deltas = []
    for line in client.post("/v1/chat/completions", json=fields | {"stream": True}).text.splitlines():
        if line.startswith("data: {"):
            deltas += [each["delta"] for each in json.loads(line[6:])["choices"]]
    for field in ("content", "reasoning_content"):
        assert "".join(delta.get(field, "") for delta in deltas) == message[field]
