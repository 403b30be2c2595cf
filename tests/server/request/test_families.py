"""From a family's template alone, through its tokens, to the calls of an answer: allowed and read back.

The answers are written by ``call_texts``, which knows no format.
"""

import json
import re

import pytest
from support.models.tokenizer_folders import byte_level, folder
from support.server.call_texts import WRITERS, plain
from support.server.chat_models import ASKED, FOLDER, LOOK, STOP, checked, model, prompted
from tokenizers import AddedToken

from jmoe.engine.grammar.grammar import GrammarCompiler
from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.detokenizer import Detokenizer
from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, PlainText
from jmoe.server.errors import ApiError
from jmoe.server.request.conversation.chat_model import ChatModel

MARKER = re.compile(r"<\|\w+\|>|<｜[^｜]+｜>|</?(?:tool_call|think|arg_key|arg_value)>|\[/?[A-Z_]+\]")
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>")
FAMILIES = {
    "hermes": "hermes", "qwen_xml": "qwen_xml", "qwen35": "qwen_xml", "glm": "glm",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v31": "deepseek_v31", "kimi_k2": "kimi_k2", "granite": "granite", "mistral": "mistral",
    "llama_json": "llama_json", "pythonic": "pythonic", "functools": "functools",
}  # fmt: skip
AT_START = ("llama_json", "pythonic")
CALLS = [("look", {"place": 'a "b" <c> é', "days": 3}), ("stop", {})]
THOUGHTS = "I must look; <tool_call> later."


def family(name: str, tmp_path) -> ChatModel:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = byte_level()
    markers = HARMONY if name == "harmony" else sorted(set(MARKER.findall(source)))
    tokenizer.add_tokens([AddedToken(m, special="|" in m or "｜" in m, normalized=False) for m in markers])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    size = tokenizer.get_vocab_size()
    return model(name, TextCodec(folder(tmp_path, tokenizer), size), vocab_size=size)


def read(chat: ChatModel, ids: list[int], ends: bool = False, **fields) -> tuple[str, str, list]:
    """Returns text, thoughts and calls of an answer of these tokens."""
    assert chat.codec is not None
    fields = {"tools": [LOOK, STOP]} | fields
    prompt, tools = prompted(chat, [ASKED], **fields), checked(chat, [ASKED], **fields).tools
    assert tools is not None
    texts, reader = Detokenizer(chat.codec, (), prompt.token_ids, prompt.markup), tools.reader()
    events, thoughts = [], ""
    for i, id in enumerate(ids):
        piece = texts.push_end(id) if ends and i == len(ids) - 1 else texts.push(id)
        events += reader.feed(piece)
        thoughts += texts.thoughts
    events += reader.feed(texts.flush())
    thoughts += texts.thoughts
    events += reader.close()
    found: list = []
    for event in events:
        if isinstance(event, CallStart):
            found.append([event.name, ""])
        elif isinstance(event, Arguments):
            found[-1][1] += event.text
    assert sum(isinstance(event, CallEnd) for event in events) == len(found)
    text = "".join(event.text for event in events if isinstance(event, PlainText))
    return text, thoughts, [(name, json.loads(arguments)) for name, arguments in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_with_calls_is_allowed_and_read(name: str, tmp_path):
    chat = family(name, tmp_path)
    assert chat.codec is not None and chat.template is not None
    said = "" if name in AT_START else "I look.\n\n"
    written = said + WRITERS[FAMILIES[name]](CALLS, plain)
    content = chat.codec.encode(written, special=False)
    chosen = checked(chat, [ASKED], tools=[LOOK, STOP]).grammar
    assert chosen is not None
    end = chat.codec.tokenizer.token_to_id("<|endoftext|>")
    assert end is not None
    compiler = GrammarCompiler(chat.codec.tokenizer, chat.codec.vocab_size, [end])
    constraint = compiler.compile(chosen.grammar).constraint()
    for id in content:
        constraint.accept(id)
    thinking = chat.template.thinking
    before = f"{thinking.start}\n{THOUGHTS}\n{thinking.end}\n\n" if thinking.start else ""
    text, thoughts, calls = read(chat, chat.codec.encode(before, special=False) + content)
    assert (text.strip(), calls) == (said.strip(), CALLS)
    assert thoughts == (THOUGHTS if thinking.start else "") or "<tool_call>" not in thoughts


SCHEMA = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}
FORM = {"type": "json_schema", "json_schema": {"name": "days", "schema": SCHEMA}}
NUMBERS = {"regex": "[0-9]+/[0-9]+"}


