"""The two answer formats: what a choice looks like, whole and as increments of a stream."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from jmoe.engine.request import Output, Request, TokenLogprob
from jmoe.engine.text.channels import AnswerText
from jmoe.engine.text.codec import TextCodec
from jmoe.server.answer.logprobs import chat_logprobs, completion_logprobs
from jmoe.server.request.prompts import Prompt


class AnswerFormat(Protocol):
    """How the choices of an answer are written.

    object: value of the ``object`` field of a whole answer.
    chunk_object: the same for a stream's chunk.
    opening: returns the choices to stream before any token.
    delta: returns one increment of choice ``index`` as a stream's choice.
    choice: returns all increments of choice ``index`` as one choice.
    A format made with ``token_ids`` also writes the field of that name, as vLLM does; a model without a
    tokenizer can answer nothing else.
    """

    object: str
    chunk_object: str

    def opening(self) -> list[dict[str, Any]]: ...
    def delta(self, index: int, output: Output) -> dict[str, Any]: ...
    def choice(self, index: int, outputs: Sequence[Output]) -> dict[str, Any]: ...


class Places:
    """Character positions at which the tokens of one choice begin in its text."""

    def __init__(self, prompt: Prompt, codec: TextCodec | None, *, echo: bool):
        self.prompt, self.codec = prompt, codec
        self.at = len(prompt.text) if echo else 0
        self.text = None if codec is None else AnswerText(codec.token_bytes, prompt.token_ids)

    def of_prompt(self) -> list[int]:
        return [0] * len(self.prompt.token_ids) if self.codec is None else self.prompt.offsets(self.codec)

    def place(self, token_id: int) -> int:
        """The position of the answer's next token; for a part of a character, where the character begins."""
        begins = self.at
        self.at += 0 if self.text is None else len(self.text.push(token_id)[0])
        return begins


class CompletionFormat:
    """Text completions. Choices are prompt-major: choice i continues prompt i // n.

    An echoed prompt precedes the first increment's text; its log-probabilities precede the first token's.
    """

    object = chunk_object = "text_completion"

    def __init__(
        self,
        codec: TextCodec | None,
        prompts: list[Prompt],
        n: int,
        *,
        echo: bool,
        logprobs: bool,
        token_ids: bool,
    ):
        self.codec, self.prompts, self.n = codec, prompts, n
        self.echo, self.logprobs, self.token_ids = echo, logprobs, token_ids
        self.places: list[Places | None] = [None] * (len(prompts) * n)

    def opening(self) -> list[dict[str, Any]]:
        return []

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        text, logprobs = output.text, None
        opens, places = self.places[index] is None, self._places(index)
        if opens and self.echo:
            text = places.prompt.text + text
        if self.logprobs:
            logprobs = self._logprobs(places, output, opens and self.echo)
        rest = _reasoning([output]) | _end([output], self.token_ids)
        return {"index": index, "text": text, "logprobs": logprobs, **rest}

    def _places(self, index: int) -> Places:
        if (places := self.places[index]) is None:
            places = self.places[index] = Places(self.prompts[index // self.n], self.codec, echo=self.echo)
        return places

    def _logprobs(self, places: Places, output: Output, with_prompt: bool) -> dict[str, list]:
        entries: list[tuple[int, TokenLogprob | None]] = [(e.token_id, e) for e in output.logprobs]
        offsets = [places.place(token_id) for token_id, _ in entries]
        if with_prompt:
            before = [*zip(places.prompt.token_ids, output.prompt_logprobs or (), strict=False)]
            entries, offsets = [*before, *entries], [*places.of_prompt()[: len(before)], *offsets]
        return completion_logprobs(entries, self.codec, offsets)

    def choice(self, index: int, outputs: Sequence[Output]) -> dict[str, Any]:
        parts = [self.delta(index, output) for output in outputs]
        text = "".join(p["text"] for p in parts)
        whole = {**parts[-1], "text": text, **_reasoning(outputs), **_end(outputs, self.token_ids)}
        if self.logprobs:
            whole["logprobs"] = {k: [v for p in parts for v in p["logprobs"][k]] for k in whole["logprobs"]}
        return whole


class ChatFormat:
    """Chat completions. alternatives: ``top_logprobs`` entries, None = no log-probabilities."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, codec: TextCodec | None, n: int, alternatives: int | None, token_ids: bool):
        self.codec, self.n, self.alternatives, self.token_ids = codec, n, alternatives, token_ids

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "finish_reason": None} for i in range(self.n)]

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        logprobs = {} if self.alternatives is None else {"logprobs": self._logprobs([output])}
        return {
            "index": index,
            "delta": {"content": output.text} | _reasoning([output]),
            **logprobs,
            **_end([output], self.token_ids),
        }

    def choice(self, index: int, outputs: Sequence[Output]) -> dict[str, Any]:
        text = "".join(output.text for output in outputs)
        message = {"role": "assistant", "content": text, "refusal": None} | _reasoning(outputs)
        end = _end(outputs, self.token_ids)
        return {"index": index, "message": message, "logprobs": self._logprobs(outputs), **end}

    def _logprobs(self, outputs: Sequence[Output]) -> dict[str, Any] | None:
        if self.alternatives is None:
            return None
        entries = [entry for output in outputs for entry in output.logprobs]
        return {"content": chat_logprobs(entries, self.codec, self.alternatives), "refusal": None}


def _reasoning(outputs: Sequence[Output]) -> dict[str, str]:
    """What a model thought before it answered; no field if it did not think."""
    thoughts = "".join(output.thoughts for output in outputs)
    return {"reasoning_content": thoughts} if thoughts else {}


def _end(outputs: Sequence[Output], token_ids: bool) -> dict[str, Any]:
    """The fields that end a choice in both formats; absent optional ones are left out, as OpenAI does."""
    last = outputs[-1]
    end: dict[str, Any] = {"finish_reason": last.finish_reason}
    if last.stop_reason is not None:
        end["stop_reason"] = last.stop_reason
    if token_ids:
        end["token_ids"] = [token for output in outputs for token in output.token_ids]
    return end


class Usage:
    """Token counts of one HTTP request so far; each prompt counts once for any n.

    requests: engine requests, prompt-major.
    """

    def __init__(self, prompts: Sequence[Prompt], requests: Sequence[Request]):
        self.prompt_tokens = sum(len(p.token_ids) for p in prompts)
        n = len(requests) // len(prompts)
        self.requests = [requests[i : i + n] for i in range(0, len(requests), n)]
        self.completion_tokens = 0
        self.moe: dict[str, int] = {}

    def add(self, output: Output) -> None:
        self.completion_tokens += len(output.token_ids)
        if output.moe is not None:
            for name, count in asdict(output.moe).items():
                self.moe[name] = self.moe.get(name, 0) + count

    def report(self) -> dict[str, Any]:
        """The ``usage`` object. If lossy techniques are possible, it counts what they did to the assignments
        of the answers that have ended."""
        moe = {"moe": dict(self.moe)} if self.moe else {}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens()},
            **moe,
        }

    def _cached_tokens(self) -> int:
        """Counts each prompt's minimum: of n answers one computes the prompt and the others then find it."""
        return sum(min(request.cached_tokens for request in answers) for answers in self.requests)
