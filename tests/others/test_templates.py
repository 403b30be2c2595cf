"""The content of a request reaches other people's chat templates in the form that they take.

The templates are our own reductions of published ones. The right values are what transformers 4.57.1 renders
from the same messages, if these are a conversation at all.
"""

import json

import pytest

from jmoe.server.dialects.ids import letters
from jmoe.server.errors import ApiError
from jmoe.server.request.checks import check_chat
from jmoe.server.request.conversation.chat_model import ChatModel
from jmoe.server.request.decoding import decode
from jmoe.server.request.prompts import TextEncoder, chat_prompt
from jmoe.server.request.schema import ChatRequest
from jmoe.server.request.tools import ToolSupport
from jmoe.server.template.chat_template import ChatTemplate, load_chat_template

EACH = "{% for m in messages %}BODY{% endfor %}"
CALLS = EACH.replace("BODY", "{% for c in m.tool_calls or [] %}CALL;{% endfor %}")
TEMPLATES = {
    "text added (DeepSeek)": CALLS.replace("CALL", "{{ c.function.name + c.function.arguments }}"),
    "text or object (Qwen3)": CALLS.replace(
        "CALL", "{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}"),
    "JSON of an object (Hermes)": CALLS.replace("CALL", "{{ c.function.arguments | tojson }}"),
    "JSON of the call (Mistral)": CALLS.replace(
        "CALL", "{% if c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
        "{{ c.function | tojson }}"),
    "its items (GLM)": CALLS.replace(
        "CALL", "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"),
    "one by name": CALLS.replace("CALL", "{{ c.function.arguments['x'] }}"),
}  # fmt: skip
SENT, CUT = '{"x":1}', '{"x'
RIGHT = {
    "text added (DeepSeek)": ('f{"x":1};', 'f{"x;'),
    "text or object (Qwen3)": ('{"x":1};', '{"x;'),
    "JSON of an object (Hermes)": ('{"x": 1};', '{"arguments": "{\\"x"};'),
    "JSON of the call (Mistral)": (
        '{"name": "f", "arguments": {"x": 1}};', '{"name": "f", "arguments": {"arguments": "{\\"x"}};'
    ),
    "its items (GLM)": ("x=1;", 'arguments={"x;'),
    "one by name": ("1;", ";"),
}  # fmt: skip


class Codec:
    def encode(self, text: str, *, special: bool, limit: int | None = None) -> list[int]:
        return [1]


def rendered(template: str | ChatTemplate, messages: list[dict], **fields) -> str:
    body = decode(json.dumps({"messages": messages, **fields}).encode(), ChatRequest)
    made = ChatTemplate(template, {}) if isinstance(template, str) else template
    model = ChatModel(made, None, ToolSupport(None, "none", has_definitions=False))
    encoder = TextEncoder(Codec(), adds_special=False)  # type: ignore[arg-type]
    return chat_prompt(check_chat(body, model.tools), model, encoder).text


def called(arguments, **more) -> list[dict]:
    call = {"id": letters(), "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": [call | more]}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_have_the_form_that_the_template_takes(name: str):
    whole, cut = RIGHT[name]
    assert rendered(TEMPLATES[name], called(SENT)) == whole
    assert rendered(TEMPLATES[name], called(CUT)) == cut, "a call that was cut is no error"
    if not name.startswith("text added"):
        assert rendered(TEMPLATES[name], called({"x": 1})).replace(" ", "") == whole.replace(" ", "")
    else:
        assert rendered(TEMPLATES[name], called({"x": 1})) == 'f{"x": 1};'


@pytest.mark.parametrize("arguments", ["[]", "5", '"x"'])
def test_arguments_that_are_other_json_are_refused(arguments: str):
    for template in TEMPLATES.values():
        with pytest.raises(
            ApiError, match=r"messages\[0\].tool_calls\[0\].function.arguments must be the JSON"
        ):
            rendered(template, called(arguments))


def test_calls_keep_what_a_stream_s_deltas_have():
    template = CALLS.replace("CALL", "{{ c.index }}{{ c.extra_content.a }}{{ c.type }}")
    assert rendered(template, called(SENT, index=0, extra_content={"a": "b"})) == "0bfunction;"
    template = CALLS.replace("CALL", "{{ c.index is defined }}{{ c.type }}")
    assert rendered(template, called(SENT, index=None, type=None)) == "Falsefunction;", "null is as absent"


