"""The tokenizer in a GGUF file gives the ids and texts of the one that it was made from."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import hf_tiny
from support.models.gguf_models import gguf, write_gguf
from support.models.tokenizer_folders import byte_level, pieces, with_bos
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from jmoe.checkpoint import convert
from jmoe.checkpoint.gguf.tokenizer import RULES
from jmoe.engine.deployment.settings import BUNDLED
from jmoe.engine.text.codec import TextCodec, load_codec
from jmoe.server.template.chat_template import load_chat_template

TEXTS = (
    "hello hello, hell", "He'LL say: it's 12345.67 at 9!", "a\n\n  b\t c   ", " \u00e9te\u0301 na\u00efve",
    "\u4f60\u597d\u4e16\u754c 3.14", "x_y = f(\"z\") // 2  # ok\r\n", "<|end|>hello<|end|> he", "",
)  # fmt: skip
CONTROL, NORMAL = 3, 1


def vocabulary(tokenizer: Tokenizer, kind: str, pre: str | None = None) -> dict[str, Any]:
    """Returns a tokenizer as llama.cpp's converter writes it."""
    model = json.loads(tokenizer.to_str())["model"]
    by_id = {id: token for token, id in tokenizer.get_vocab(with_added_tokens=True).items()}
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    found = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.eos_token_id": max(special),
        "tokenizer.ggml.tokens": [by_id.get(id, f"[PAD{id}]") for id in range(max(by_id) + 1)],
        "tokenizer.ggml.token_type": [
            (CONTROL if id in special else NORMAL) if id in by_id else 5 for id in range(max(by_id) + 1)
        ],
    }
    return found | ({"tokenizer.ggml.merges": merges, "tokenizer.ggml.pre": pre} if kind == "gpt2" else {})


def in_gguf(tmp_path: Path, more: dict[str, Any], **sizes: Any) -> Path:
    config = hf_tiny.hf_config(vocab_size=len(more["tokenizer.ggml.tokens"]), **sizes)
    hf_tiny.write_checkpoint(tmp_path / "hf", config)
    write_gguf(tmp_path / "hf", tmp_path / "model.gguf", more=more)
    return tmp_path / "model.gguf"


def check_equal(codec: TextCodec, tokenizer: Tokenizer, texts: tuple[str, ...] = TEXTS) -> None:
    for text in texts:
        want = tokenizer.encode(text).ids
        assert codec.encode(text) == want, text
        for skip in (False, True):
            assert codec.decode(want, skip_special=skip) == tokenizer.decode(want, skip_special_tokens=skip)


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The patterns of published tokenizers, as their ``tokenizer.json`` has them.
PUBLISHED = {
    "qwen2": [rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORDS}|\p{{N}}|{MARKS}"],
    "llama-bpe": [rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORDS}|\p{{N}}{{1,3}}|{MARKS}"],
    "glm4": [rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORDS}|\p{{N}}{{1,3}}|{MARKS}"],
    "gpt-2": [],
    "olmo": [],
    "refact": [r"\p{N}"],
}


def published(pre: str) -> Tokenizer:
    tokenizer = byte_level("<|end|>")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PUBLISHED[pre]]
    has_own = pre in ("gpt-2", "olmo", "refact")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=has_own)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    if pre in ("qwen2", "olmo"):
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("pre", PUBLISHED)
def test_bytes_with_the_rules_of_published_tokenizers(pre: str, tmp_path: Path):
    tokenizer = published(pre)
    path = in_gguf(tmp_path, vocabulary(tokenizer, "gpt2", pre))
    size = tokenizer.get_vocab_size()
    check_equal(TextCodec(path, size), tokenizer)
    convert(path, tmp_path / "orbax")
    check_equal(TextCodec(tmp_path / "orbax", size), tokenizer)


@pytest.mark.parametrize("pre", RULES)
def test_every_rule_keeps_every_character(pre: str, tmp_path: Path):
    tokenizer = byte_level("<|end|>")
    codec = TextCodec(in_gguf(tmp_path, vocabulary(tokenizer, "gpt2", pre)), 300)
    for text in TEXTS:
        want = normalizers.NFC().normalize_str(text) if RULES[pre].has_nfc else text
        assert codec.decode(codec.encode(text, special=False), skip_special=False) == want


