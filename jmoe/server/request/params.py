"""From a request body to the engine's sampling parameters, one set per answer."""

import dataclasses
import secrets

from jmoe.engine.request import SamplingParams
from jmoe.server.errors import invalid
from jmoe.server.request.checks import CheckedChat
from jmoe.server.request.schema import MAX_CHOICES, CompletionRequest, GenerationRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions; chat goes on to the end of the context


def completion_params(body: CompletionRequest, vocab_size: int) -> SamplingParams:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else _limit(body.max_tokens)
    scored = [n for n in (body.logprobs if body.echo else None, body.prompt_logprobs) if n is not None]
    return _params(body, vocab_size, max_tokens, body.logprobs, max(scored, default=None))


def chat_params(chat: CheckedChat, vocab_size: int, turn_ends: tuple[str, ...]) -> SamplingParams:
    """Returns the sampling parameters of a chat.

    turn_ends: strings of the model that end a turn. They are added to ``stop`` unless the answer follows a
        grammar that defines where it ends: such a string may occur inside it.
    """
    body = chat.body
    limit = _limit(body.max_completion_tokens if body.max_tokens is None else body.max_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _params(body, vocab_size, limit, logprobs, body.prompt_logprobs)
    is_free = chat.grammar is None or chat.grammar.is_free
    stop = (*params.stop, *turn_ends) if is_free else params.stop
    return dataclasses.replace(params, stop=stop)


def _limit(max_tokens: int | None) -> int | None:
    """Returns the limit on the answer; None = the rest of the context, which llama-server's API writes as
    -1."""
    return None if max_tokens == -1 else max_tokens


def _params(
    body: GenerationRequest,
    vocab_size: int,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    for field in ("stop_token_ids", "allowed_token_ids"):
        outside = next((t for t in getattr(body, field) or () if t >= vocab_size), None)
        if outside is not None:
            raise invalid(f"{field}: {outside} is not below the vocabulary's {vocab_size}", field)
    repetition = body.repeat_penalty if body.repetition_penalty is None else body.repetition_penalty
    allowed = body.allowed_token_ids
    stop = (body.stop,) if isinstance(body.stop, str) and body.stop else tuple(body.stop or ())
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            min_p=body.min_p or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            repetition_penalty=1.0 if repetition is None else repetition,
            allowed_token_ids=None if allowed is None else tuple(allowed),
            bad_words=tuple(body.bad_words or ()),
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            seed=body.seed,
            stop=stop,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            min_tokens=body.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=_biases(body.logit_bias or {}, vocab_size),
            cache_salt=body.cache_salt or "",
            exact=bool(body.moe and body.moe.exact),
        )
    except ValueError as error:  # the message begins with the field
        raise invalid(str(error), str(error).partition(" ")[0]) from None


def _biases(logit_bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Returns (token id, addend) pairs. JSON keys are strings, so the ids arrive as decimal digits."""
    for key in logit_bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise invalid(
                f"logit_bias: {key[:40]!r} is not a token id below the vocabulary's {vocab_size}",
                "logit_bias",
            )
    if len({int(key) for key in logit_bias}) < len(logit_bias):
        raise invalid("logit_bias: a token id is given twice", "logit_bias")
    return tuple((int(key), value) for key, value in logit_bias.items())


def fan_out(params: SamplingParams, prompts: int, n: int) -> list[SamplingParams]:
    """Returns the parameters of every answer, prompt-major. Answer i of a prompt uses ``seed + i``; None is a
    random seed."""
    if prompts * n > MAX_CHOICES:
        raise invalid(f"{prompts} prompts with n = {n}: at most {MAX_CHOICES} answers a request", "n")
    return [dataclasses.replace(params, seed=_seed(params.seed, i)) for _ in range(prompts) for i in range(n)]


def _seed(base: int | None, i: int) -> int:
    """Returns the sum, which wraps around 64 bits."""
    return secrets.randbits(31) if base is None else (base + i + 2**63) % 2**64 - 2**63
