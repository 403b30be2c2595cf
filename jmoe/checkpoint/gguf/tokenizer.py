"""The tokenizer of a GGUF file as the texts of ``tokenizer.json`` and ``tokenizer_config.json``.

The file has the vocabulary, the merges and the name of the rule that splits a text. The rules are those of
the published tokenizers that have these names in llama.cpp.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
SPECIAL = ("bos", "eos", "unk", "pad")
LONG_NAMES = {"unk": "unknown", "pad": "padding"}  # in keys
NO_VOCABULARY = (None, "no_vocab", "none")
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # types of tokens
SPACE = "\u2581"

_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDS}?"


@dataclass(frozen=True)
class Rule:
    """The rules by which a text is split before merges apply.

    patterns: regular expressions; each splits what those before it left.
    is_gpt2: whether GPT-2's own pattern follows.
    has_nfc: whether a text is brought into Unicode's composed form first.
    ignores_merges: whether a word that is a token as a whole needs no merges.
    adds_bos: whether a BOS token begins a text, if the file does not say so.
    """

    patterns: tuple[str, ...] = ()
    is_gpt2: bool = False
    has_nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_GPT2 = Rule(is_gpt2=True)
_QWEN = Rule((rf"{_ENDS}|{_WORDS}|\p{{N}}|{_MARKS}",), has_nfc=True)
_THREE_DIGITS = (rf"{_ENDS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}",)
_DIGITS = Rule((r"\p{N}",), is_gpt2=True)
_OF_CASE = Rule((rf"{_CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",))
_DEEPSEEK3 = Rule(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    )
)
RULES = {
    "gpt-2": _GPT2,
    "olmo": Rule(is_gpt2=True, has_nfc=True),
    "qwen2": _QWEN,
    "llama-bpe": Rule(_THREE_DIGITS, ignores_merges=True, adds_bos=True),
    "glm4": Rule(_THREE_DIGITS),
    "chatglm-bpe": Rule(_THREE_DIGITS),
    "refact": _DIGITS,
    "gpt-4o": _OF_CASE,
    "deepseek-v3": _DEEPSEEK3,
}


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    return metadata.get(f"{KEY}model") not in NO_VOCABULARY


def why_unread(metadata: Mapping[str, Any]) -> str | None:
    """Returns why the tokenizer of a file is not read, or None if it is."""
    kind, rule = metadata.get(f"{KEY}model"), metadata.get(f"{KEY}pre")
    if kind == "llama" or (kind == "gpt2" and rule in RULES):
        return None
    if kind == "gpt2":
        return f"its rule {rule!r} is not read; {', '.join(RULES)} are"
    return f"its kind {kind!r} is not read; 'gpt2', 'llama' are"


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``tokenizer_config.json`` says: the special tokens and the chat template."""
    tokens, named = _tokens(metadata), {}
    for name in SPECIAL:
        id = metadata.get(f"{KEY}{LONG_NAMES.get(name, name)}_token_id")
        if type(id) is int and 0 <= id < len(tokens):
            named[f"{name}_token"] = tokens[id]
    template = metadata.get(TEMPLATE)
    return {
        "backend": "gguf",  # the other text is complete
        "tokenizer_class": "PreTrainedTokenizer",
        **named,
        **({} if template is None else {"chat_template": template}),
    }


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``tokenizer.json`` says; raises ValueError naming the key that is wrong."""
    tokens = _tokens(metadata)
    kinds = _list(metadata, "token_type", len(tokens), 1)
    kept = {id: token for id, token in enumerate(tokens) if kinds[id] != UNUSED}
    vocabulary = {token: id for id, token in kept.items()}
    if len(vocabulary) < len(kept):
        twice = next(token for id, token in kept.items() if vocabulary[token] != id)
        raise ValueError(f"{KEY}tokens has {twice[:50]!r} twice")
    added = [
        _added(id, token, is_special=kinds[id] == CONTROL)
        for id, token in kept.items()
        if kinds[id] in (CONTROL, USER_DEFINED)
    ]
    is_pieces = metadata.get(f"{KEY}model") == "llama"
    make = _pieces if is_pieces else _byte_level
    adds_bos = is_pieces or RULES[str(metadata.get(f"{KEY}pre"))].adds_bos
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _ends(metadata, tokens, adds_bos=adds_bos),
        **make(metadata, vocabulary, kinds),
    }


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ValueError(f"{KEY}tokens is not a list of texts")
    return tokens


def _list(metadata: Mapping[str, Any], name: str, length: int, default: Any) -> list[Any]:
    """Returns an array with one number a token."""
    values = metadata.get(KEY + name)
    if values is None:
        return [default] * length
    if not isinstance(values, list) or len(values) != length or isinstance(values[0], str):
        raise ValueError(f"{KEY}{name} is not a list of {length} numbers, as many as {KEY}tokens has")
    return values


def _added(id: int, text: str, *, is_special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": is_special}


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int], kinds: list[int]) -> dict[str, Any]:
    rule = RULES[metadata[f"{KEY}pre"]]
    merges = metadata.get(f"{KEY}merges", [])
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ValueError(f"{KEY}merges is not a list of texts")
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in rule.patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "normalizer": {"type": "NFC"} if rule.has_nfc else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, level | {"use_regex": rule.is_gpt2}],
        },
        "decoder": level | {"use_regex": False},
        "model": _bpe(vocabulary, merges, ignore_merges=rule.ignores_merges),
    }


def _pieces(metadata: Mapping[str, Any], vocabulary: dict[str, int], kinds: list[int]) -> dict[str, Any]:
    """Returns SentencePiece's rules (the kind "llama"): the pair whose token has the highest score is merged
    first."""
    scores = _list(metadata, "scores", len(kinds), 0.0)
    unknown = next((token for token, id in vocabulary.items() if kinds[id] == UNKNOWN), None)
    prefix = metadata.get(f"{KEY}add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
        "model": _bpe(vocabulary, list(_merges(vocabulary, scores)), unk_token=unknown, byte_fallback=True),
    }


def _merges(vocabulary: dict[str, int], scores: list[float]) -> Iterator[str]:
    """Yields the pairs of tokens that are a token together, the first one to be merged first."""
    pairs = [
        (-scores[id], id, at, token)
        for token, id in vocabulary.items()
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    return (f"{token[:at]} {token[at:]}" for _, _, at, token in sorted(pairs) if " " not in token)


def _bpe(vocabulary: dict[str, int], merges: list[str], **options: Any) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": options.get("unk_token") is not None,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return model | options | {"vocab": vocabulary, "merges": merges}


def _ends(metadata: Mapping[str, Any], tokens: list[str], *, adds_bos: bool) -> dict[str, Any] | None:
    """Returns the post-processor that adds BOS and EOS, or None if neither is added."""
    adds_bos = metadata.get(f"{KEY}add_bos_token", adds_bos)
    wanted = {"bos": adds_bos, "eos": metadata.get(f"{KEY}add_eos_token")}
    found: dict[str, tuple[str, int]] = {}
    for name, is_wanted in wanted.items():
        id = metadata.get(f"{KEY}{name}_token_id")
        if is_wanted and type(id) is int and 0 <= id < len(tokens):
            found[name] = (tokens[id], id)
    if not found:
        return None

    def special(name: str) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": found[name][0], "type_id": 0}}] if name in found else []

    first, second = ([{"Sequence": {"id": text, "type_id": n}}] for n, text in enumerate("AB"))
    single = [*special("bos"), *first, *special("eos")]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second],
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]} for text, id in found.values()},
    }
