"""A text that cannot fit is refused by its characters: the bound is below every real number of tokens."""

import sys
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.models.tokenizer_folders import byte_level, folder, pieces
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.fewest_tokens import FewestTokens


def normalized(*parts: normalizers.Normalizer) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(list(parts))
    return tokenizer


def with_added(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<t>", **flags)])
    return tokenizer


def before(tokenizer: Tokenizer, part: pre_tokenizers.PreTokenizer) -> Tokenizer:
    byte_parts = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([part, byte_parts])
    return tokenizer


BOUNDED = {
    "bytes": byte_level(),
    "pieces": pieces(),
    "NFC": normalized(normalizers.NFC()),
    "NFKC, lower": normalized(normalizers.NFKC(), normalizers.Lowercase()),
    "replaced": normalized(normalizers.Replace("ab", "c"), normalizers.Prepend("x")),
    "stripped": normalized(normalizers.Strip()),
    "an added token that takes spaces": with_added(byte_level(), rstrip=True),
    "an added token that takes spaces before": with_added(pieces(), lstrip=True, normalized=True),
    "no spaces": before(byte_level(), pre_tokenizers.WhitespaceSplit()),
    "split": before(byte_level(), pre_tokenizers.Split(Regex(r"\d"), "isolated")),
}
UNBOUNDED = {
    "accents dropped": normalized(normalizers.StripAccents()),
    "text dropped": normalized(normalizers.Replace("a", "")),
    "runs made one": normalized(normalizers.Replace(Regex("a+"), "a")),
    "digits dropped": before(byte_level(), pre_tokenizers.Split(Regex(r"\d+"), "removed")),
    "unknown letters dropped": Tokenizer(models.BPE({"a": 0}, [])),
    "unknown letters made one": Tokenizer(models.BPE({"a": 0, "u": 1}, [], unk_token="u", fuse_unk=True)),
    "unknown words": Tokenizer(models.WordLevel({"a": 0, "u": 1}, unk_token="u")),
    "unigram": Tokenizer(models.Unigram([("u", 0.0), ("a", 0.0)], 0, False)),
}
# Letters that compose, spaces of several kinds, marks, words of the vocabulary.
FOUR_IN_ONE = "\u03b1\u0313\u0300\u0345"
PARTS = [
    "hello",
    " hello",
    "<t>",
    " ",
    "\n",
    "\u00a0",
    "\u0301",
    FOUR_IN_ONE,
    "\u1112\u1161\u11ab",
    "ab",
    "7",
]
TEXT = st.lists(st.sampled_from([*PARTS, "é", "ﷺ", "😀", "\x1c"]), max_size=30)


@pytest.mark.parametrize("tokenizer", BOUNDED.values(), ids=BOUNDED)
@settings(max_examples=60, deadline=None)
@given(parts=TEXT)
@example(parts=[FOUR_IN_ONE] * 30)
@example(parts=["<t>", *[" "] * 200])
def test_no_text_has_fewer_tokens(tokenizer: Tokenizer, parts: list[str]):
    text = "".join(parts)
    assert FewestTokens(tokenizer)(text, 0) <= len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("tokenizer", BOUNDED.values(), ids=BOUNDED)
def test_a_long_text_is_known_to_be_long(tokenizer: Tokenizer):
    fewest = FewestTokens(tokenizer)
    assert fewest("x" * 100_000, 100) > 100
    assert fewest("x" * 100, 100) == 0, "short ones are not looked at"


@pytest.mark.parametrize("tokenizer", UNBOUNDED.values(), ids=UNBOUNDED)
def test_where_one_token_may_be_any_text_there_is_no_bound(tokenizer: Tokenizer):
    assert FewestTokens(tokenizer)("x" * 100_000, 1) == 0


def test_a_text_beyond_the_context_is_refused_before_it_is_tokenized(tmp_path, monkeypatch):
    codec = TextCodec(folder(tmp_path, byte_level()), 300)
    assert codec.encode("hello" * 4, limit=4) == [259] * 4
    with pytest.raises(ValueError, match=r"maximum context length is 4 tokens.*your prompt has 5 tokens"):
        codec.encode("a" * 5, limit=4)
    monkeypatch.setattr(codec, "_ids", None)
    with pytest.raises(
        ValueError, match=r"length is 4 tokens.*has 8000000 characters, .* at least 1333334 tok"
    ):
        codec.encode("a" * 8_000_000, limit=4)


def test_tokenizing_lets_other_threads_run(tmp_path):
    """If tokenizing keeps the interpreter's lock, they never run. If it releases the lock, a busy machine may
    still let the text end first, but not each time."""
    codec = TextCodec(folder(tmp_path, byte_level()), 300)

    def turns(text: str) -> int:
        """Returns the number of turns of this thread while another one tokenizes."""
        done = threading.Thread(target=codec.encode, args=(text,))
        count, interval = 0, sys.getswitchinterval()
        done.start()
        while done.is_alive():
            time.sleep(interval)
            count += 1
        return count

    assert any(turns("hello there " * 40_000 * size) > 2 for size in (1, 1, 2, 2, 4, 4, 8, 8))
