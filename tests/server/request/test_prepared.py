"""Tests how a prepared request becomes the engine's requests."""

from jmoe.engine.request import Output, SamplingParams
from jmoe.server.request.params import fan_out
from jmoe.server.request.prepared import PreparedRequest
from jmoe.server.request.prompts import Prompt
from jmoe.server.request.schema import CompletionRequest

PROMPTS = [Prompt([1, 2]), Prompt([3])]


def test_each_answer_is_one_request_and_its_increments_come_with_its_number():
    params = fan_out(SamplingParams(seed=5), prompts=2, n=2)
    prepared = PreparedRequest(CompletionRequest(prompt=[[1, 2], [3]]), PROMPTS, params, None, "prompt")
    increments = []
    requests = prepared.engine_requests("cmpl-a", None, lambda *one: increments.append(one), 7.0)
    assert [request.id for request in requests] == ["cmpl-a-0", "cmpl-a-1", "cmpl-a-2", "cmpl-a-3"]
    assert [request.prompt_token_ids for request in requests] == [[1, 2], [1, 2], [3], [3]]
    assert [request.params.seed for request in requests] == [5, 6, 5, 6]
    assert {(request.arrival_time, request.constraint) for request in requests} == {(7.0, None)}
    output = Output("cmpl-a-2", (4,))
    requests[2].emit(output)
    assert increments == [(2, output)] and prepared.grammar_field is None
