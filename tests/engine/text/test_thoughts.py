"""Tests answers whose model writes its thoughts between two texts: the thoughts and the text come apart."""

import pytest
from support.models.tokenizer_folders import byte_level, folder

from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.detokenizer import Detokenizer
from jmoe.engine.text.markup import HARMONY_END, PLAIN, Markup
from jmoe.engine.text.thoughts import Thoughts

OPEN, CLOSE = "<think>", "</think>"
MARK = "\ue000"
SPELLED = Markup(thought_start=OPEN, thought_end=CLOSE)
OPENED = Markup(thought_start=OPEN, thought_end=CLOSE, in_thought=True)

# answer, text, thoughts
ANSWERS = [
    (SPELLED, "<think>\nHmm.\n</think>\n\nYes.", "Yes.", "Hmm."),
    (SPELLED, "\n<think> a < b </think>Yes ", "Yes ", "a < b"),
    (SPELLED, "Yes.", "Yes.", ""),
    (SPELLED, "  Yes <think>no</think>", "  Yes <think>no</think>", ""),
    (SPELLED, "<thinking>", "<thinking>", ""),
    (SPELLED, "<thi", "<thi", ""),
    (SPELLED, " \n", " \n", ""),
    (SPELLED, "<think>a</thin", "", "a</thin"),
    (SPELLED, "<think>a</think></think>\nb", "b", "a"),
    (SPELLED, "<think>\n\n</think>\n\n", "", ""),
    (SPELLED, "<think>a</think>\n</thi", "</thi", "a"),
    (SPELLED, "<think>a</think>b</think>c", "b</think>c", "a"),
    (SPELLED, "<think>a</think> <think>b</think>c", "c", "ab"),
    (OPENED, "Hmm.\n\nSo</think>Yes", "Yes", "Hmm.\n\nSo"),
    (OPENED, "never closed ", "", "never closed "),
    (OPENED, "</think></think>Yes", "Yes", ""),
    (OPENED, "", "", ""),
]


def in_pieces(markup: Markup, answer: str, size: int) -> tuple[str, str]:
    thoughts, text, thought = Thoughts(markup), "", ""
    for at in range(0, len(answer), size):
        more, rest = thoughts.feed(answer[at : at + size])
        text, thought = text + more, thought + rest
    more, rest = thoughts.flush()
    return text + more, thought + rest


@pytest.mark.parametrize(("markup", "answer", "text", "thoughts"), ANSWERS)
def test_thoughts_and_text_come_apart_at_every_size_of_pieces(markup, answer, text, thoughts):
    for size in range(1, len(answer) + 2):
        assert in_pieces(markup, answer, size) == (text, thoughts), size


@pytest.mark.parametrize(("markup", "answer", "text", "thoughts"), ANSWERS)
def test_nothing_is_held_but_white_space_and_what_may_begin_a_marker(markup, answer, text, thoughts):
    reader, seen = Thoughts(markup), 0
    for i, character in enumerate(answer):
        more, rest = reader.feed(character)
        seen += len(more) + len(rest)
        held = reader._pending
        assert held.strip() == "" or any(m.startswith(held.strip()) for m in (OPEN, CLOSE)), answer[: i + 1]


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> TextCodec:
    return TextCodec(
        folder(tmp_path_factory.mktemp("marks"), byte_level("<call>", "<think>", "</think>")), 300
    )


def test_a_mark_stands_for_its_token_alone(codec):
    call = codec.tokenizer.token_to_id("<call>")
    detokenizer = Detokenizer(codec, (), None, Markup({call: MARK}))
    spelled = [id for word in ("<ca", "ll>", MARK) for id in codec.encode(word)]
    assert call not in spelled, "the same letters, spelled by other tokens"
    half = codec.encode("é")[:1]
    text = "".join(detokenizer.push(id) for id in [*spelled, call, *half, call])
    assert text == f"<call>{MARK}\ufffd{MARK}", "the model's own private character is dropped"
    assert detokenizer.push_end(call) == MARK and detokenizer.push_end(codec.encode("a")[0]) == ""


def test_thoughts_between_tokens_are_counted_and_stop_strings_see_the_text_alone(codec):
    marks = {codec.tokenizer.token_to_id(name): mark for name, mark in ((OPEN, "\ue010"), (CLOSE, "\ue011"))}
    markup = Markup(marks, "\ue010", "\ue011")
    detokenizer = Detokenizer(codec, ("!",), None, markup)
    text, thoughts, count = "", "", 0
    for id in codec.encode("<think>Stop!</think>Yes! more"):
        text += detokenizer.push(id)
        thoughts, count = thoughts + detokenizer.thoughts, count + detokenizer.is_thought
        if detokenizer.stop_match:
            break
    assert (text, thoughts, detokenizer.stop_match) == ("Yes", "Stop!", "!")
    assert count == len(codec.encode("Stop!"))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("said", "want", "match"),
    [
        ('no\n calls[{"a":\n1}]', "no", "\n"),
        ('yes calls[{"a":\n1}]\nmore', 'yes calls[{"a":\n1}]\nmore', None),
        ('calls[{"a":\n1}]', 'calls[{"a":\n1}]', None),
        ("call\ns[", "call", "\n"),
        ("no call\n", "no call", "\n"),
    ],
)
def test_a_stop_string_in_a_call_is_part_of_the_call(codec, said, want, match, size):
    detokenizer, text = Detokenizer(codec, ("\n",), None, Markup(call_start="calls[")), ""
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    for id in [id for piece in pieces for id in codec.encode(piece)]:
        text += detokenizer.push(id)
        if detokenizer.stop_match:
            break
    text += "" if detokenizer.stop_match else detokenizer.flush()
    assert (text, detokenizer.stop_match) == (want, match)


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|constrain|>", "<|call|>")


@pytest.fixture(scope="module")
def harmony(tmp_path_factory) -> TextCodec:
    return TextCodec(folder(tmp_path_factory.mktemp("calls"), byte_level(*HARMONY)), 300)


CALLED = "\ue000f\ue001{}\ue002"


@pytest.mark.parametrize(
    ("answer", "text", "thoughts"),
    [
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", CALLED, ""),
        (" to=functions.f<|channel|>commentary json<|message|>{}<|call|>", CALLED, ""),
        (
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.f"
            "<|constrain|>json<|message|>{}<|call|>",
            CALLED,
            "Hm",
        ),
        ("<|channel|>commentary to=functions.f<|message|>{", CALLED[:-2], ""),
        ("<|channel|>commentary to=browser.open<|message|>{}<|call|>", "", "{}"),
        ("<|channel|>final<|message|>Yes \ue000<|return|>", "Yes ", ""),
    ],
)
def test_a_call_in_harmony_stands_between_marks(harmony, answer, text, thoughts):
    ids, call = harmony.encode(answer), harmony.tokenizer.token_to_id("<|call|>")
    detokenizer = Detokenizer(harmony, (), None, Markup({call: HARMONY_END}))
    texts, thought = [], ""
    for id in ids:
        texts.append(detokenizer.push_end(id) if id == call else detokenizer.push(id))
        thought += detokenizer.thoughts
    assert ("".join(texts), thought) == (text, thoughts)


def test_without_its_mark_a_call_in_harmony_is_thought(harmony):
    detokenizer = Detokenizer(harmony, (), [], PLAIN)
    text = "".join(map(detokenizer.push, harmony.encode("<|channel|>x to=functions.f<|message|>{}")))
    assert text == ""
