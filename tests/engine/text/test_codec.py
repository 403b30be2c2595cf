"""Tests answers that grow token by token, the codec's refusals, and the limits of sampling parameters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jmoe.engine.request import SamplingParams
from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> TextCodec:
    """Returns a codec of one token a byte, and a special end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    directory = tmp_path_factory.mktemp("codec")
    tokenizer.save(str(directory / "tokenizer.json"))
    return TextCodec(directory, 257)


@settings(deadline=None)
@given(text=st.text(max_size=40), stop=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_streamed_text_is_the_text_up_to_the_first_stop(codec: TextCodec, text: str, stop: list[str]):
    text = text.encode("utf-8", "ignore").decode().replace("\ufffd", "")
    detokenizer, got = Detokenizer(codec, stop), ""
    for token in codec.encode(text):
        piece = detokenizer.push(token)
        assert "\ufffd" not in piece
        got += piece
        if detokenizer.stop_match is not None:
            break
    else:
        got += detokenizer.flush()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert got == text and detokenizer.stop_match is None
    else:
        first = min(ends)  # the stop string that is complete first
        cut = min(text[:first].find(s) for s in stop if s in text[:first])
        assert got == text[:cut] and detokenizer.stop_match in stop


def test_half_a_character_is_held_back_and_flushed(codec: TextCodec):
    detokenizer = Detokenizer(codec)
    first, second = codec.encode("é")
    assert detokenizer.push(first) == ""
    assert detokenizer.push(second) == "é"
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd", "an unfinished character shows at the end, it is not lost"


def test_the_end_of_a_text_may_stay(codec: TextCodec):
    """The stop string, the text of a token that ends the answer, and special tokens each stay if wanted."""
    end, x = codec.tokenizer.token_to_id("<end>"), codec.encode("x")[0]

    def text(last: int, **given: bool) -> tuple[str, str]:
        detokenizer = Detokenizer(codec, ("cd",), [], **given)
        pushed = "".join(map(detokenizer.push, [*codec.encode("abc"), end]))
        return pushed + detokenizer.push_end(last) + detokenizer.flush(), _stopped(codec, **given)

    assert text(end) == ("abc", "ab") and text(x) == ("abc", "ab")
    assert text(end, keeps_stop=True) == ("abc", "abcd") and text(x, keeps_stop=True) == ("abcx", "abcd")
    assert text(end, shows_special=True) == ("abc<end><end>", "ab")
    assert text(x, shows_special=True) == ("abc<end>", "ab"), "a token of stop_token_ids has no text"


def _stopped(codec: TextCodec, **given: bool) -> str:
    detokenizer = Detokenizer(codec, ("cd",), [], **given)
    return "".join(map(detokenizer.push, codec.encode("abcd")))


def test_codec_refusals(codec: TextCodec, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json; prompts must be token ids"):
        TextCodec(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        TextCodec(tmp_path, 10)
    codec.tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 257 tokens, the model's vocabulary 10"):
        TextCodec(tmp_path, 10)
    with pytest.raises(ValueError, match="lone surrogate"):
        codec.encode("a\ud800")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be between 0 and 2"),
        ({"temperature": 2.5}, "temperature must be between 0 and 2"),
        ({"top_p": -1e-9}, "top_p must be between 0 and 1"),
        ({"top_p": float("nan")}, "top_p must be between 0 and 1"),
        ({"top_k": -2}, "top_k must be at least -1"),
        ({"seed": 2**63}, "seed must fit 64 bits"),
        ({"stop": ("",)}, "non-empty"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20"),
        ({"min_tokens": 20, "max_tokens": 4}, "min_tokens must be between 0 and max_tokens"),
    ],
)
def test_sampling_params_name_the_limit(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)
