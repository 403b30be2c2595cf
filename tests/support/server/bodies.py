"""A good request of each route, with nearly every field that it knows."""

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
OBJECT = {"type": "object", "properties": {"a": {"enum": [1]}}, "additionalProperties": False}
SHARED = {
    "model": "fake", "n": 2, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5,
    "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 1, "stop": ["zz"], "stop_token_ids": [5], "max_tokens": 3,
    "logit_bias": {"5": 1.5}, "cache_salt": "s", "return_token_ids": True, "add_special_tokens": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT}},
    "moe": {"exact": True}, "user": "u", "metadata": {"a": "b"}, "priority": 0, "presence_penalty": 0,
}  # fmt: skip
BODIES = {
    "/v1/completions": SHARED | {
        "prompt": ["ab", "cd"], "echo": True, "logprobs": 2, "best_of": 1, "suffix": "",
    },
    "/v1/chat/completions": {k: v for k, v in SHARED.items() if k != "response_format"} | {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "c"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": OBJECT}}],
        "tool_choice": "required", "parallel_tool_calls": False, "logprobs": True, "top_logprobs": 2,
        "chat_template_kwargs": {"a": 1},
    },
    "/v1/responses": {
        "model": "fake", "stream": True, "max_output_tokens": 3, "temperature": 0.5, "top_p": 0.5,
        "store": True, "instructions": "be brief", "metadata": {"a": "b"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": OBJECT}, "verbosity": "low"},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
    },
    "/v1/responses/input_tokens": {"model": "fake", "input": "hi", "instructions": "be brief"},
    "/v1/messages": {
        "model": "fake", "stream": True, "max_tokens": 3, "temperature": 0.5, "top_p": 0.5, "top_k": 3,
        "system": [{"type": "text", "text": "be brief"}], "stop_sequences": ["zz"],
        "metadata": {"user_id": "u"},
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "low"},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}},
            ]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1"}]},
        ],
    },
    "/v1/messages/count_tokens": {"model": "fake", "messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "ab", "model": "fake", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [97, 98], "model": "fake"},
}  # fmt: skip
