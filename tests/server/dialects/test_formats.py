"""Tests the table of formats, formats in files, and markers that are tokens."""

import pytest
from support.server.call_texts import MARKERS, WRITERS
from support.server.fake_engine import byte_tokenizer
from tokenizers import AddedToken

from jmoe.engine.grammar.grammar import GrammarCompiler
from jmoe.server.dialects.dialect import format_dialect
from jmoe.server.dialects.files import format_file
from jmoe.server.dialects.format import Format, Tagged
from jmoe.server.dialects.formats import FORMATS
from jmoe.server.dialects.marks import apart_tokens, marked


def test_every_format_is_tested():
    assert FORMATS.keys() == WRITERS.keys()
    assert all(name == form.name for name, form in FORMATS.items())


def test_apart_tokens_are_those_that_no_text_of_a_grammar_matches():
    """llguidance decides, whatever the tokenizer's flag says."""
    tokenizer = byte_tokenizer()
    flags = {"<a>": False, "<b>": True, "[A]": False, "[B]": True, "plain": False, "<no>x": False}
    tokenizer.add_tokens([AddedToken(name, special=flag) for name, flag in flags.items()])
    size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer, size, [tokenizer.token_to_id("</s>")])
    special = {id for id in range(256, size) if compiler.tokenizer.is_special_token(id)}
    assert set(apart_tokens(tokenizer, size).values()) == special
    assert {"<a>", "<b>", "[B]"} <= apart_tokens(tokenizer, size).keys()
    assert "<a>" not in apart_tokens(tokenizer, tokenizer.token_to_id("<a>")), "beyond the model's vocabulary"


@pytest.mark.parametrize("name", FORMATS)
def test_marks_stand_for_the_tokens_of_a_format_and_no_others(name):
    tokens = {marker: 300 + i for i, marker in enumerate(MARKERS)}
    form, marks = marked(FORMATS[name], tokens)
    back = form.texts
    for marker, id in tokens.items():
        assert (id in marks) == (marker in "".join(FORMATS[name].texts))
        back = tuple(text.replace(marks[id], marker) if id in marks else text for text in back)
    assert back == FORMATS[name].texts and len(set(marks.values())) == len(marks)
    assert form.trigger in marks.values() or form == FORMATS[name]


def test_the_longest_marker_is_taken():
    form, marks = marked(Format("f", "<<a>>", ":", ""), {"<a>": 1, "<<a>>": 2})
    assert list(marks) == [2] and form.opens == marks[2]


def test_ids_have_the_familys_form():
    tokenizer = byte_tokenizer()
    kimi, mistral = (format_dialect(FORMATS[n], tokenizer, 258) for n in ("kimi_k2", "mistral"))
    assert kimi.new_id("look", 4) == "functions.look:4"
    assert len({mistral.new_id("look", 0) for _ in range(9)}) == 9
    assert mistral.new_id("look", 0).isalnum() and len(mistral.new_id("look", 0)) == 9


def test_a_format_in_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'opens = "<c>"\nnamed = ">"\ncloses = "</c>"\narguments = {key = "<k>", value = "=", end = ";"}'
    )
    assert format_file(path) == Format("mine", "<c>", ">", "</c>", arguments=Tagged("<k>", "=", ";"))
    path.write_text('name = "x"\nopens = "<c>"\nnamed = ":"\ncloses = ""\nis_at_start = true\nbetween = ";"')
    assert format_file(path) == Format("x", "<c>", ":", "", between=";", is_at_start=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("opens = 1", "Expected `str`, got `int` - at `$.opens`"),
        ('opens = "<c>"', "missing required field `named`"),
        ('open = "<c>"', "unknown field 'open'; a Format has name, opens"),
        ('opens = "', "Unterminated string"),
        ('opens = "<c>"\nnamed = " "\ncloses = ""', "named is empty"),
        ('opens = " "\nnamed = ":"\ncloses = ""', "begin and opens are empty"),
        (
            'begin = "["\nopens = ""\nnamed = ":"\ncloses = ""',
            "opens is empty, which only calls at the start",
        ),
        ('opens = "<c>"\nnamed = ":"\ncloses = ""\narguments = "yaml"', "Invalid enum value 'yaml'"),
        ('opens = "<c>"\nnamed = ":"\ncloses = "]"\narguments = "pythonic"', "closes must begin with ')'"),
        (
            'opens = "<c>"\nnamed = ":"\ncloses = "."\narguments = {keys = "a"}',
            "unknown field 'keys'; a Tagged has",
        ),
        (
            'opens = "<c>"\nnamed = ":"\ncloses = ""\narguments = {key="a", value="b", end="c"}',
            "need key, value, end",
        ),
        ('opens = "<c>"\nnamed = ":"\ncloses = "."\nis_at_start = true', "between is empty"),
    ],
)
def test_a_file_that_is_no_format(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        format_file(path)
    assert str(refused.value).startswith(f"{path}: ") and message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none.toml: No such file or directory$"):
        format_file(tmp_path / "none.toml")
