"""Small tokenizers in the shapes that published checkpoints have, built from vocabularies of our own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

FAST, LLAMA = "PreTrainedTokenizerFast", "LlamaTokenizerFast"


def byte_level(*special: str, prefix: bool = False) -> Tokenizer:
    """Returns a tokenizer like Qwen3's, gpt-oss' and DeepSeek's: 256 letters for the bytes, a few words."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"he": 256, "ll": 257, "hell": 258, "hello": 259, "Ġhello": 260, "Ġhe": 261}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "he"), ("Ġ", "hello")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def pieces() -> Tokenizer:
    """Returns a tokenizer like Mixtral's and Phi's: pieces with a mark for spaces, bytes if no piece fits."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    words = ("▁", "h", "e", "l", "o", "a", "b", "he", "ll", "hell", "hello", "▁hello", "▁a", "▁▁")
    vocabulary |= {piece: 259 + i for i, piece in enumerate(words)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "a"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    id = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, id)])
    return tokenizer


def cut_and_padded() -> Tokenizer:
    """Returns a tokenizer as a trainer saves it after its last call."""
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8, pad_id=0)
    return tokenizer


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content} | plain | flags


def folder(at: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(at / "tokenizer.json"))
    for name, value in files.items():
        (at / f"{name}.json").write_text(json.dumps(value))
    return at


def _mixtral(**more: Any) -> dict[str, Any]:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"} | names | more}


def _config(kind: str, **more: Any) -> dict[str, Any]:
    return {"tokenizer_config": {"tokenizer_class": kind} | more}


TURN, TOOL = {"262": token("<|turn|>")}, {"263": token("<tool>", special=False)}
BOS = {"__type": "AddedToken"} | token("<bos>")
# Name -> how its tokenizer is made, and the files that come with it.
SHAPES: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "bare": (byte_level, {}),
    "stored truncation": (cut_and_padded, _config(FAST)),
    "added_tokens_decoder": (byte_level, _config("Qwen2Tokenizer", added_tokens_decoder=TURN | TOOL)),
    "rstrip": (byte_level, _config(FAST, added_tokens_decoder={"262": token("<|turn|>", rstrip=True)})),
    "special_tokens_map": (
        byte_level,
        _config(FAST)
        | {"special_tokens_map": {"bos_token": "<bos>", "additional_special_tokens": ["<x>"]}},
    ),
    "special_tokens_map is newer": (
        byte_level,
        _config(FAST, bos_token="<c>") | {"special_tokens_map": {"bos_token": "<bos>"}},
    ),
    "special_tokens_map is older": (
        byte_level,
        _config(FAST, bos_token="<c>", added_tokens_decoder=TURN)
        | {"special_tokens_map": {"bos_token": "<bos>"}},
    ),
    "added_tokens": (
        byte_level,
        _config(FAST, pad_token="<pad>") | {"added_tokens": {"<pad>": 262, "hellohello": 263}},
    ),
    "additional_special_tokens": (byte_level, _config(FAST, additional_special_tokens=["<x>", "<y>"])),
    "split_special_tokens": (lambda: byte_level("<x>"), _config(FAST, split_special_tokens=True)),
    "add_prefix_space": (byte_level, _config(FAST, add_prefix_space=True)),
    "no add_prefix_space": (
        lambda: byte_level(prefix=True), _config("GPT2Tokenizer", add_prefix_space=False)
    ),
    "DeepSeek": (
        lambda: byte_level("<bos>", "</s>"),
        _config(LLAMA, add_bos_token=True, bos_token=BOS, eos_token="</s>"),
    ),
    "fast class": (lambda: byte_level("<bos>"), _config(FAST, add_bos_token=True, bos_token="<bos>")),
    "NeoX": (
        lambda: with_bos(byte_level("<|endoftext|>"), "<|endoftext|>"), _config("GPTNeoXTokenizer")
    ),
    "Mixtral": (pieces, _mixtral()),
    "Mixtral without BOS": (lambda: with_bos(pieces(), "<s>"), _mixtral(add_bos_token=False)),
    "Mixtral with EOS": (pieces, _mixtral(add_eos_token=True)),
    "Mixtral by its model type": (pieces, {"config": {"model_type": "mixtral"}}),
}  # fmt: skip
