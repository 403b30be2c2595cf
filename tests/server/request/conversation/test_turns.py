"""Conversations reach each template in an order that it takes, and no word is lost on the way."""

import pytest
from support.server.chat_models import ASKED, LOOK, NAMES, STOP, call, calls, checked, model, prompted, result

from jmoe.server.errors import ApiError

TOOLS = [LOOK, STOP]
FORCED = {"tools": TOOLS, "tool_choice": "required"}
WITH_TOOLS = [name for name in NAMES if name != "no_tools"]
SAID = {"role": "assistant", "content": "There it is."}


def text(name: str, messages: list[dict], **fields) -> str:
    return prompted(model(name), messages, **fields).text


def in_order(found: str, *words: str) -> bool:
    places = [found.find(word) for word in words]
    return -1 not in places and places == sorted(places)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_late_system_message_is_not_lost(name: str, role: str):
    """Agents send one behind the user's message."""
    late = {"role": role, "content": "Be brief."}
    for messages in (
        [ASKED, late],
        [ASKED, SAID, late, {"role": "user", "content": "And there?"}],
        [late, ASKED],
    ):
        found = text(name, messages)
        assert all(m["content"] in found for m in messages), found


@pytest.mark.parametrize("name", NAMES)
def test_several_messages_of_one_role_are_not_lost(name: str):
    messages = [{"role": role, "content": f"{role} {i}."} for role in ("system", "user") for i in range(2)]
    found = text(name, messages)
    if name.startswith("deepseek"):
        assert all(m["content"] in found for m in messages)
    else:
        assert in_order(found, *(m["content"] for m in messages)), found


def test_a_system_message_begins_the_next_turn_of_the_user():
    late = {"role": "system", "content": "Be brief."}
    assert "<|im_start|>user\nBe brief.\n\nWhat is there?" in text("qwen35", [ASKED, SAID, late, ASKED])
    assert "[INST] What is there?\n\nBe brief.[/INST]" in text("mistral", [ASKED, late])
    first, second = ({"role": "system", "content": word} for word in ("One.", "Two."))
    assert text("qwen35", [first, second, ASKED]).startswith("<|im_start|>system\nOne.\n\nTwo.<|im_end|>")
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text("hermes", [ASKED, late]), (
        "it takes them anywhere"
    )


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_and_results_of_several_rounds_are_shown(name: str):
    messages = [
        ASKED,
        calls(call("call_a", place="Pisa", days=3), call("call_b", "stop")),
        result("call_a", "It leans."),
        result("call_b", "It stopped."),
        calls(call("call_c", place="Rome")),
        result("call_c", "It stands."),
    ]
    found = text(name, messages, **FORCED)
    words = ["Pisa", "It leans.", "It stopped.", "Rome", "It stands."]
    assert all(word in found for word in words)
    assert "None" not in found and '\\"place\\"' not in found, "neither Python's null nor JSON in JSON"


def test_several_calls_become_several_turns():
    messages = [ASKED, calls(call("a", place="Pisa"), call("b", "stop"), reasoning_content="Hm."),
                result("a", "It leans."), result("b", "It stopped.")]  # fmt: skip
    found = text("harmony", messages, **FORCED)
    assert in_order(
        found, "<|channel|>analysis<|message|>Hm.<|end|>", "to=functions.look", "Pisa",
        "functions.look to=assistant", "It leans.",
        "to=functions.stop", "functions.stop to=assistant", "It stopped.",
    )  # fmt: skip
    assert found.count("Hm.") == 1


def test_text_beside_thoughts_and_a_call_is_the_end_of_the_thoughts():
    messages = [ASKED, calls(call("a", place="Pisa"), content="I look.", reasoning="Hm."), result("a")]
    assert "analysis<|message|>Hm.\n\nI look.<|end|>" in text("harmony", messages, **FORCED)
    messages[1]["reasoning"] = None
    assert "analysis<|message|>I look.<|end|>" in text("harmony", messages, **FORCED)


def test_kimi_s_ids_name_the_function_and_count_in_the_conversation():
    messages = [ASKED, calls(call("call_x", place="Pisa"), call("call_y", "stop")), result("call_y", "2"),
                result("call_x", "1"), calls(call("call_x", place="Rome")),
                result("call_x", "3")]  # fmt: skip
    found = text("kimi_k2", messages, **FORCED)
    assert in_order(
        found, "<|tool_call_begin|>functions.look:0<", "<|tool_call_begin|>functions.stop:1<",
        "Return of functions.look:0\n1", "Return of functions.stop:1\n2",
        "<|tool_call_begin|>functions.look:2<", "Return of functions.look:2\n3",
    )  # fmt: skip
    assert "call_" not in found.replace("tool_call_", "").replace("tool_calls_", "")


def test_mistral_s_ids_have_nine_letters_and_stay_the_same():
    long = "call_" + "0" * 31
    messages = [
        ASKED,
        calls(call(long, place="Pisa"), call("abc123XYZ", "stop")),
        result(long),
        result("abc123XYZ"),
    ]
    found = text("mistral", messages, **FORCED)
    assert found == text("mistral", messages, **FORCED) and found.count("abc123XYZ") == 2
    made = found.partition('"id": "')[2][:9]
    assert made.isalnum() and found.count(made) == 2 and "call_0" not in found
    other = [ASKED, calls(call(long + "1", place="Pisa")), result(long + "1")]
    assert made not in text("mistral", other, **FORCED)


A, B = call("a", place="x"), call("b", "stop")


@pytest.mark.parametrize(("messages", "param", "words"), [
    ([result("a")], "messages[0].tool_call_id", "'a' is the id of no call"),
    ([calls(A), result("b")], "messages[1].tool_call_id", "'b' is the id of no call"),
    ([calls(A), result("a"), SAID, result("a")], "messages[3].tool_call_id", "no call in the turn before"),
    ([calls(A), ASKED, result("a")], "messages[2].tool_call_id", "no call"),
    ([calls(A), result("a"), result("a")], "messages[2].tool_call_id", "already has the result messages[1]"),
    ([calls(A, B), result("b")], "messages", "the call 'a' has no result"),
    ([calls(A, A), result("a")], "messages[0].tool_calls", "two calls have the id 'a'"),
])  # fmt: skip
def test_results_without_their_calls_are_refused(messages: list[dict], param: str, words: str):
    with pytest.raises(ApiError) as refusal:
        checked(model("hermes"), messages)
    assert refusal.value.status == 400 and refusal.value.param == param and words in refusal.value.message


def test_results_go_to_their_calls_whatever_their_order():
    late = {"role": "system", "content": "Be brief."}
    swapped = [calls(A, B), result("b", "2"), late, result("a", "1"), ASKED]
    found = text("hermes", swapped)
    assert found == text("hermes", [calls(A, B), result("a", "1"), result("b", "2"), late, ASKED])
    assert in_order(found, "\n1\n", "\n2\n", "Be brief.")
    assert text("hermes", [ASKED, calls(A, B), ASKED]), "calls that nobody answered"