def accepts(chat: ChatModel, written: str, **fields) -> bool:
    """Returns whether the answer's grammar allows the text, and an end after it."""
    assert chat.codec is not None
    end = chat.codec.tokenizer.token_to_id("<|endoftext|>")
    chosen = checked(chat, [ASKED], **fields).grammar
    assert end is not None and chosen is not None
    constraint = GrammarCompiler(chat.codec.tokenizer, chat.codec.vocab_size, [end]).compile(chosen.grammar)
    state = constraint.constraint()
    for id in chat.codec.encode(written, special=False):
        if not state.is_allowed(id):
            return False
        state.accept(id)
    return state.is_allowed(end)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in AT_START])
def test_an_answer_with_tools_and_a_form_calls_or_has_the_form(name: str, tmp_path):
    chat, tools = family(name, tmp_path), {"tools": [LOOK, STOP]}
    called = WRITERS[FAMILIES[name]](CALLS[:1], plain)
    for asked, text in (
        ({"response_format": FORM}, '{"days": 3}'),
        ({"structured_outputs": NUMBERS}, "12/3"),
    ):
        both = tools | asked
        assert accepts(chat, called, **both) and accepts(chat, text, **both)
        assert not accepts(chat, "three days", **both) and not accepts(chat, '{"days": "3"}', **both)
    assert accepts(chat, called, response_format=FORM, tool_choice="required", **tools)
    assert not accepts(chat, '{"days": 3}', response_format=FORM, tool_choice="required", **tools)


@pytest.mark.parametrize("name", AT_START)
def test_a_form_that_a_call_could_be_mistaken_for_is_refused(name: str, tmp_path):
    with pytest.raises(ApiError, match="may begin as a text does"):
        checked(family(name, tmp_path), [ASKED], tools=[LOOK], response_format=FORM)


def test_harmony_thinks_before_an_answer_with_a_form(tmp_path):
    chat, final = family("harmony", tmp_path), "<|channel|>final<|message|>"
    thought = "<|channel|>analysis<|message|>Days.<|end|><|start|>assistant"
    for before in ("", thought):
        assert accepts(chat, before + final + '{"days": 3}', response_format=FORM)
        assert not accepts(chat, before + final + "three", response_format=FORM)
        both = {"response_format": FORM, "tools": [LOOK, STOP]}
        assert accepts(chat, before + final + '{"days": 3}', **both)
        call = "<|channel|>commentary to=functions.stop <|constrain|>json<|message|>{}"
        assert accepts(chat, before + call, **both) and not accepts(chat, before + call, response_format=FORM)


def test_thoughts_that_the_prompt_opens_end_before_the_calls(tmp_path):
    chat = family("qwen35", tmp_path)
    assert chat.codec is not None
    written = f"{THOUGHTS}</think>\n\n" + WRITERS["qwen_xml"](CALLS, plain)
    ids = chat.codec.encode(written, special=False)
    text, thoughts, calls = read(chat, ids, enable_thinking=True)
    assert (text, calls) == ("", CALLS) and thoughts.startswith("I must look")


def test_harmony_s_call_is_a_message_to_a_function(tmp_path):
    chat = family("harmony", tmp_path)
    assert chat.codec is not None
    name, given = CALLS[0]
    written = (
        "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.{name} <|constrain|>json<|message|>{json.dumps(given)}<|call|>"
    )
    text, thoughts, calls = read(chat, chat.codec.encode(written, special=False), ends=True)
    assert (text, thoughts, calls) == ("", "I must look.", CALLS[:1])
