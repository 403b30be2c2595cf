"""A task of Inspect: two questions that any answer passes, so that only the protocol can fail it."""

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, accuracy, scorer
from inspect_ai.solver import generate


@scorer(metrics=[accuracy()])
def answered():
    async def score(state, target):
        return Score(value=int(bool(state.output.completion)))

    return score


@task
def questions():
    samples = [Sample(input="Hi, two tickets please.", target=""), Sample(input="Where to?", target="")]
    return Task(dataset=MemoryDataset(samples), solver=generate(max_tokens=16), scorer=answered())
