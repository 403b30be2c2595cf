"""Round trips of tools with each family's template, through the server and the openai client, without a flag.

The engine writes what a model of the family would, by the writers of ``call_texts``, under the real grammar.
"""

import json
import re

import openai
import pytest
from support.models.tokenizer_folders import byte_level, folder
from support.server.call_texts import WRITERS, plain
from support.server.chat_models import ASKED, FOLDER, LOOK, STOP, TOKENS
from support.server.fake_engine import FakeEngine, served
from tokenizers import AddedToken

from jmoe.engine.text.codec import TextCodec

MARKER = re.compile(r"<\|\w+\|>|<｜[^｜]+｜>|</?(?:tool_call|think|arg_key|arg_value)>|\[/?[A-Z_]+\]")
END = "<|endoftext|>"
HARMONY = (
    "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.look "
    '<|constrain|>json<|message|>{"place": "Rome", "days": 2}<|call|>'
)
FORMS = {
    "hermes": "hermes", "qwen_xml": "qwen_xml", "qwen35": "qwen_xml", "glm": "glm",
    "deepseek_v3": "deepseek_v3", "deepseek_v31": "deepseek_v31", "kimi_k2": "kimi_k2", "granite": "granite",
    "mistral": "mistral", "llama_json": "llama_json", "pythonic": "pythonic", "functools": "functools",
    "harmony": "harmony",
}  # fmt: skip
GIVEN = {"place": "Rome", "days": 2}


class Scripted(FakeEngine):
    """Answers each request with the next of ``scripts``, which are tokens; a grammar may refuse none of
    them."""

    def __init__(self, codec, end_ids, scripts):
        super().__init__(codec, max_model_len=4096, vocab_size=codec.vocab_size, end_ids=frozenset(end_ids))
        self.scripts, self.script_of = scripts, {}

    def submit(self, requests):
        for request in requests:
            self.script_of[request.id] = self.scripts.pop(0)
        super().submit(requests)

    def _wanted(self, request, done):
        token = self.script_of[request.id][done]
        assert request.constraint is None or request.constraint.is_allowed(token), done
        return token


def written(name: str, is_called: bool) -> str:
    """Returns the whole answer of a model: a call, or a text after its result."""
    if name == "harmony":
        return HARMONY if is_called else "<|channel|>final<|message|>It is warm.<|endoftext|>"
    call = WRITERS[FORMS[name]]([("look", GIVEN)], plain)
    return (call if is_called else "It is warm.") + END


@pytest.fixture
def serve(tmp_path):
    open_contexts = []

    def start(name: str) -> tuple[openai.OpenAI, Scripted]:
        source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer = byte_level()
        markers = {*MARKER.findall(source)} | ({*MARKER.findall(HARMONY)} if name == "harmony" else set())
        made = [AddedToken(m, special="|" in m or "｜" in m, normalized=False) for m in sorted(markers)]
        tokenizer.add_tokens(made)
        tokenizer.add_special_tokens([END, *TOKENS.values()])
        directory = folder(tmp_path, tokenizer, tokenizer_config=TOKENS)
        (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
        codec = TextCodec(directory, tokenizer.get_vocab_size())
        ends = [id for text in (END, "<|call|>") if (id := tokenizer.token_to_id(text)) is not None]
        called, said = (codec.encode(written(name, is_called), special=False) for is_called in (True, False))
        engine = Scripted(codec, ends, [called, called, said])
        open_contexts.append(served(engine, directory))
        client = open_contexts[-1].__enter__()
        return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client), engine

    yield start
    for context in open_contexts:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("name", FORMS)
def test_a_tool_s_round_trip(serve, name):
    client, engine = serve(name)
    asked = {"model": "fake", "messages": [ASKED], "tools": [LOOK, STOP]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", GIVEN)

    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    deltas = [piece for each in pieces for piece in each.delta.tool_calls or ()]
    assert [d.function.name for d in deltas if d.function.name] == ["look"] and deltas[0].id
    assert json.loads("".join(d.function.arguments or "" for d in deltas)) == GIVEN
    assert pieces[-1].finish_reason == "tool_calls"

    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    told = [ASKED, choice.message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**asked | {"messages": told}).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It is warm.", "stop")
    assert not answer.message.tool_calls
    prompt = engine.facts.codec.decode(engine.seen[-1].prompt_token_ids, skip_special=False)
    assert "21 degrees" in prompt and "look" in prompt
