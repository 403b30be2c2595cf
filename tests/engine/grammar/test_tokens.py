"""Tests that text forced by a grammar never becomes a token that stands for something else."""

import json

import numpy as np
import pytest
from support.server.fake_engine import EOS, VOCAB, ByteCodec, byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jmoe.engine.deployment.settings import model_directory
from jmoe.engine.grammar.grammar import Grammar, GrammarCompiler, one_of, schema_grammar

TINY = Tokenizer.from_file(str(model_directory("tiny") / "tokenizer.json"))
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def llama_like() -> Tokenizer:
    """Returns a tokenizer with bytes as a fallback, U+2581 for spaces, and <unk>, <s> and </s> as words."""
    words = ["<unk>", "<s>", "</s>", *BYTES, *"\u2581abcdefghijklmnopqrstuvwxyz<>/|", "\u2581a", "en"]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = models.BPE(
        vocabulary, [("\u2581", "a"), ("e", "n")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def changing() -> Tokenizer:
    """Returns a tokenizer that does what else may be done to text.

    It composes text, takes spaces around a token, and puts one in front.
    """
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("  ", normalized=True)])
    return tokenizer


def unmarked() -> Tokenizer:
    """Returns a tokenizer whose end of text is a word, made by merges, that nothing marks as special."""
    made = json.loads(byte_tokenizer().to_str())
    made["added_tokens"], words = [], ["</", "s>", "</s>"]
    made["model"]["vocab"] |= {word: 256 + i for i, word in enumerate(words)}
    made["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"]]
    return Tokenizer.from_str(json.dumps(made))


TOKENIZERS = {
    "bundled": (TINY, TINY.get_vocab_size(), [0]),
    "bytes": (byte_tokenizer(), VOCAB, [EOS]),
    "llama-like": (llama_like(), 400, [2]),
    "changing": (changing(), 300, [EOS]),
    "unmarked": (unmarked(), 300, [258]),
}
TEXTS = [
    "a<|endoftext|>b", "<|endoftext|>", "</s>", "<s>", "x</s>y <s> <unk>z", "a <mask> b", "<tool>",
    "<pad>", " en a",
    "A  B \ufb01 e\u0301 \u212b", "<[0]>", "\x00\xff\u20ac", "<0x41>", "<|endoftext", "\uffff",
]  # fmt: skip


@pytest.fixture(scope="module", params=TOKENIZERS)
def compiler(request):
    return GrammarCompiler(*TOKENIZERS[request.param])


def only_answer(compiler: GrammarCompiler, grammar: Grammar) -> str:
    """Follows the highest allowed token of every step (special ones come last), up to an end of text."""
    constraint, tokens = compiler.compile(grammar).constraint(), []
    ends = set(compiler.spec["end_ids"])
    while len(tokens) < 200:
        allowed = np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little"))
        if set(allowed.tolist()) & ends:
            assert set(allowed.tolist()) <= ends
            return compiler.tokenizer.decode_bytes(tokens).decode()
        tokens.append(int(allowed[-1]))
        constraint.accept(tokens[-1])
    raise AssertionError("no end")


TIGHT = {"x-guidance": {"whitespace_flexible": False}}


@pytest.mark.parametrize("text", TEXTS)
def test_literals_come_by_the_letter(compiler, text):
    assert only_answer(compiler, one_of([text])) == text
    regex = "".join(f"\\x{{{ord(c):x}}}" for c in text)
    assert only_answer(compiler, Grammar("regex", f"({regex}){{2}}")) == 2 * text
    plain = text if text.isprintable() else json.dumps(text)[1:-1]
    assert (
        only_answer(compiler, Grammar("lark", f'start: "k" rest\nrest: {json.dumps(plain)}')) == f"k{plain}"
    )
    for schema in ({"const": text}, {"enum": [text]}, {"type": "string", "pattern": f"^{regex}$"}):
        assert json.loads(only_answer(compiler, schema_grammar(schema | TIGHT))) == text
    named = {"type": "object", "properties": {text: {"const": [text]}}, "required": [text]}
    assert json.loads(only_answer(compiler, schema_grammar(named | TIGHT))) == {text: [text]}


def test_free_text_may_not_hold_the_tokens_either(compiler):
    constraint = compiler.compile(Grammar("regex", r"(.|\n){1,9}")).constraint()
    bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
    assert not bits[compiler.spec["end_ids"]].any() and not bits[list(compiler.spec["named"].values())].any()


def test_a_lark_grammar_names_special_tokens_without_quotes():
    compiler = GrammarCompiler(ByteCodec.tokenizer, VOCAB, [EOS])
    lark = 'start: "<s>" <s> /<s>\\/x/ rest // <s>\nrest: %json {"const": "<s>"}'
    constraint, tokens = compiler.compile(Grammar("lark", lark)).constraint(), []
    while (bits := np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little"))[EOS] == 0:
        tokens.append(int(np.flatnonzero(bits)[0]))
        constraint.accept(tokens[-1])
    assert tokens == [*b"<s>", 256, *b'<s>/x"<s>"']
