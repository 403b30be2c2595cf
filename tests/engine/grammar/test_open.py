"""Tests where a grammar needs no mask, and that single tokens are allowed where its masks allow them."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from jmoe.engine.deployment.settings import model_directory
from jmoe.engine.grammar.caution import LONGEST, Caution
from jmoe.engine.grammar.grammar import Grammar, GrammarCompiler

TINY = Tokenizer.from_file(str(model_directory("tiny") / "tokenizer.json"))
SIZE = TINY.get_vocab_size()
ENDS = [0, 1]
CALLS = """
start: (text_then_open "{\\"a\\": " args "}")* rest
text_then_open[lazy]: TEXT "<call>"
rest: TEXT
TEXT: /(.|\\n)*/
args: %json {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
"""


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TINY, SIZE + 5, ENDS)


def allowed_bits(constraint) -> np.ndarray:
    return np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little").astype(bool)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("lark", CALLS),
        Grammar("regex", r"[a-z ]*\d?"),
        Grammar("lark", 'start: "a" <|endoftext|>'),
        Grammar("regex", "né+日?"),
        Grammar("json_schema", '{"type": "integer"}'),
    ],
    ids=["calls", "letters", "named end", "characters", "number"],
)
def test_a_token_is_allowed_exactly_where_the_mask_allows_it(compiler, grammar):
    """Masked and unmasked steps must agree, or an answer would depend on them."""
    rng = np.random.default_rng(1)
    for _ in range(4):
        constraint = compiler.compile(grammar).constraint()
        for _ in range(12):
            bits = allowed_bits(constraint)
            some = {*rng.integers(SIZE + 5, size=200).tolist(), *rng.choice(np.flatnonzero(bits), 20), *ENDS}
            was_open = constraint.is_open
            assert [t for t in some if constraint.is_allowed(int(t))] == [t for t in some if bits[t]]
            assert constraint.is_open == was_open and (allowed_bits(constraint) == bits).all()
            if constraint.is_open:
                assert bits[ENDS].all(), "what is open may end"
            token = int(rng.choice(np.flatnonzero(bits)))
            if token in ENDS:
                break
            constraint.accept(token)


def test_free_text_is_open_and_a_call_is_closed(compiler):
    constraint, seen = compiler.compile(Grammar("lark", CALLS)).constraint(), []
    for part in ("Once upon <ca", "ll>", '{"a": {"n": 1}', "}", " there was", "<call>"):
        for token in TINY.encode(part).ids:
            assert constraint.is_allowed(token)
            constraint.accept(token)
        seen.append(constraint.is_open)
    assert seen == [True, False, False, True, True, False]


@pytest.mark.parametrize("has_inner_text", [True, False])
def test_text_inside_of_an_answer_is_open_from_its_first_mask_on(compiler, has_inner_text):
    """A message before the last one is free text, although the answer may not end in it."""
    grammar = Grammar("lark", 'start: "<a>" /[^<]*/ "</a>" /[0-9]/', has_inner_text)
    constraint, seen = compiler.compile(grammar).constraint(), []
    for part in ("<a>", "Once upon a time", "</a>"):
        for token in TINY.encode(part).ids:
            if not constraint.is_open:
                constraint.allowed()
            constraint.accept(token)
        seen.append(constraint.is_open)
    assert seen == [False, has_inner_text, has_inner_text]
    assert not constraint.is_allowed(TINY.encode("x").ids[0])
    constraint.allowed()  # as after a refusal
    constraint.accept(TINY.encode("7").ids[0])
    assert not constraint.is_open


def test_what_nothing_can_follow_is_closed(compiler):
    """Its mask has end tokens alone, so it needs no second draw to find them."""
    constraint = compiler.compile(Grammar("regex", "ab?")).constraint()
    for letter, is_open in (("a", True), ("b", False)):
        constraint.accept(TINY.encode(letter).ids[0])
        assert constraint.is_open == is_open and all(constraint.is_allowed(end) for end in ENDS)
    assert np.flatnonzero(allowed_bits(constraint)).tolist() == ENDS


def test_a_failed_grammar_fails_again(compiler):
    constraint = compiler.compile(Grammar("regex", "ab")).constraint()
    assert not constraint.is_allowed(TINY.encode("b").ids[0])
    constraint.accept(TINY.encode("a").ids[0])
    with pytest.raises(ValueError, match="the grammar failed"):
        constraint.accept(TINY.encode("z").ids[0])
    with pytest.raises(ValueError, match="the grammar failed"):
        constraint.is_allowed(TINY.encode("b").ids[0])


def masks(refused: set[int], tokens: int) -> int:
    """Returns how many of the tokens are masked if the model wants a refused one at these."""
    caution, masked = Caution(), 0
    for at in range(tokens):
        if caution.num_masked == 0 and at in refused:
            caution.refuse()
        masked += caution.num_masked > 0
        caution.accept()
    return masked


def test_single_refusals_mask_one_token_and_a_grammar_that_refuses_much_is_masked():
    assert masks(set(range(0, 1000, 20)), 1000) == 50
    assert masks(set(range(1000)), 1000) > 950
    assert masks({0, 1}, 1000) == 3, "the second one's masks last for two tokens"
    caution = Caution()
    for _ in range(100):
        caution.num_masked = 0
        caution.refuse()
    assert caution.num_masked == LONGEST
