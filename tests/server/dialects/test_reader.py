"""Tests the reader of calls on every format, at every size of pieces, against answers written by hand.

The cases are the faults that other servers' parsers had, so the tests have the faults' names. The battery of
cases also runs on readers that are broken on purpose: it must notice each of them.
"""

import json
import time

import pytest
from support.server.call_texts import FIRST, MARKERS, TAGGED, WRITERS, Declared, plain

from jmoe.server.dialects import reader as reader_module
from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, PlainText
from jmoe.server.dialects.formats import FORMATS
from jmoe.server.dialects.marks import marked
from jmoe.server.dialects.reader import FormatReader
from jmoe.server.dialects.reading import arguments, declared, scanner

TEXT, INTEGER = {"type": "string"}, {"type": "integer"}
FUNCTIONS = [
    Declared("look", {"properties": {"city": TEXT, "days": INTEGER, "zip": TEXT}}),
    Declared("run", {"properties": {"code": TEXT, "env": {"type": "object"}, "dry": {"type": "boolean"}}}),
    Declared(
        "note",
        {
            "properties": {
                "any": {},
                "maybe": {"type": ["string", "null"]},
                "both": {"anyOf": [TEXT, INTEGER]},
            }
        },
    ),
    Declared("now", None),
]
CODE = 'print("</b> {not} [json] \\n \\" ok")\n\tif a < b:\n  x = \'y\'\n'
LOOKALIKE = '<tool_call>\n{"name": "now"}</tool_call> [TOOL_CALLS] <|tool_call_end|> functools[{ [now()]'
# Per fault: the text before the calls, and the calls.
FAULTS = {
    "a marker split over chunks": ("Hm.\n", [("look", {"city": "Paris"})]),
    "two calls become one": ("", [("look", {"city": "A"}), ("look", {"city": "A"}), ("now", {})]),
    "quotes in prose upset the strings": ('He said "go {', [("look", {"city": "B"})]),
    "a half marker in prose": ("1 <tool <|tool_c [TOOL <dots_ functools [now ", [("now", {})]),
    "brackets and quotes in a string": (
        "",
        [("run", {"code": CODE, "env": {"A": [1, {"b": "}"}]}, "dry": True})],
    ),
    "a backslash at the end of a string": ("", [("look", {"city": "a\\", "zip": '\\"'}), ("now", {})]),
    "a number as text and text as a number": ("", [("look", {"city": "12", "zip": "007", "days": 7})]),
    "words of Python and of JSON as texts": ("", [("look", {"city": "null", "zip": "True"})]),
    "a union guessed": (
        "",
        [("note", {"any": [1, None], "maybe": None, "both": 5}), ("note", {"maybe": "5"})],
    ),
    "no arguments": ("So: ", [("now", {})]),
    "an empty text": ("", [("run", {"code": ""})]),
    "white space at the ends of a text": ("", [("run", {"code": "\n\n  x \n\n"})]),
    "text beyond the first plane": ("é 😀 ", [("look", {"city": "São 東京 😀\u2028"})]),
    "an unknown function": ("", [("other", {"a": "b"})]),
}


def has_markers(name):
    return any(marker in "".join(FORMATS[name].texts) for marker in MARKERS)


VARIANTS = [(name, has_tokens) for name in WRITERS for has_tokens in (False, True)[: 1 + has_markers(name)]]


def form_and_mark(name, has_tokens):
    """Returns a format, and the function by which its markers are written."""
    if not has_tokens:
        return FORMATS[name], plain
    tokens = {marker: 100 + i for i, marker in enumerate(MARKERS)}
    form, marks = marked(FORMATS[name], tokens)
    return form, lambda marker: marks[tokens[marker]]