NONE = EACH.replace("BODY", "{% if m.content is none %}<call>{% else %}<said>{{ m.content }}{% endif %}")
PLAIN = EACH.replace("BODY", "[{{ m.content }}]")


@pytest.mark.parametrize(("template", "content", "right"), [
    (NONE, None, "<call>"), (NONE, "", "<said>"), (PLAIN, None, "[]"), (PLAIN, "a", "[a]"),
])  # fmt: skip
def test_null_content_stays_null_unless_it_would_be_written(template: str, content, right: str):
    messages = called(SENT)
    messages[0]["content"] = content
    assert rendered(template, messages) == right
    del messages[0]["content"]
    assert "None" not in rendered(template, messages)


PARTS = [
    {"type": "text", "text": "one"},
    {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}},
]
LIST = (
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
LISTS = EACH.replace("BODY", LIST)


@pytest.mark.parametrize(("template", "right"), [
    (LISTS, "onetwo"), (PLAIN, "[one\ntwo]"),
    (EACH.replace("BODY", "{{ m.content + '|' }}"), "one\ntwo|"),
    (EACH.replace("BODY", "{{ m.content | tojson }}"), '"one\\ntwo"'),
])  # fmt: skip
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_list_of_parts_stays_one_where_the_template_takes_lists(template: str, right: str, role: str):
    assert rendered(template, [{"role": role, "content": PARTS}]) == right


def test_a_template_may_take_lists_of_one_role_alone():
    body = "{% if m.role == 'user' %}" + LIST + "{% else %}{{ m.content }}{% endif %}"
    template = EACH.replace("BODY", body)
    for role, right in (("user", "onetwo"), ("system", "one\ntwo"), ("assistant", "one\ntwo")):
        assert rendered(template, [{"role": role, "content": PARTS}]) == right


def test_a_refusal_is_what_the_assistant_said():
    parts = [{"type": "refusal", "refusal": "no"}]
    assert rendered(LISTS, [{"role": "assistant", "content": parts}]) == "no"
    assert rendered(PLAIN, [{"role": "assistant", "content": parts}]) == "[no]"
    with pytest.raises(ApiError, match="only 'text' is supported"):
        rendered(PLAIN, [{"role": "user", "content": parts}])


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_what_an_assistant_thought_is_passed_on(field: str):
    template = EACH.replace("BODY", "{{ m." + field + " }}|{{ m.content }}")
    assert rendered(template, [{"role": "assistant", "content": "b", field: "hmm"}]) == "hmm|b"
    usual = EACH.replace("BODY", "{{ m.reasoning_content }}{{ m.thinking }}")
    assert rendered(usual, [{"role": "assistant", "content": "b", field: "hm"}]) == "hmhm"
    assert rendered(template, [{"role": "assistant", "content": "b", field: None}]) == "|b"


def test_tools_keep_their_keys_in_their_order():
    function = {"parameters": {"type": "object"}, "strict": None, "description": "does", "name": "f"}
    tools = [{"function": function, "type": "function"}]
    template = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    user = [{"role": "user", "content": "x"}]
    assert rendered(template, user, tools=tools, tool_choice="required") == json.dumps(tools[0])


def test_ids_that_jmoe_gives_are_those_that_templates_demand():
    ids = {letters() for _ in range(1000)}
    assert len(ids) == 1000 and all(len(id) == 9 and id.isascii() and id.isalnum() for id in ids)


# ---- which template ----------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f"}}]
NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"},
         {"name": "rag", "template": "documents"}]  # fmt: skip


def both(directory) -> tuple[str, str]:
    template = load_chat_template(directory)
    assert template is not None
    return template.render([]), template.render([], TOOLS)


def test_a_named_template_is_chosen_as_transformers_chooses(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": NAMED}))
    assert both(tmp_path) == ("plain", "tools")
    config.write_text(json.dumps({"chat_template": "one"}))
    assert both(tmp_path) == ("one", "one")
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("more")
    with pytest.raises(ValueError, match="no default chat template"):
        both(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert both(tmp_path) == ("file", "more"), "files go before the configuration"


def test_a_processor_s_file_is_the_last_resort(tmp_path):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert both(tmp_path) == ("processor", "processor")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "own"}))
    assert both(tmp_path) == ("own", "own")
