"""Answers with calls of functions as each family of models writes them: an oracle that knows no ``Format``.

Each writer spells its family's form out by hand. ``mark`` writes a marker: as it is, or as the private
character that stands for its token.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Calls = Sequence[tuple[str, Mapping[str, Any]]]
Mark = Callable[[str], str]


@dataclass(frozen=True)
class Declared:
    """A function of a request."""

    name: str
    parameters: dict[str, Any] | None
    strict: bool | None = None


def plain(marker: str) -> str:
    return marker


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def raw(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


def python(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(k)}: {python(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(python, value)) + "]"
    return as_json(value) if isinstance(value, str) else repr(value)


def objects(calls: Calls) -> str:
    return ", ".join(as_json({"name": name, "arguments": given}) for name, given in calls)


def hermes(calls: Calls, mark: Mark) -> str:
    opened, closed = mark("<tool_call>"), mark("</tool_call>")
    return "\n".join(f"{opened}\n{objects([call])}\n{closed}" for call in calls)


def qwen_xml(calls: Calls, mark: Mark) -> str:
    made = []
    for name, given in calls:
        arguments = "".join(f"<parameter={k}>\n{raw(v)}\n</parameter>\n" for k, v in given.items())
        made.append(
            f"{mark('<tool_call>')}\n<function={name}>\n{arguments}</function>\n{mark('</tool_call>')}"
        )
    return "\n".join(made)


def glm(calls: Calls, mark: Mark) -> str:
    made = []
    for name, given in calls:
        arguments = "".join(
            f"{mark('<arg_key>')}{k}{mark('</arg_key>')}\n{mark('<arg_value>')}{raw(v)}{mark('</arg_value>')}\n"
            for k, v in given.items()
        )
        made.append(f"{mark('<tool_call>')}{name}\n{arguments}{mark('</tool_call>')}")
    return "\n".join(made)


def deepseek(calls: Calls, mark: Mark, *, is_v31: bool) -> str:
    names = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
    begin, end, opened, closed, sep = (mark(f"<｜tool▁{name}｜>") for name in names)
    if is_v31:
        made = "".join(f"{opened}{name}{sep}{as_json(given)}{closed}" for name, given in calls)
    else:
        made = "\n".join(
            f"{opened}function{sep}{name}\n```json\n{as_json(given)}\n```{closed}" for name, given in calls
        )
    return begin + made + end


def kimi_k2(calls: Calls, mark: Mark) -> str:
    made = ""
    for i, (name, given) in enumerate(calls):
        opened, argument = mark("<|tool_call_begin|>"), mark("<|tool_call_argument_begin|>")
        made += f"{opened}functions.{name}:{i}{argument}{as_json(given)}{mark('<|tool_call_end|>')}"
    return mark("<|tool_calls_section_begin|>") + made + mark("<|tool_calls_section_end|>")


def harmony(calls: Calls, mark: Mark) -> str:
    return "".join(f"\ue000{name}\ue001{as_json(given)}\ue002" for name, given in calls)


def mistral_args(calls: Calls, mark: Mark) -> str:
    return "".join(f"{mark('[TOOL_CALLS]')}{name}{mark('[ARGS]')}{as_json(given)}" for name, given in calls)


def llama_json(calls: Calls, mark: Mark) -> str:
    return "; ".join(as_json({"name": name, "parameters": given}) for name, given in calls)


def pythonic(calls: Calls, mark: Mark) -> str:
    def arguments(given: Mapping[str, Any]) -> str:
        return ", ".join(f"{k}={python(v)}" for k, v in given.items())

    return "[" + ", ".join(f"{name}({arguments(given)})" for name, given in calls) + "]"


def dots(calls: Calls, mark: Mark) -> str:
    made = []
    for name, given in calls:
        arguments = "".join(f'<parameter name="{k}">{raw(v)}</parameter>\n' for k, v in given.items())
        invoked = f'<invoke name="{name}">\n{arguments}</invoke>'
        made.append(f"{mark('<dots_function_call>')}\n{invoked}\n{mark('</dots_function_call>')}")
    return "\n".join(made)


WRITERS: dict[str, Callable[[Calls, Mark], str]] = {
    "hermes": hermes,
    "qwen_xml": qwen_xml,
    "glm": glm,
    "deepseek_v3": lambda calls, mark: deepseek(calls, mark, is_v31=False),
    "deepseek_v31": lambda calls, mark: deepseek(calls, mark, is_v31=True),
    "kimi_k2": kimi_k2,
    "harmony": harmony,
    "granite": lambda calls, mark: f"{mark('<|tool_call|>')}[{objects(calls)}]",
    "mistral": lambda calls, mark: f"{mark('[TOOL_CALLS]')} [{objects(calls)}]",
    "mistral_args": mistral_args,
    "llama_json": llama_json,
    "pythonic": pythonic,
    "dots": dots,
    "functools": lambda calls, mark: f"functools[{objects(calls)}]",
}
# Formats that write the arguments between tags; those whose calls stand only at the start of an answer.
TAGGED, FIRST = {"qwen_xml", "glm", "dots"}, {"llama_json", "pythonic"}
# Markers that the families' tokenizers have as tokens.
MARKERS = (
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_end|>", "<|tool_call_argument_begin|>", "<|tool_call|>", "[TOOL_CALLS]", "[ARGS]"),
    *("<dots_function_call>", "</dots_function_call>"),
)