def pieces(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


def events_of(form, parts):
    reader = FormatReader(form, FUNCTIONS)
    return [event for part in parts for event in reader.feed(part)] + reader.close()


def read(form, parts):
    """Returns the text, and for each call its name, its arguments' text and whether it is whole."""
    text, calls = "", []
    for event in events_of(form, parts):
        match event:
            case PlainText():
                text += event.text
            case CallStart():
                calls.append([event.name, "", False])
            case Arguments():
                assert not calls[-1][2], "arguments behind the end of a call"
                calls[-1][1] += event.text
            case CallEnd():
                assert not calls[-1][2], "a call ends twice"
                calls[-1][2] = True
    return text, calls


def answers(name, mark, fault):
    """Yields answers of a format, with the text that is expected of each."""
    text, calls = FAULTS[fault]
    text = "" if name in FIRST else text
    written = WRITERS[name](calls, mark)
    yield text + written, text
    if name not in FIRST:
        yield f"{text}{written}\nDone.", f"{text}\nDone."
    if not text:
        yield f"\n\n{written}\n ", ""


def check(name, has_tokens, fault, sizes=None):
    form, mark = form_and_mark(name, has_tokens)
    calls = FAULTS[fault][1]
    if name == "pythonic" and fault == "an unknown function":
        return  # there a list of unknown names is text: test_a_list_in_a_text_is_no_call
    for answer, text in answers(name, mark, fault):
        for size in sizes or [*range(1, 20), *range(20, len(answer), 29), len(answer)]:
            found, made = read(form, pieces(answer, size))
            assert found == text
            assert [(n, json.loads(a), whole) for n, a, whole in made] == [(n, g, True) for n, g in calls]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "has_tokens"), VARIANTS)
def test_a_fault_of_other_parsers(name, has_tokens, fault):
    check(name, has_tokens, fault)


@pytest.mark.parametrize(("name", "has_tokens"), VARIANTS)
def test_a_marker_inside_of_a_string(name, has_tokens):
    """Spelled out, it is text if the markers are tokens; else only what closes a raw text closes it."""
    form, mark = form_and_mark(name, has_tokens)
    calls = [("run", {"code": LOOKALIKE, "dry": False}), ("now", {})]
    answer = WRITERS[name](calls, mark)
    for size in range(1, len(answer) + 1, 3):
        text, made = read(form, pieces(answer, size))
        assert text == "" and [(n, json.loads(a)) for n, a, _ in made] == calls


def test_markers_that_are_tokens_are_text_when_they_are_spelled_out():
    for name in WRITERS.keys() - FIRST - {"harmony", "functools"}:
        form, _ = form_and_mark(name, True)
        answer = WRITERS[name]([("now", {})], plain)
        assert read(form, [answer]) == (answer, [])


@pytest.mark.parametrize(("name", "has_tokens"), VARIANTS)
def test_a_cut_call_told_as_whole_or_markers_at_the_end_leak(name, has_tokens):
    form, mark = form_and_mark(name, has_tokens)
    calls = [("run", {"code": "ab\ncd", "dry": True}), ("now", {})]
    before = "" if name in FIRST else "Hm. "
    answer = before + WRITERS[name](calls, mark)
    wholes = [json.dumps(given) for _, given in calls]
    last = ""
    for cut in range(len(answer) + 1):
        text, made = read(form, pieces(answer[:cut], 3))
        assert text == before[:cut] or (not made and answer[:cut].startswith(text)), "a marker leaks"
        if has_tokens:
            assert text == before[:cut], "a marker leaks"
        assert [n for n, _, _ in made] == [n for n, _ in calls][: len(made)]
        for i, (_, given, is_whole) in enumerate(made):
            assert (
                json.dumps(json.loads(given)) == wholes[i]
                if is_whole
                else wholes[i].startswith(given) or name in TAGGED
            )
            assert is_whole or i == len(made) - 1
        joined = "".join(given for _, given, _ in made)
        assert joined.startswith(last), "a longer answer takes pieces back"
        last = joined


