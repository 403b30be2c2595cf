"""Loads a checkpoint's tokenizer from all the files that it may consist of.

``tokenizer.json`` has the vocabulary and the rules; ``tokenizer_config.json``, ``special_tokens_map.json``
and ``added_tokens.json`` name further tokens and change what is added around a text. They are read as
transformers 4.57 reads them, for which most checkpoints were published; a checkpoint that transformers 5
saved has all of it in ``tokenizer.json``.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

from jmoe.checkpoint.source import TOKENIZER, ModelFiles, Source, source_of

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE = "additional_special_tokens"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
FOREIGN = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json")  # other formats of a vocabulary
SPARE_IDS = 1 << 16  # ids beyond the model's vocabulary that a tokenizer may have, such as an added [PAD]
ENDS = "<|endoftext|>"

# Special tokens of a class if no file names them.
CLASS_TOKENS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "CodeLlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
    },
    "GPTNeoXTokenizer": {"bos_token": ENDS, "eos_token": ENDS, "unk_token": ENDS},
    "GPT2Tokenizer": {"bos_token": ENDS, "eos_token": ENDS, "unk_token": ENDS},
    "Qwen2Tokenizer": {"eos_token": ENDS, "unk_token": ENDS, "pad_token": ENDS},
}
# Classes that make a new post-processor from add_bos_token and add_eos_token: whether BOS is the default.
ADDS_BOS = {
    "LlamaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}
# The tokenizer class by model type, if tokenizer_config.json names none.
CLASS_OF = {
    **dict.fromkeys(
        ("mixtral", "deepseek_v2", "deepseek_v3", "phimoe", "llama4", "jetmoe"), "LlamaTokenizer"
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "minimax"), "GPT2Tokenizer"),
    "olmoe": "GPTNeoXTokenizer",
}


@contextmanager
def guarded(action: str) -> Iterator[None]:
    """Wraps every call of the tokenizers library and turns its errors into ValueError.

    The library raises bare Exceptions, and a panic in its Rust code is a BaseException that no
    ``except Exception`` catches.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"the tokenizer cannot {action}: {line}") from None


def json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises ValueError if the file holds something else."""
    return _object(path.read_bytes())


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, it is {type(value).__name__}")
    return value


@dataclass(frozen=True)
class TokenizerConfig:
    """The contents of the tokenizer files other than ``tokenizer.json``.

    values: contents of ``tokenizer_config.json``.
    class_name: class of the tokenizer without "Fast"; "" if no file names it.
    special_tokens: special tokens by name.
    extra_tokens: special tokens without a name of their own.
    added_tokens: further tokens, in the order of their ids.
    """

    values: dict[str, Any]
    class_name: str
    special_tokens: dict[str, AddedToken]
    extra_tokens: list[AddedToken] = field(default_factory=list)
    added_tokens: list[AddedToken] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether transformers 5 saved it; then ``tokenizer.json`` has what the other files say."""
        return "backend" in self.values

    def names(self) -> dict[str, Any]:
        """Returns the special tokens' texts, by the names that chat templates use."""
        more = [token.content for token in self.extra_tokens]
        return {name: t.content for name, t in self.special_tokens.items()} | ({MORE: more} if more else {})


def read_config(model: ModelFiles) -> TokenizerConfig:
    """Reads the files other than ``tokenizer.json``. A ValueError names the file that cannot be read."""
    source = source_of(model)
    config = _optional(source, "tokenizer_config.json")
    kind = _kind(config, source)
    found = dict(config)
    decoder = config.get("added_tokens_decoder")
    named, older, before = {}, {}, []
    if decoder is None:  # an older checkpoint has these two files instead
        named = _optional(source, "special_tokens_map.json")
        older = _optional(source, "added_tokens.json")
        before = found.get(MORE) or []
        found |= named
    try:
        if MORE in named:
            found[MORE] = [*before, *(named[MORE] or [])]
        special, more = _special(found)
        chosen = {t.content for t in (*special.values(), *more)}
        added = _added(decoder, older, chosen)
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        cause = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"{source.path}: the tokenizer's added tokens cannot be read: {cause}") from None
    if not config.get("backend"):
        defaults = CLASS_TOKENS.get(kind, {}).items()
        special |= {n: AddedToken(t, special=True) for n, t in defaults if n not in found}
    return TokenizerConfig(config, kind, special, more, added)


