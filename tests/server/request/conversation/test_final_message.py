"""Answers that continue the assistant's last message, and prompts that open no answer."""

import pytest
from support.server.chat_models import ASKED, NAMES, call, calls, model, prompted, result

from jmoe.engine.text.markup import PLAIN
from jmoe.server.errors import ApiError

ON = {"continue_final_message": True, "add_generation_prompt": False}


def begun(content, **more) -> list[dict]:
    return [ASKED, {"role": "assistant", "content": content, **more}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["The answer is", "{", "a {{ b }}\n\nc", '\n"x\\'])
def test_the_prompt_ends_with_the_text(name: str, content: str):
    found = prompted(model(name), begun(content), **ON).text
    assert found.endswith(content.strip())
    assert found.count(content.strip()) == 1 and "What is there?" in found


def test_ends_are_trimmed_where_the_template_trims_them():
    assert prompted(model("qwen35"), begun("So \n"), **ON).text.endswith("</think>\n\nSo")
    assert prompted(model("harmony"), begun("So \n"), **ON).text.endswith("final<|message|>So \n")


def test_parts_are_continued_at_the_last():
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two"}]
    assert prompted(model("llama_json"), begun(parts), **ON).text.endswith("One.Two")
    assert prompted(model("hermes"), begun(parts), **ON).text.endswith("One.\nTwo")


def test_a_template_that_rewrites_the_text_is_refused():
    with pytest.raises(ApiError, match="rewrites the last message"):
        prompted(model("hermes"), begun("<think>hm</think>So"), **ON)


@pytest.mark.parametrize(("messages", "fields", "words"), [
    (begun("x"), {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
    ([ASKED], ON, "needs a last message of the assistant, it is of the role 'user'"),
    ([*begun("x"), ASKED], ON, "needs a last message of the assistant"),
    ([ASKED, calls(call("a", place="x"))], ON, "with tool_calls"),
    ([ASKED, calls(call("a", place="x")), result("a")], ON, "role 'tool'"),
])  # fmt: skip
def test_what_cannot_be_continued_is_refused(messages: list[dict], fields: dict, words: str):
    with pytest.raises(ApiError, match=words) as refusal:
        prompted(model("hermes"), messages, **fields)
    assert refusal.value.status == 400 and refusal.value.param == "continue_final_message"


def test_no_answer_is_opened_if_the_request_says_so():
    assert prompted(model("hermes"), [ASKED], add_generation_prompt=False).text.endswith("<|im_end|>\n")
    assert prompted(model("hermes"), [ASKED]).text.endswith("<|im_start|>assistant\n")


# Whether the answer begins inside of thoughts, by template, messages and fields.
@pytest.mark.parametrize(("name", "messages", "fields", "is_inside"), [
    ("hermes", [ASKED], {}, False),
    ("hermes", [ASKED], {"enable_thinking": False}, False),
    ("qwen35", [ASKED], {}, False),
    ("qwen35", [ASKED], {"enable_thinking": True}, True),
    ("qwen35", [ASKED], {"thinking": {"type": "enabled"}}, True),
    ("qwen35", [ASKED], {"thinking": {"type": "adaptive"}}, False),
    ("qwen35", [ASKED], {"reasoning_effort": "low"}, True),
    ("qwen35", [ASKED], {"reasoning_effort": "none"}, False),
    ("qwen35", [ASKED], {"reasoning_effort": "high", "enable_thinking": False}, False),
    ("qwen35", [ASKED], {"thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, False),
    ("deepseek_v31", [ASKED], {}, False),
    ("deepseek_v31", [ASKED], {"thinking": True}, True),
    ("deepseek_v31", [ASKED], {"enable_thinking": True}, True),
    ("deepseek_v31", [ASKED, calls(call("a", place="x")), result("a", "<think>")], {"thinking": True}, False),
    ("hermes", begun("<think>\nHm"), ON, True),
    ("kimi_k2", begun("<think>Hm</think>So"), ON, False),
    ("kimi_k2", begun("So"), ON, False),
])  # fmt: skip
def test_the_prompt_s_end_decides_where_thoughts_begin(name, messages, fields, is_inside):
    markup = prompted(model(name), messages, **fields).markup
    assert (markup.thought_start, markup.thought_end) == ("<think>", "</think>")
    assert markup.in_thought == is_inside


def test_effort_is_told_in_the_template_s_words():
    for effort, word in (("none", "low"), ("minimal", "low"), ("high", "high"), ("xhigh", "high")):
        assert f"Reasoning: {word}<" in prompted(model("harmony"), [ASKED], reasoning_effort=effort).text
    assert "Reasoning: medium<" in prompted(model("harmony"), [ASKED]).text
    assert prompted(model("granite"), [ASKED], reasoning_effort="high", thinking=True).markup == PLAIN