@pytest.mark.parametrize(("name", "has_tokens"), VARIANTS)
def test_arguments_not_streamed_until_whole(name, has_tokens):
    """A text's characters come with the pieces that hold them, and the name with what follows it."""
    form, mark = form_and_mark(name, has_tokens)
    answer = WRITERS[name]([("run", {"code": "abcdefgh"})], mark)
    reader, at = FormatReader(form, FUNCTIONS), answer.index("abcdefgh")
    before = reader.feed(answer[:at])
    assert CallStart("run", "functions.run:0" if name == "kimi_k2" else None) in before
    grown = [reader.feed(c) for c in "abcdefgh"]
    assert grown == ([[]] * 8 if name == "pythonic" else [[Arguments(c)] for c in "abcdefgh"])


@pytest.mark.parametrize("name", sorted(WRITERS.keys() - FIRST))
def test_free_text_is_not_held_back(name):
    form, _ = form_and_mark(name, name not in ("harmony", "functools"))
    reader = FormatReader(form, FUNCTIONS)
    for piece in ("1 < 2", " a [b] ", '{"name": 3} '):
        assert reader.feed(piece) == [PlainText(piece)]


@pytest.mark.parametrize("name", sorted(FIRST))
def test_calls_only_at_the_start(name):
    answer = WRITERS[name]([("now", {})], plain)
    assert read(FORMATS[name], [f"So: {answer}"]) == (f"So: {answer}", [])
    assert [c[0] for c in read(FORMATS[name], [f"{answer} So: {answer}"])[1]] == ["now"]


def test_a_list_in_a_text_is_no_call():
    for text in ("[1, 2]", "[other(a=1)]", "[now]", "[", '{"name": 3}'):
        for name in FIRST:
            for size in range(1, len(text) + 1):
                assert read(FORMATS[name], pieces(text, size)) == (text, [])


def test_ids_that_the_model_writes_are_kept():
    form, mark = form_and_mark("kimi_k2", True)
    events = events_of(form, pieces(WRITERS["kimi_k2"]([("look", {}), ("now", {})], mark), 5))
    assert [e for e in events if isinstance(e, CallStart)] == [
        CallStart("look", "functions.look:0"),
        CallStart("now", "functions.now:1"),
    ]


@pytest.mark.parametrize("name", ["granite", "mistral", "functools", "hermes", "llama_json"])
def test_other_layouts_of_json_are_read_too(name):
    text = WRITERS[name]([("look", {"city": "P"}), ("now", {})], plain)
    spread = text.replace('{"name": ', '{\n  "name" :').replace(", ", " ,\n").replace("}]", "}\n]")
    for size in range(1, len(spread)):
        text, made = read(FORMATS[name], pieces(spread, size))
        assert text == "" and [(n, json.loads(a)) for n, a, _ in made] == [
            ("look", {"city": "P"}),
            ("now", {}),
        ]


def test_glm_without_line_ends():
    given = "<arg_key>city</arg_key><arg_value>P</arg_value>"
    answer = f"<tool_call>look{given}</tool_call><tool_call>now</tool_call>"
    for size in range(1, len(answer)):
        assert read(FORMATS["glm"], pieces(answer, size)) == (
            "",
            [["look", '{"city": "P"}', True], ["now", "{}", True]],
        )


def test_tagged_values_in_the_words_of_python():
    values = "<parameter=dry>\nTrue\n</parameter>\n<parameter=env>\nNone\n</parameter>\n"
    answer = f"<tool_call>\n<function=run>\n{values}</function>\n</tool_call>"
    assert read(FORMATS["qwen_xml"], [answer]) == ("", [["run", '{"dry": true, "env": null}', True]])


def test_arguments_of_python_in_all_their_forms():
    answer = "[run(code='it\\'s \"x\"', env={'a': (1, -2.5, [None, true]), \"b\": {}}, dry=False,), now()]"
    text, made = read(FORMATS["pythonic"], pieces(answer, 7))
    given = {"code": 'it\'s "x"', "env": {"a": [1, -2.5, [None, True]], "b": {}}, "dry": False}
    assert text == "" and json.loads(made[0][1]) == given and made[1] == ["now", "{}", True]
    for bad in ("1", "code=x", "code='a' 'b'", "code={1: 2}", "[" * 10**5 + "]" * 10**5):
        assert read(FORMATS["pythonic"], [f"[run({bad})]"])[0] == ""