def _optional(source: Source, name: str) -> dict[str, Any]:
    try:
        text = source.read_text(name)
        return {} if text is None else _object(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {source.text_path(name)}: {error}") from None


def _kind(config: dict[str, Any], source: Source) -> str:
    named = config.get("tokenizer_class")
    if not isinstance(named, str):
        model = _optional(source, "config.json")
        named = model.get("tokenizer_class") or CLASS_OF.get(str(model.get("model_type")), "")
    return str(named).removesuffix("Fast")


def _special(values: dict[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Returns the special tokens with a name, and the others, which transformers 5 calls
    extra_special_tokens."""
    named = {name: values[name] for name in NAMES if values.get(name) is not None}
    extra = values.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    more = {t.content: t for t in map(_special_token, [*(values.get(MORE) or []), *extra])}
    return {name: _special_token(value) for name, value in named.items()}, list(more.values())


def _special_token(value: Any) -> AddedToken:
    return _token(value | {"special": True}) if isinstance(value, dict) else AddedToken(value, special=True)


def _added(decoder: Any, added_ids: dict[str, Any], special_texts: set[str]) -> list[AddedToken]:
    """Returns the added tokens, in the order of their ids.

    special_texts: texts of the special tokens.
    """
    tokens = {int(id): _token(value) for id, value in (decoder or {}).items()}
    for text, id in added_ids.items():
        special = text in special_texts
        tokens[int(id)] = AddedToken(text, normalized=not special, special=special)
    for token in tokens.values():
        token.special = token.special or token.content in special_texts
    return [tokens[id] for id in sorted(tokens)]


def _token(value: dict[str, Any]) -> AddedToken:
    flags = {name: bool(value[name]) for name in FLAGS if name in value}
    return AddedToken(value["content"], **flags)


def load_tokenizer(source: Source, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a checkpoint; raises a one-line ValueError if it has none that can be read.

    vocab_size: vocabulary size of the model, which limits the ids.
    """
    path, text = source.text_path(TOKENIZER), source.read_text(TOKENIZER)
    if text is None:
        raise ValueError(
            missing(source.path) or f"{source.path} has no tokenizer.json; prompts must be token ids"
        )
    try:
        with guarded("be read"):
            tokenizer = Tokenizer.from_buffer(text)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    config = read_config(source)
    with guarded("take its added tokens"):
        tokenizer.no_truncation()  # every trainer stores the settings of its last call
        tokenizer.no_padding()
        _add_tokens(tokenizer, config)
        _apply(tokenizer, config)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder().keys()
    check_ids(vocabulary, added, vocab_size, path)
    return tokenizer


def missing(directory: Path) -> str | None:
    """Returns why a directory without ``tokenizer.json`` is refused, or None if it has no tokenizer at
    all."""
    has = next((name for name in FOREIGN if (directory / name).is_file()), None)
    if has is None:
        return None
    command = (
        "python -c 'import sys; from transformers import AutoTokenizer as T; "
        f'T.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])\' "{directory}"'
    )
    return (
        f"{directory} has {has} and no tokenizer.json. Make one (pip install transformers sentencepiece "
        f"tiktoken protobuf): {command}"
    )


def _add_tokens(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Adds tokens that the vocabulary lacks or has with other flags, as transformers does."""
    have = {_identity(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = [token for token in config.added_tokens if _identity(token) not in have]
    known = {content for content, *_ in have} | {token.content for token in tokens}
    defaults = CLASS_TOKENS.get(config.class_name, {})
    for name, token in (*config.special_tokens.items(), *((MORE, token) for token in config.extra_tokens)):
        # A class's default names a token; it does not promise that the vocabulary has it.
        is_default = name not in config.values and defaults.get(name) == token.content
        if token.content not in known and not (is_default and tokenizer.token_to_id(token.content) is None):
            known.add(token.content)
            tokens.append(token)
    tokenizer.add_tokens(tokens)


def _identity(token: AddedToken) -> tuple:
    return token.content, *(getattr(token, flag) for flag in FLAGS)


def _apply(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Applies the configuration's changes to the tokenizer's rules."""
    values = config.values
    if values.get("split_special_tokens"):
        tokenizer.encode_special_tokens = True
    if config.is_complete or not (values or config.class_name):
        return
    prefix = values.get("add_prefix_space", None if config.class_name in ADDS_BOS else False)
    pre_tokenizer = tokenizer.pre_tokenizer
    if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) and isinstance(prefix, bool):
        pre_tokenizer.add_prefix_space = prefix
        tokenizer.pre_tokenizer = pre_tokenizer
    if config.class_name in ADDS_BOS:
        _set_ends(tokenizer, config)


def _set_ends(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Sets a post-processor that adds BOS and EOS as configured, whatever ``tokenizer.json`` says."""
    wanted = {
        "bos_token": config.values.get("add_bos_token", ADDS_BOS[config.class_name]),
        "eos_token": config.values.get("add_eos_token", False),
    }
    ends = {}
    for name, token in config.special_tokens.items():
        id = tokenizer.token_to_id(token.content)
        if wanted.get(name) and id is not None:
            ends[name] = (token.content, id)
    parts = [ends.get("bos_token", ("", 0))[0], "$A", ends.get("eos_token", ("", 0))[0]]
    single = [part for part in parts if part]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=list(ends.values())
    )


def check_ids(vocabulary: dict[str, int], added: Collection[int], vocab_size: int, path: Path) -> None:
    """Raises ValueError if an id is outside the model's vocabulary, or if two tokens have the same id.

    added: ids of added tokens. Some of these may be outside: fine-tunes add a [PAD] and do not change the
    model, and texts without that token work.
    """
    if not vocabulary:
        raise ValueError(f"{path} has no tokens")
    beyond = {t: i for t, i in vocabulary.items() if i >= vocab_size + (SPARE_IDS if i in added else 0)}
    if beyond and len(vocabulary) > vocab_size:
        raise ValueError(f"{path} has {len(vocabulary)} tokens, the model's vocabulary {vocab_size}")
    for token, id in beyond.items():
        raise ValueError(
            f"{path} gives {token[:50]!r} the id {id}, which is outside the model's {vocab_size} tokens"
        )
    seen: dict[int, str] = {}
    for token, id in vocabulary.items():
        if (other := seen.setdefault(id, token)) != token:
            first, second = sorted([other, token])
            raise ValueError(f"{path} gives the id {id} to two tokens: {first[:50]!r} and {second[:50]!r}")
