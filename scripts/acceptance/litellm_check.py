"""Checks litellm's answers and its classes of our errors.  python litellm_check.py BASE MODEL"""

import sys

import litellm
from checks import Checks

base, model = sys.argv[1:]
check = Checks()
AT = {"api_base": f"{base}/v1", "api_key": "EMPTY", "num_retries": 0}
MESSAGES = [{"role": "user", "content": "Hi, two tickets please."}]
REQUEST = {"model": f"openai/{model}", "messages": MESSAGES, "temperature": 0, "max_tokens": 16, **AT}

with check("a streamed chat is the whole one"):
    whole = litellm.completion(**REQUEST)
    parts = litellm.completion(**REQUEST, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content != ""
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

with check("text completion"):
    text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="Once", max_tokens=5, **AT)
    assert text.choices[0].text

for wanted, change in [
    (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "word " * 9000}]}),
    (litellm.NotFoundError, {"model": "openai/gpt-9"}),
    (litellm.BadRequestError, {"temperature": 3}),
]:
    with check(f"{wanted.__name__}"):
        try:
            litellm.completion(**REQUEST | change)
        except wanted:
            pass
        else:
            raise AssertionError("no error")

sys.exit(check.finish())