def test_pieces_with_scores(tmp_path: Path):
    """SentencePiece merges the pair with the highest score first; the tokenizer has merges in that order."""
    tokenizer = with_bos(pieces(), "<s>")
    more = vocabulary(tokenizer, "llama")
    order = ["he", "ll", "hell", "hello", "\u2581hello", "\u2581a", "\u2581\u2581"]
    tokens = more["tokenizer.ggml.tokens"]
    more["tokenizer.ggml.scores"] = [-float(order.index(t)) if t in order else -1000.0 for t in tokens]
    more |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.unknown_token_id": 0}
    more["tokenizer.ggml.token_type"][0] = 2
    codec = TextCodec(in_gguf(tmp_path, more), len(tokens))
    check_equal(codec, tokenizer, tuple(t for t in TEXTS if "<|end|>" not in t))
    assert codec.encode("hello")[0] == 1 and codec.encode("hello", special=False)[0] != 1


def test_the_bundled_tokenizer_and_its_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rule of no published tokenizer is refused, unless ``tokenizer.json`` lies next to the file."""
    own = Tokenizer.from_file(str(BUNDLED["tiny"] / "tokenizer.json"))
    config = json.loads((BUNDLED["tiny"] / "tokenizer_config.json").read_text())
    more = vocabulary(own, "gpt2", "tiny") | {"tokenizer.chat_template": config["chat_template"]}
    path = in_gguf(tmp_path, more)
    size = own.get_vocab_size()
    with pytest.raises(ValueError, match=r"model.gguf: .* its rule 'tiny' is not read; gpt-2, .* next to"):
        load_codec(path, size)
    template = load_chat_template(path)
    assert template is not None and template.tokens["eos_token"] == "<|endoftext|>"
    assert template.render([{"role": "user", "content": "hi"}]) == "user: hi\nassistant:"

    (tmp_path / "tokenizer.json").write_bytes((BUNDLED["tiny"] / "tokenizer.json").read_bytes())
    check_equal(TextCodec(path, size), own)
    (tmp_path / "tokenizer.json").unlink()
    from jmoe.checkpoint.gguf import tokenizer as rules

    pattern = json.loads(own.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    monkeypatch.setitem(rules.RULES, "tiny", rules.Rule((pattern,)))
    check_equal(TextCodec(path, size), own)


def test_a_file_without_a_vocabulary_has_no_codec(tmp_path: Path):
    hf_tiny.write_checkpoint(tmp_path / "hf", hf_tiny.hf_config())
    write_gguf(tmp_path / "hf", tmp_path / "m.gguf", more={"tokenizer.ggml.model": "no_vocab"})
    assert load_codec(tmp_path / "m.gguf", 96) is None and load_chat_template(tmp_path / "m.gguf") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.tokens": ["a", "a", "b"]}, r"tokens has 'a' twice"),
        ({"tokenizer.ggml.token_type": [1]}, r"token_type is not a list of 3 numbers"),
        ({"tokenizer.ggml.model": "bert"}, r"its kind 'bert' is not read"),
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, r"tokens is not a list of texts"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(change: dict, message: str, tmp_path: Path):
    good = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.token_type": [1, 1, 1],
    }  # fmt: skip
    path = in_gguf(tmp_path, good | change)
    with pytest.raises(ValueError, match=f"model.gguf: .*{message}") as error:
        load_codec(path, 3)
    assert "\n" not in str(error.value)


def test_the_keys_are_the_package_s():
    keys = gguf.Keys.Tokenizer
    assert {keys.MODEL, keys.PRE, keys.LIST, keys.TOKEN_TYPE, keys.MERGES, keys.ADD_BOS} == {
        f"tokenizer.ggml.{name}"
        for name in ("model", "pre", "tokens", "token_type", "merges", "add_bos_token")
    }
    assert keys.CHAT_TEMPLATE == "tokenizer.chat_template"
