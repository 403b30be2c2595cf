"""Mixed users for locust: short and streamed answers, chats, and bad requests that must be 4xx."""

import os
import random

from locust import FastHttpUser, between, task

MODEL = os.environ["MODEL"]


class Caller(FastHttpUser):
    wait_time = between(0, 0.1)

    def send(self, path: str, body: dict, status: int = 200) -> None:
        with self.client.post(path, json={"model": MODEL, **body}, catch_response=True) as answer:
            if answer.status_code != status:
                answer.failure(f"{answer.status_code} instead of {status}")
            elif status != 200 and set(answer.json()["error"]) != {"message", "type", "param", "code"}:
                answer.failure("not the envelope")
            elif body.get("stream") and not answer.text.endswith("data: [DONE]\n\n"):
                answer.failure("the stream is not whole")
            else:
                answer.success()

    @task(4)
    def short(self) -> None:
        self.send("/v1/completions", {"prompt": "Once upon", "max_tokens": random.randint(1, 16)})

    @task(3)
    def streamed(self) -> None:
        self.send("/v1/completions", {"prompt": "Once upon", "max_tokens": 24, "stream": True})

    @task(2)
    def chat(self) -> None:
        self.send("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8})

    @task(1)
    def bad(self) -> None:
        self.send("/v1/completions", {"prompt": "x", "max_tokens": -2}, 400)
