"""The answers in progress: what each sampled token adds to its answer, and whether it ends the answer."""

from collections.abc import Collection, Sequence

from jmoe.engine.request import FinishReason, Output, Request
from jmoe.engine.step.results import PromptScores, token_logprob
from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.detokenizer import Detokenizer


def detokenizers(requests: Sequence[Request], codec: TextCodec | None) -> dict[str, Detokenizer]:
    """Returns detokenizers by request id, or an empty dictionary without a codec. Raises ValueError for a
    prompt that the codec cannot decode."""
    if codec is None:
        return {}
    return {request.id: _detokenizer(request, codec) for request in requests}


def _detokenizer(request: Request, codec: TextCodec) -> Detokenizer:
    prompt = None if request.constraint is not None else request.prompt_token_ids
    params = request.params
    return Detokenizer(
        codec,
        params.stop,
        prompt,
        request.markup,
        keeps_stop=params.include_stop_str_in_output,
        shows_special=not params.skip_special_tokens,
    )


def accept(request: Request, token: int, end_ids: Collection[int]) -> str | None:
    """Advances the request's grammar by a token; returns the cause if that fails, else None. An end token of
    the model that the request ignores is no part of the text that the grammar derives."""
    if request.constraint is None or (request.params.ignore_eos and token in end_ids):
        return None
    try:
        request.constraint.accept(token)
        request.caution.accept()
    except ValueError as error:
        return str(error)
    return None


class Answers:
    """State of the requests whose answers have not ended.

    scores: scores of their prompts.
    end_ids: end tokens of the model.
    max_model_len: most tokens of a request, with its prompt.
    """

    def __init__(self, scores: PromptScores, end_ids: Collection[int], max_model_len: int):
        self.scores, self.end_ids, self.max_model_len = scores, end_ids, max_model_len
        self._texts: dict[str, Detokenizer] = {}

    def begin(self, requests: Sequence[Request], texts: dict[str, Detokenizer]) -> None:
        """Begins the answers to these requests.

        texts: detokenizers of these requests, by request id.
        """
        self._texts |= texts
        for request in requests:
            self.scores.want(request)

    def forget(self, request: Request) -> None:
        self._texts.pop(request.id, None)
        self.scores.take(request)

    def scores_only(self, request: Request) -> Output:
        """Returns the whole answer to a request that wants only its prompt's scores."""
        return Output(request.id, prompt_logprobs=self.scores.take(request), finish_reason="length")

    def next_output(self, request: Request, token: int, scores: tuple) -> Output:
        """Returns the increment that the request's newest token gives to its client. Raises ValueError if the
        tokenizer fails.

        scores: see ``token_logprob``.
        """
        params, finish, stopped_by = request.params, self._end_reason(request, token), None
        text, thoughts, is_thought = "", "", False
        detokenizer = self._texts.get(request.id)
        if finish is not None:
            stopped_by = token if token in params.stop_token_ids else None
            text = "" if detokenizer is None else detokenizer.push_end(token)
        elif detokenizer is not None:
            text = detokenizer.push(token, may_stop=len(request.token_ids) >= params.min_tokens)
            thoughts, is_thought = detokenizer.thoughts, detokenizer.is_thought
            if detokenizer.stop_match is not None:
                finish, stopped_by = "stop", detokenizer.stop_match
        is_full = len(request.token_ids) == params.max_tokens or request.length == self.max_model_len
        if finish is None and is_full:
            finish = "length"
        if finish is not None and detokenizer is not None and detokenizer.stop_match is None:
            text += detokenizer.flush()
            thoughts += detokenizer.thoughts
        logprobs = ()
        if params.logprobs is not None:
            logprobs = (token_logprob(token, scores, params.logprobs),)
        return Output(
            request.id,
            (token,),
            text=text,
            thoughts=thoughts,
            num_thought_tokens=int(is_thought),
            logprobs=logprobs,
            prompt_logprobs=self.scores.take(request),
            finish_reason=finish,
            stop_reason=stopped_by,
        )

    def _end_reason(self, request: Request, token: int) -> FinishReason | None:
        """Returns ``"stop"`` if the token itself ends the answer, else None."""
        params = request.params
        is_end = token in self.end_ids and not params.ignore_eos
        return "stop" if is_end or token in params.stop_token_ids else None
