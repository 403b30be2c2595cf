"""Finds the format in which a model writes calls, from its own chat template.

The template writes an earlier call as the model is to write a call. So a sample is rendered, and the format
whose reader finds the same calls in it is the model's. A template that writes no call, or writes it in
another form than it asks for, is searched for the markers of formats instead.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jmoe.server.dialects.events import Arguments, CallEnd, CallStart
from jmoe.server.dialects.format import Format
from jmoe.server.dialects.formats import FORMATS, HARMONY_ARGUMENTS, HARMONY_CALL, HARMONY_END
from jmoe.server.dialects.reader import FormatReader

AUTO, NONE = "auto", "none"
# Texts that a template has only for the format of this name; the first one found counts.
MARKERS = {
    "<function=": "qwen_xml", "<arg_key>": "glm", "<dots_function_call>": "dots", "functools[": "functools",
    "<|tool_calls_section_begin|>": "kimi_k2", "to=functions.": "harmony", "<|python_start|>": "pythonic",
    "[func_name1(": "pythonic", "<｜tool▁call▁begin｜>function": "deepseek_v3",
    "<｜tool▁call▁begin｜>": "deepseek_v31", "[ARGS]": "mistral_args", "[TOOL_CALLS]": "mistral",
    "<|tool_call|>": "granite", "<tool_call>": "hermes", '"parameters": dictionary': "llama_json",
}  # fmt: skip
HARMONY = re.compile(
    r"<\|start\|>assistant(?:<\|channel\|>commentary)? to=functions\.([^\s<]+)"
    r"[^{]*?<\|message\|>(.*?)<\|call\|>",
    re.S,
)
QUESTION = "jmoe_question"
NAME, OTHER = "jmoe_look", "jmoe_stop"
GIVEN = {"place": 'a "b" <c>é', "days": 3}
IDS = (("jmoe00001", "jmoe00002"), (f"functions.{NAME}:0", f"functions.{OTHER}:1"))


class Sample(Protocol):
    """Renders a sample; it returns None if the template fails."""

    def __call__(self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]]) -> str | None: ...


@dataclass(frozen=True)
class SampleFunction:
    """A function of a sample (``events.Function``)."""

    name: str
    parameters: dict[str, Any]
    strict: bool | None = None

    @property
    def definition(self) -> dict[str, Any]:
        function = {"name": self.name, "description": "A function.", "parameters": self.parameters}
        return {"type": "function", "function": function}


TYPES = {
    "place": {"type": "string", "description": "A place."},
    "days": {"type": "integer", "description": "Days."},
}
FUNCTIONS = (
    SampleFunction(NAME, {"type": "object", "properties": TYPES, "required": ["place"]}),
    SampleFunction(OTHER, {"type": "object", "properties": {}}),
)
CALLS = ((NAME, GIVEN), (OTHER, {}))


@dataclass(frozen=True)
class Detected:
    """The format of a model's calls; None if it has none. ``why`` says in words how it was found."""

    form: Format | None
    why: str


def detect(render: Sample, source: str, declared: Format | None = None) -> Detected:
    """Returns the format of the model whose template ``render`` renders.

    source: the template's text.
    declared: format that the checkpoint itself declares.
    """
    if declared is not None:
        return Detected(declared, "the checkpoint declares it (response_template)")
    for calls in (CALLS, CALLS[:1]):
        for text in _samples(render, calls):
            form = next((form for form in FORMATS.values() if _found(form, text) == list(calls)), None)
            if form is not None:
                return Detected(form, "the template writes a sample call in it")
    marker = next((marker for marker in MARKERS if marker in source), None)
    if marker is not None:
        return Detected(
            FORMATS[MARKERS[marker]],
            f"the template's text has {marker!r}, though it writes no sample call so",
        )
    return Detected(None, "the template writes no calls in a known format")


def _samples(render: Sample, calls: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """Renders the calls with their arguments as an object and as text, and with ids of both forms."""
    for is_text in (False, True):
        for ids in IDS:
            made = [
                {"id": id, "type": "function", "function": {
                    "name": name, "arguments": json.dumps(given, ensure_ascii=False) if is_text else given}}
                for id, (name, given) in zip(ids, calls, strict=False)
            ]  # fmt: skip
            results = [
                {
                    "role": "tool",
                    "tool_call_id": call["id"],
                    "name": call["function"]["name"],
                    "content": "a result",
                }
                for call in made
            ]
            turn = {"role": "assistant", "content": "", "tool_calls": made}
            asked = {"role": "user", "content": QUESTION}
            text = render([asked, turn, *results], tools=[function.definition for function in FUNCTIONS])
            if text is not None and QUESTION in text:
                yield text.rpartition(QUESTION)[2]


def _found(form: Format, text: str) -> list[tuple[str, Any]] | None:
    """Returns the calls that the format's reader finds in a rendered turn; None if one is not whole."""
    if form.name == "harmony":
        text = HARMONY.sub(rf"{HARMONY_CALL}\1{HARMONY_ARGUMENTS}\2{HARMONY_END}", text)
    if form.is_list:  # an earlier call may have its id, an answer's call has none
        text = re.sub(r', ?"id": ?"[^"]*"', "", text)
    if form.is_at_start:
        begin = text.find(form.begin + (form.opens or NAME))
        text = text[begin:] if begin >= 0 else ""
    reader = FormatReader(form, FUNCTIONS)
    names, arguments, num_whole = list[str](), list[str](), 0
    for event in [*reader.feed(text), *reader.close()]:
        if isinstance(event, CallStart):
            names.append(event.name)
            arguments.append("")
        elif isinstance(event, Arguments):
            arguments[-1] += event.text
        num_whole += isinstance(event, CallEnd)
    try:
        found = [(name, json.loads(given)) for name, given in zip(names, arguments, strict=True)]
    except ValueError:
        return None
    return found if num_whole == len(found) else None
