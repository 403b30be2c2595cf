"""Tests grammars that begin after thoughts, against an expression of the whole answer and the text layer."""

import re
from dataclasses import replace

import numpy as np
import pytest
from support.server.fake_engine import EOS, byte_tokenizer

from jmoe.engine.grammar.after_thoughts import AfterThoughts
from jmoe.engine.grammar.grammar import Grammar, GrammarCompiler
from jmoe.engine.grammar.thought_tokens import ThoughtTokens
from jmoe.engine.text.markup import Markup
from jmoe.engine.text.thoughts import Thoughts
from jmoe.engine.text.token_bytes import TokenBytes

WORDS = ["</t>\n", ">\n\n", ">y", "</t>yes", "t>", " <", "x</t>", "\n \n", "</t", "<t>s", "no", "><"]
PLAIN = Markup(thought_start="<t>", thought_end="</t>")
INNER = r"yes|<no>|</to>| {0,2}_"
WHITE = r"[ \n\r\t]"
GAP = "|".join([f"{WHITE}{{0,16}}", *(f"{WHITE}{{0,{n}}}</t>{WHITE}{{0,{16 - n}}}" for n in range(17))])
THOUGHTS = rf"(?s:(?:(?!</t>).)*)</t>(?:{GAP})"
CHARACTERS = "<t>/yesno _\n"


def made(words: list[str], special: list[str]):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(words)
    tokenizer.add_special_tokens(special)
    return tokenizer


TOKENIZER = made(WORDS, ["<think>", "</think>"])
SIZE = TOKENIZER.get_vocab_size()
TOKEN_BYTES = TokenBytes(TOKENIZER)
MARKS = {TOKENIZER.token_to_id("<think>"): "\ue010", TOKENIZER.token_to_id("</think>"): "\ue011"}
MARKED = Markup(MARKS, "\ue010", "\ue011")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, SIZE, [EOS])


@pytest.fixture(scope="module")
def tokens() -> dict[Markup, ThoughtTokens]:
    return {id(markup): ThoughtTokens(TOKEN_BYTES, SIZE, markup) for markup in (PLAIN, MARKED)}


def constraint_of(compiler, tokens, markup=PLAIN, inner=INNER, *, in_thought=False) -> AfterThoughts:
    compiled = compiler.compile(Grammar("regex", inner))
    return AfterThoughts(compiled.constraint, tokens[id(markup)], [EOS], in_thought=in_thought)


def allowed_ids(constraint) -> list[int]:
    bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")[:SIZE]
    return np.flatnonzero(bits).tolist()


def text_of(ids: list[int], marks=MARKS) -> str:
    return "".join(marks[i] if i in marks else TOKEN_BYTES(i).decode("latin-1") for i in ids)


def walk(constraint, rng, steps=60) -> list[int] | None:
    """Returns a random answer that the constraint allows, or None if it does not end. The mask and the single
    tokens agree at every step."""
    ids: list[int] = []
    favoured = [t for t in range(SIZE) if t == EOS or set(text_of([t])) <= set(CHARACTERS)]
    for _ in range(steps):
        allowed = allowed_ids(constraint)
        assert [t for t in range(SIZE) if constraint.is_allowed(t)] == allowed
        token = int(rng.choice([t for t in allowed if t in favoured] or allowed))
        constraint.accept(token)
        if token == EOS:
            return ids
        ids.append(token)
    return None


def follows(constraint, ids: list[int]) -> bool:
    for token in [*ids, EOS]:
        if not constraint.is_allowed(token):
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize("in_thought", [False, True])
def test_what_is_allowed_is_what_the_expression_matches(compiler, tokens, in_thought):
    """Random answers match; near them, the constraint follows exactly the texts that match."""
    rng, ended, matched = np.random.default_rng(3), 0, 0
    whole = THOUGHTS if in_thought else f"(?: {{0,2}}<t>{THOUGHTS})?"  # two spaces may begin an answer
    expression = re.compile(f"{whole}(?:{INNER})")
    samples = ["a</t>yes", "</t>\n </t>_", "</t></t></t>yes", f"</t>{16 * ' '}yes", "<</t></to>", "</t>"]
    samples += [f"</t>{17 * ' '}yes"]
    for number in range(40):
        constraint = constraint_of(compiler, tokens, in_thought=in_thought)
        ids = walk(constraint, rng)
        if ids is not None:
            ended += 1
            assert expression.fullmatch(text_of(ids)), text_of(ids)
        text = samples[number] if number < len(samples) else text_of(ids or [])[-20:]
        text = text if in_thought or rng.random() < 0.3 else "<t>" + text
        if number >= len(samples) and text:
            at = int(rng.integers(len(text)))
            text = text[:at] + str(rng.choice(list(CHARACTERS))) + text[at + int(rng.integers(2)) :]
        wanted = expression.fullmatch(text) is not None
        matched += wanted
        single = constraint_of(compiler, tokens, in_thought=in_thought)
        assert follows(single, [ord(c) for c in text]) == wanted, text
    assert ended >= 5 and matched >= 3


@pytest.mark.parametrize("markup", [PLAIN, MARKED], ids=["text", "marks"])
@pytest.mark.parametrize("in_thought", [False, True])
def test_the_text_layer_sees_the_same_answer(compiler, tokens, markup, in_thought):
    """What the text layer takes for the answer's own text is a text of the grammar."""
    first, last = ([*b"<t>"], [*b"</t>"]) if markup is PLAIN else ([id] for id in MARKS)
    for after in ([], [10, 10], [*last], [32, *last, 10]):
        ids = [*([] if in_thought else first), *b"is it < 3?", *last, *after, *b"</to>"]
        assert follows(constraint_of(compiler, tokens, markup, in_thought=in_thought), ids)
        layer = Thoughts(replace(markup, in_thought=in_thought))
        pieces = [layer.feed(text_of([id])) for id in ids] + [layer.flush()]
        assert ["".join(part) for part in zip(*pieces, strict=True)] == ["</to>", "is it < 3?"]


def test_thoughts_are_open_and_the_answer_is_what_its_grammar_is(compiler, tokens):
    constraint = constraint_of(compiler, tokens)
    assert not constraint.is_open, "the expression allows few tokens at the start"
    for c in b"<t>hm":
        constraint.accept(c)
    assert constraint.is_open and not constraint.is_allowed(EOS), "the answer itself is missing"
    assert not constraint.is_allowed(TOKENIZER.token_to_id("</t>yes"))
    constraint.accept(TOKENIZER.token_to_id("</t>\n"))
    assert not constraint.is_open and constraint.is_allowed(ord("y"))
    free = constraint_of(compiler, tokens, inner=r"[a-z]*", in_thought=True)
    assert free.is_allowed(EOS), "an empty answer may end inside of thoughts"
    for c in b"</t>":
        free.accept(c)
    assert free.is_open


def test_letters_are_no_marks(compiler, tokens):
    constraint = constraint_of(compiler, tokens, MARKED, in_thought=True)
    for c in [*b"</think>", *"\ue011".encode()]:
        constraint.accept(c)
    assert constraint.is_open
    constraint.accept(list(MARKS)[1])
    assert not constraint.is_open


def test_a_token_that_does_not_follow_is_an_error(compiler, tokens):
    constraint = constraint_of(compiler, tokens)
    with pytest.raises(ValueError, match="the grammar failed: a token does not follow it"):
        constraint.accept(ord("q"))


def test_markers_are_needed():
    with pytest.raises(ValueError, match="thoughts need a text that opens them"):
        ThoughtTokens(TOKEN_BYTES, SIZE, Markup(thought_start="<t>"))
