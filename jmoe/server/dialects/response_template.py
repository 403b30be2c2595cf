"""The ``response_template`` of a checkpoint's tokenizer_config.json, which says how its answers are parsed.

Where a known format writes calls that the template reads back, the model has this format: then arguments
stream and a grammar holds. Else the template itself reads an answer, once it is whole.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, Event, Function, PlainText
from jmoe.server.dialects.format import Format, Tagged

PROBES: tuple[tuple[str, dict[str, Any]], ...] = (("look_up", {"city": 'a "b" <c>', "days": 3}), ("now", {}))
PLACE = re.compile(r"\{(\w+(?:\.\w+)*)\}")
PARSERS = ("json", "xml-inline", "text")


class ResponseTemplate:
    """The template's field ``tool_calls``. Raises ValueError for a template that has none, or one of another
    version or with content that is not read here.

    opens, closes: expressions of the texts around the calls.
    """

    def __init__(self, template: Mapping[str, Any]):
        if template.get("version", 1) != 1:
            raise ValueError(f"response_template: version {template['version']!r} is not 1")
        fields = template.get("fields")
        field = fields.get("tool_calls") if isinstance(fields, Mapping) else None
        if not isinstance(field, Mapping):
            raise ValueError("response_template: it has no field tool_calls")
        self.content, self.options = field.get("content", "text"), field.get("content_args") or {}
        if self.content not in PARSERS:
            raise ValueError(f"response_template: content {self.content!r} is none of {', '.join(PARSERS)}")
        self.opens, self.closes = _anchor(field, "open"), _anchor(field, "close")
        if self.opens is None:
            raise ValueError("response_template: tool_calls has neither open nor open_pattern")
        self.transform, self.is_each = (
            field.get("transform", "{content}"),
            field.get("transform_each") is True,
        )
        self.repeats = field.get("repeats") is True

    def read(self, answer: str) -> tuple[str, list[tuple[str, Any]]]:
        """Returns an answer's text and its calls' names and arguments. Raises ValueError for calls that it
        cannot read."""
        assert self.opens is not None
        text, calls, at = "", list[tuple[str, Any]](), 0
        while (found := self.opens.search(answer, at)) is not None:
            text += answer[at : found.start()]
            end = self.closes.search(answer, found.end()) if self.closes else None
            body = answer[found.end() : end.start() if end else len(answer)]
            groups = found.groupdict() | (end.groupdict() if end else {})
            calls += self._calls(body, groups)
            at = end.end() if end else len(answer)
            if not self.repeats:
                break
        return text + answer[at:], calls

    def _calls(self, body: str, groups: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
        value = self._parsed(body, self.content, self.options)
        if self.is_each:
            made = [_filled(self.transform, {**groups, **each}) for each in value]
        else:
            made = _filled(self.transform, {**groups, "content": value})
        for call in made if isinstance(made, list) else [made]:
            if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
                call = call["function"]
            if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
                raise ValueError("response_template: a call has no name")
            yield call["name"], call.get("arguments", {})

    def _parsed(self, body: str, content: str, options: Mapping[str, Any]) -> Any:
        if content == "json":
            try:
                return json.loads(body)
            except ValueError:
                if options.get("allow_non_json"):
                    return body.strip()
                raise
        if content == "xml-inline":
            value = options.get("value_parser") or {}
            inner = value.get("name", "text"), {"strip": False} | (value.get("args") or {})
            pairs = re.finditer(options["tag_pattern"], body, re.S)
            return {pair["key"]: self._parsed(pair["value"], *inner) for pair in pairs}
        return body.strip() if options.get("strip", True) else body

    def matching(self, formats: Iterable[Format]) -> Format | None:
        """Returns the first of the formats whose calls the template reads back."""
        for form in formats:
            try:
                text, calls = self.read(written(form, PROBES))
            except (ValueError, KeyError, TypeError, re.error):
                continue
            if not text.strip() and [(name, _as_texts(given)) for name, given in calls] == [
                (name, _as_texts(given)) for name, given in PROBES
            ]:
                return form
        return None


class WholeReader:
    """Reads an answer by its template once it is whole (``events.Reader``). What cannot be read is text."""

    def __init__(self, template: ResponseTemplate, functions: Sequence[Function] = ()):
        self.template, self.parts = template, list[str]()

    def feed(self, text: str) -> list[Event]:
        self.parts.append(text)
        return []

    def close(self) -> list[Event]:
        answer = "".join(self.parts)
        try:
            text, calls = self.template.read(answer)
        except (ValueError, KeyError, TypeError):
            text, calls = answer, []
        text = text.strip() if calls else text
        events: list[Event] = [PlainText(text)] if text else []
        for name, given in calls:
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            events += [CallStart(name), Arguments(arguments), CallEnd()]
        return events


def written(form: Format, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Returns calls in a format's canonical form; of Python's arguments only texts and numbers."""
    made = []
    for number, (name, given) in enumerate(calls):
        match form.arguments:
            case Tagged(key, value, end):
                pairs = ((k, v if isinstance(v, str) else json.dumps(v)) for k, v in given.items())
                arguments = "".join(f"{key}{k}{value}{v}{end}" for k, v in pairs)
            case "pythonic":
                arguments = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in given.items())
            case _:
                arguments = json.dumps(given, ensure_ascii=False)
        named = f":{number}{form.named}" if form.is_numbered else form.named
        made.append(f"{form.opens}{name}{named}{arguments}{form.closes}")
    return form.begin + form.between.join(made) + form.end


def _anchor(field: Mapping[str, Any], name: str) -> re.Pattern[str] | None:
    """Returns the expression of the texts at one side of the calls; None if the field has none."""
    literal, pattern = field.get(name), field.get(f"{name}_pattern")
    if isinstance(literal, str | list):
        texts = [literal] if isinstance(literal, str) else [str(each) for each in literal]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    if pattern is None:
        return None
    try:
        return re.compile(pattern, re.S)
    except (re.error, TypeError) as error:
        raise ValueError(f"response_template: {name}_pattern of tool_calls: {error}") from None


def _filled(transform: Any, values: Mapping[str, Any]) -> Any:
    """Returns the transform with each place ``{name.key}`` as its value."""
    if isinstance(transform, Mapping):
        return {name: _filled(part, values) for name, part in transform.items()}
    if isinstance(transform, list):
        return [_filled(part, values) for part in transform]
    if not isinstance(transform, str) or (place := PLACE.fullmatch(transform)) is None:
        return transform
    value: Any = values
    for name in place[1].split("."):
        value = value[name]
    return value


def _as_texts(given: Any) -> Any:
    """Returns arguments with all values as texts: a template may know no types."""
    if not isinstance(given, Mapping):
        return given
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
