"""The formats of calls that jmoe knows, by name: data only.

To add one, add a row. A row's texts are what the family's own chat template writes for an earlier call.
"""

from dataclasses import replace

from jmoe.engine.text.markup import HARMONY_ARGUMENTS, HARMONY_CALL, HARMONY_END
from jmoe.server.dialects.format import Format, Tagged

XML = Tagged("<parameter=", ">\n", "\n</parameter>\n")
INVOKED = Tagged('<parameter name="', '">', "</parameter>\n")
DEEPSEEK = Format(
    "deepseek_v31",
    begin="<｜tool▁calls▁begin｜>",
    opens="<｜tool▁call▁begin｜>",
    named="<｜tool▁sep｜>",
    closes="<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
)
LIST = Format("list", opens='{"name": "', named='", "arguments": ', closes="}", between=", ", end="]")

ROWS = (
    # Qwen3, Hermes and many others.
    Format(
        "hermes",
        opens='<tool_call>\n{"name": "',
        named='", "arguments": ',
        closes="}\n</tool_call>",
        between="\n",
    ),
    # Qwen3-Coder, Qwen3.5.
    Format(
        "qwen_xml",
        opens="<tool_call>\n<function=",
        named=">\n",
        closes="</function>\n</tool_call>",
        between="\n",
        arguments=XML,
    ),
    # GLM-4.5, GLM-4.6; GLM-4.7 without line ends.
    Format(
        "glm",
        opens="<tool_call>",
        named="\n",
        closes="</tool_call>",
        between="\n",
        arguments=Tagged("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    # DeepSeek-V2.5, V3, R1.
    replace(
        DEEPSEEK,
        name="deepseek_v3",
        opens="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        named="\n```json\n",
        closes="\n```<｜tool▁call▁end｜>",
        between="\n",
    ),
    # DeepSeek-V3.1.
    DEEPSEEK,
    # Kimi-K2.
    Format(
        "kimi_k2",
        begin="<|tool_calls_section_begin|>",
        opens="<|tool_call_begin|>functions.",
        named="<|tool_call_argument_begin|>",
        closes="<|tool_call_end|>",
        end="<|tool_calls_section_end|>",
        is_numbered=True,
        ids="functions",
    ),
    # gpt-oss, in the marks that the engine's text layer writes for a call in the commentary channel.
    Format("harmony", opens=HARMONY_CALL, named=HARMONY_ARGUMENTS, closes=HARMONY_END),
    # Granite 3.0.
    replace(LIST, name="granite", begin="<|tool_call|>["),
    # Mixtral 8x22B, Mistral v0.3.
    replace(LIST, name="mistral", begin="[TOOL_CALLS] [", ids="nine"),
    # Later models of Mistral.
    Format("mistral_args", opens="[TOOL_CALLS]", named="[ARGS]", closes="", ids="nine"),
    # Llama 4 and 3.1.
    Format(
        "llama_json",
        opens='{"name": "',
        named='", "parameters": ',
        closes="}",
        between="; ",
        is_at_start=True,
    ),
    # Llama 4.
    Format(
        "pythonic",
        begin="[",
        opens="",
        named="(",
        closes=")",
        between=", ",
        end="]",
        arguments="pythonic",
        is_at_start=True,
    ),
    # dots.llm1.
    Format(
        "dots",
        opens='<dots_function_call>\n<invoke name="',
        named='">\n',
        closes="</invoke>\n</dots_function_call>",
        between="\n",
        arguments=INVOKED,
    ),
    # Phi-4-mini.
    replace(LIST, name="functools", begin="functools["),
)

FORMATS = {row.name: row for row in ROWS}
