"""A server finds its model's form of calls and thoughts at the start, tells it, and uses it in requests."""

import json

import pytest
from support.server.answers import check
from support.server.chat_models import ASKED, FOLDER, LOOK
from support.server.fake_engine import ByteCodec, FakeEngine, served

from jmoe.server.service import Service
from jmoe.server.settings import ServerSettings
from jmoe.server.template.report import chat_report

CHAT = "/v1/chat/completions"
BODY = {"messages": [ASKED], "tools": [LOOK], "max_tokens": 3}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "chat_template.jinja").write_text((FOLDER / "hermes.jinja").read_text())
    return tmp_path


def engine() -> FakeEngine:
    return FakeEngine(ByteCodec(), max_model_len=4096)


def test_tools_need_no_flag(directory):
    with served(engine(), directory) as client:
        answer = client.post(CHAT, json=BODY)
        assert answer.status_code == 200, answer.text
        [request] = client.service.engine.seen
        assert request.constraint is not None
        assert '"name": "look"' in bytes(request.prompt_token_ids).decode()
        assert (request.markup.thought_start, request.markup.in_thought) == ("<think>", False)
        client.post(CHAT, json=BODY | {"tool_choice": "none", "enable_thinking": False})
        request = client.service.engine.seen[-1]
        assert request.constraint is None
        text = bytes(request.prompt_token_ids).decode()
        assert "look" not in text and text.endswith("</think>\n\n")


def test_a_template_without_tools_refuses_them_with_the_reason(tmp_path):
    (tmp_path / "chat_template.jinja").write_text((FOLDER / "no_tools.jinja").read_text())
    with served(engine(), tmp_path) as client:
        refusal = check(client.post(CHAT, json=BODY), 400, "tool_choice", "unsupported_parameter")
        assert "the template writes no calls in a known format" in refusal
        assert client.post(CHAT, json=BODY | {"tool_choice": "required"}).status_code == 200


def test_settings_go_before_the_directory(directory, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "mine.jinja"
    other.write_text("{{ tools }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    settings = {"chat_template": str(other), "tool_format": "glm"}
    with served(engine(), directory, **settings) as client:
        assert (
            str(client.service.chat)
            == "tool calls: glm (tool_format is 'glm'); thoughts: none in the template"
        )
        client.post(CHAT, json={"messages": [ASKED], "max_tokens": 1})
        assert bytes(client.service.engine.seen[-1].prompt_token_ids) == b"None[What is there?]"
    assert chat_report(directory, str(other), "glm")["tool_format"] == "glm"


TEMPLATE = {
    "version": 1,
    "fields": {"tool_calls": {
        "open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
    }},
}  # fmt: skip


@pytest.mark.parametrize(("declared", "form", "why"), [
    (TEMPLATE, "hermes", "the checkpoint declares it (response_template)"),
    (TEMPLATE | {"version": 2}, "glm", "a sample call"), ({"fields": {}}, "glm", "a sample call"),
])  # fmt: skip
def test_the_checkpoint_s_own_word_goes_before_what_its_template_shows(directory, declared, form, why):
    (directory / "chat_template.jinja").write_text((FOLDER / "glm.jinja").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({"response_template": declared}))
    report = chat_report(directory)
    assert report["tool_format"] == form and why in report["why"]
    assert chat_report(directory, setting="granite")["tool_format"] == "granite"


@pytest.mark.parametrize(("field", "value", "words"), [
    ("tool_format", "hermess", "tool_format must be a .toml file or one of auto, none"),
    ("tool_format", "gone.toml", "gone.toml: No such file"),
    ("chat_template", "gone.jinja", "cannot read the chat template in gone.jinja"),
])  # fmt: skip
def test_a_setting_that_cannot_be_used_stops_the_start(directory, field: str, value: str, words: str):
    with pytest.raises(ValueError, match=words):
        Service(engine(), ServerSettings(**{field: value}), directory, "m")


def test_the_start_tells_that_there_is_no_template():
    with served(engine()) as client:
        text = "tool calls: none (the model has no chat template); thoughts: none"
        assert str(client.service.chat) == text


def test_the_doctor_tells_the_form_and_why(directory):
    report = chat_report(directory)
    assert (report["tool_format"], report["why"]) == ("hermes", "the template writes a sample call in it")
    assert report["thoughts"] == "between '<think>' and '</think>', set by enable_thinking"
    (directory / "chat_template.jinja").unlink()
    assert chat_report(directory) == {
        "tool_format": None, "why": "the model has no chat template", "thoughts": "none"}  # fmt: skip
    assert json.dumps(report)
