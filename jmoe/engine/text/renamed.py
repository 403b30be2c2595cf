"""A tokenizer that knows some of its tokens only by other names.

Its tokens and ids are those of the original. Only the text that stands for a renamed token differs, so the
letters of the old name are ordinary text: they become what they would be if there were no such token.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.tokenizer_files import guarded


def renamed_codec(codec: TextCodec, names: Mapping[str, str]) -> TextCodec:
    """Returns a codec whose tokens have the ids of ``codec``. Raises ValueError if a token would not be found
    by its new name.

    names: new name by name.
    """
    made = copy.copy(codec)
    made.tokenizer = renamed_tokenizer(codec.tokenizer, names)
    return made


def renamed_tokenizer(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """Returns a copy of ``tokenizer`` with other names for some added tokens."""
    with guarded("be copied"):
        rules: dict[str, Any] = json.loads(tokenizer.to_str())
        for token in rules["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename_in_model(rules["model"], names)
        made = Tokenizer.from_str(json.dumps(rules, ensure_ascii=False))
        made.encode_special_tokens = tokenizer.encode_special_tokens
    for old, new in names.items():
        if _ids(made, new) != [tokenizer.token_to_id(old)]:
            raise ValueError(f"the tokenizer cannot take {old[:64]!r} as plain text")
    return made


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Renames tokens in the vocabulary, and leaves out the merges that make them."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    elif isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    with guarded("encode this text"):
        return tokenizer.encode(text, add_special_tokens=False).ids