@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "pythonic"])
def test_a_megabyte_of_arguments_is_read_in_linear_time(name):
    form, mark = form_and_mark(name, False)

    def seconds(size, value):
        answer = WRITERS[name](
            [("run", {"code": "x\n" * (size // 2), "env": {"a": [value] * (size // 64)}})], mark
        )
        begun = time.process_time()
        text, made = read(form, pieces(answer, 200))
        assert text == "" and len(json.loads(made[0][1])["code"]) == size
        return time.process_time() - begun

    few, many = seconds(125_000, "}"), seconds(1_000_000, "}")
    assert many < 40 * few, "eight times the text takes more than forty times as long"


# ---- readers broken on purpose --------------------------------------------------------------------


def battery():
    for name in WRITERS:
        for has_tokens in (False, True):
            if has_tokens and name in (*FIRST, "harmony", "functools"):
                continue
            for fault in FAULTS:
                check(name, has_tokens, fault, sizes=(2, 1000))
            if not has_tokens:
                test_a_cut_call_told_as_whole_or_markers_at_the_end_leak(name, has_tokens)
            test_arguments_not_streamed_until_whole(name, has_tokens)
            if name == "kimi_k2":
                test_ids_that_the_model_writes_are_kept()


def no_hold(self, markers, give):
    found = [place for m in markers if (place := m.find(self.text, self.at)) and place[1] is not None]
    if found:
        self.take(min(found)[0], give)
        return next(m for m in markers if m.match(self.text, self.at) not in (None, -1))
    self.take(len(self.text), give)
    while not self.is_closed:
        yield
        return (yield from no_hold(self, markers, give))
    return None


def leaking(self, marker):
    while (end := marker.match(self.text, self.at)) is None and not self.is_closed:
        yield
    if end is not None and end >= 0:
        self.at = end
    return end is not None and end >= 0


def whole_when_cut(source, give):
    yield from original_json(source, give)
    return True


def late(source, give):
    parts = []
    whole = yield from original_json(source, parts.append)
    give("".join(parts))
    return whole


def twice(source, give):
    parts = []
    whole = yield from original_json(source, lambda text: (give(text), parts.append(text)))
    if len(parts) > 1:
        give("".join(parts))
    return whole


def guessed(text, types):
    try:
        return json.dumps(json.loads(text))
    except ValueError:
        return json.dumps(text)


class Careless(scanner.Marker):
    def __init__(self, text, *, is_exact=False):
        super().__init__(text.strip() if is_exact else text, is_exact=is_exact)


class Unescaping(arguments.Extent):
    is_escaped = property(lambda self: False, lambda self, value: None)


class Unquoting(arguments.Extent):
    quote = property(lambda self: "", lambda self, value: None)


original_json = arguments.read_json
BREAKS = {
    "what begins a marker is not held back": (scanner.Scanner, "take_until", no_hold),
    "half a marker at the end is text": (scanner.Scanner, "expect", leaking),
    "a cut call is whole": (reader_module, "read_json", whole_when_cut),
    "arguments only when they are whole": (reader_module, "read_json", late),
    "arguments come twice": (reader_module, "read_json", twice),
    "an escaped quote ends a string": (arguments, "Extent", Unescaping),
    "brackets in strings count": (arguments, "Extent", Unquoting),
    "raw text is not escaped": (arguments, "escaped", lambda text: text),
    "types are guessed": (arguments, "json_of", guessed),
    "every value is text": (arguments, "kind_of", lambda types: "text"),
    "a value loses its own line ends": (arguments, "Marker", Careless),
    "the number belongs to the name": (reader_module, "NUMBERED", reader_module.re.compile("(?!)")),
    "only the first call of a list": (reader_module.Format, "is_list", False),
    "unions are guessed": (declared, "type_of", lambda value: "number"),
}


def test_the_battery_passes_unbroken():
    battery()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_reader_is_noticed(monkeypatch, name):
    monkeypatch.setattr(*BREAKS[name])
    with pytest.raises((AssertionError, json.JSONDecodeError)):
        battery()
