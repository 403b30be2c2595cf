"""The probes find, for our reductions of families' templates, what each template takes, and its format."""

import dataclasses

import pytest
from support.server.chat_models import ASKED, NAMES, model, template
from support.server.fake_engine import ByteCodec

from jmoe.server.dialects.detect import detect
from jmoe.server.template.chat_template import ChatTemplate
from jmoe.server.template.probe import Probe
from jmoe.server.template.thinking import Thinking
from jmoe.server.template.tool_format import tool_format

# The format, and how it was found: by a sample call or by a marker.
FORMS = {
    "deepseek_v3": ("deepseek_v3", "sample"), "deepseek_v31": ("deepseek_v31", "sample"),
    "functools": ("functools", "'functools['"), "glm": ("glm", "sample"), "granite": ("granite", "sample"),
    "harmony": ("harmony", "sample"), "hermes": ("hermes", "sample"), "kimi_k2": ("kimi_k2", "sample"),
    "llama_json": ("llama_json", "sample"), "mistral": ("mistral", "sample"), "no_tools": (None, "no calls"),
    "pythonic": ("pythonic", "'<|python_start|>'"), "qwen35": ("qwen_xml", "sample"),
    "qwen_xml": ("qwen_xml", "sample"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_format_is_found_and_the_reason_is_told(name: str):
    found = tool_format(template(name))
    form, why = FORMS[name]
    assert (found.form and found.form.name) == form and why in found.why


@pytest.mark.parametrize("name", [name for name in NAMES if FORMS[name][1] == "sample"])
def test_a_marker_is_not_needed_where_a_sample_call_is_read(name: str):
    chosen = template(name)
    found = detect(chosen.probe, "")
    assert found.form is not None and found.form.name == FORMS[name][0]
    mute = detect(lambda messages, *, tools: None, "")
    assert mute.form is None


ANY = {"first_system": True, "systems": True, "later_system": True, "users": True, "calls": True,
       "thoughts_beside_text": True, "ids": "any"}  # fmt: skip
TURNS = dict.fromkeys(NAMES, ANY) | {
    "harmony": ANY | {
        "systems": False, "later_system": False, "calls": False, "thoughts_beside_text": False},
    "kimi_k2": ANY | {"ids": "functions"},
    "mistral": ANY | {"systems": False, "later_system": False, "users": False, "ids": "nine"},
    "qwen35": ANY | {"systems": False, "later_system": False},
    "no_tools": ANY | {
        "first_system": False, "systems": False, "later_system": False, "users": False, "calls": False},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_orders_of_messages_and_ids_are_found(name: str):
    assert dataclasses.asdict(template(name).forms.turns) == TURNS[name]


# Whether a call's arguments may be text, and an object.
ARGUMENTS = {
    "deepseek_v3": (True, True), "deepseek_v31": (True, False),
    "functools": (True, False), "glm": (False, True),
    "granite": (False, True), "harmony": (False, True), "hermes": (True, True), "kimi_k2": (True, True),
    "llama_json": (False, True), "mistral": (False, True), "no_tools": (False, False),
    "pythonic": (False, True),
    "qwen35": (False, True), "qwen_xml": (False, True),
}  # fmt: skip
LISTS = {"glm": {"user"}, "llama_json": {"system", "user", "assistant", "tool"}}


@pytest.mark.parametrize("name", NAMES)
def test_forms_of_arguments_and_content_are_found(name: str):
    forms = template(name).forms
    assert (forms.arguments_text, forms.arguments_object) == ARGUMENTS[name]
    assert forms.lists == LISTS.get(name, set())
    assert forms.has_tools == (name != "no_tools")
    assert not (forms.null and name in ("glm", "deepseek_v3", "functools", "qwen35")), (
        "it fails, or writes None"
    )


THINK = ("<think>", "</think>")
THOUGHTS = {
    "deepseek_v3": Thinking(*THINK), "deepseek_v31": Thinking(*THINK, switch="thinking"),
    "glm": Thinking(*THINK, switch="enable_thinking"), "harmony": Thinking(has_effort=True),
    "hermes": Thinking(*THINK, switch="enable_thinking"), "kimi_k2": Thinking(*THINK),
    "qwen35": Thinking(*THINK, switch="enable_thinking"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_thoughts_and_their_switch_are_found(name: str):
    assert template(name).thinking == THOUGHTS.get(name, Thinking())


def test_thoughts_that_a_template_puts_together_are_found():
    """No text of the template has the whole marker."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<' + 'think>' if add_generation_prompt }}"
    assert ChatTemplate(source, {}).thinking == Thinking(*THINK)


def test_a_template_that_never_ends_is_given_up():
    clock = iter(range(0, 1000, 6))
    rendered = []

    def render(messages, tools, variables) -> str:
        rendered.append(messages)
        return ""

    probe = Probe(render, seconds=10.0, clock=lambda: float(next(clock)))
    assert [probe([ASKED]) for _ in range(4)] == ["", "", None, None] and len(rendered) == 2
    endless = ChatTemplate(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}
    )
    endless.probe._left = 0.1
    assert not endless.forms.has_tools and tool_format(endless).form is None


def test_a_setting_goes_before_what_the_template_shows(tmp_path):
    assert tool_format(template("hermes"), "none").form is None
    found = tool_format(template("hermes"), "glm")
    assert found.form is not None and found.form.name == "glm" and "'glm'" in found.why
    path = tmp_path / "mine.toml"
    path.write_text('opens = "<call>"\nnamed = ":"\ncloses = "</call>"\n')
    found = tool_format(None, str(path))
    assert found.form is not None and found.form.name == "mine"
    with pytest.raises(ValueError, match=r"tool_format must be a .toml file or one of auto, none, .*hermes"):
        tool_format(None, "herme")
    assert "no chat template" in tool_format(None).why


def test_the_start_tells_the_format_the_thoughts_and_why():
    text = str(model("hermes", ByteCodec()))
    assert text.startswith(
        "tool calls: hermes (the template writes a sample call in it); thoughts: between '<th"
    )
    assert "does not show tools" in str(model("no_tools", ByteCodec()))
