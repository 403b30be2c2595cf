"""What the callers of an engine need to know of its model."""

from dataclasses import dataclass

from jmoe.engine.text.codec import TextCodec


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that stay the same while its engine lives.

    codec: the model's text codec; None = the model has no tokenizer and prompts are token ids.
    max_model_len: maximum number of tokens of a prompt and its answer together.
    vocab_size: size of the vocabulary, which all token ids are below.
    end_ids: the model's end-of-text tokens.
    """

    codec: TextCodec | None
    max_model_len: int
    vocab_size: int
    end_ids: frozenset[int]
