"""Holds the form of the bundled model: its sizes, the files of its checkpoint, and its tokenizer."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jmoe.config.model import ModelConfig

END = "<|endoftext|>"
# GPT-2's split, but digits are single, and runs of line ends stay whole with their indentation
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]*\n+[ \t]*|\s+(?!\S)|\s+"
CONFIG = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=8192,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    max_position_embeddings=1024,
    qk_norm="head",
    tie_word_embeddings=True,
    dtype="float32",
    eos_token_ids=(0,),
)
SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings"),
)
HF_CONFIG = {
    "architectures": [CONFIG.architecture],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "intermediate_size": CONFIG.moe_intermediate_size,
    "mlp_only_layers": [],
    "norm_topk_prob": CONFIG.router.norm_topk_prob,
    "rope_theta": CONFIG.rope.rope_theta,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
} | {name: getattr(CONFIG, name) for name in SHARED}
# The dialogue domain has one turn a line: "user: ..." and "assistant: ...". A line end ends a turn, so a call
# has none. The model was not trained to call.
CHAT_TEMPLATE = (
    "{% if tools %}system: functions: {{ tools | tojson }} A call is "
    'functools[{"name": NAME, "arguments": OBJECT}]\n{% endif %}'
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['tool_calls'] %} functools[{% for call in message['tool_calls'] %}"
    """{{ ', ' if not loop.first }}{"name": "{{ call['function']['name'] }}", """
    """"arguments": {{ call['function']['arguments'] | tojson }}}{% endfor %}]{% endif %}"""
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "model_max_length": CONFIG.max_position_embeddings,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
GENERATION_CONFIG = {"eos_token_id": 0, "stop_strings": ["\n"]}


def train_tokenizer(texts: dict[str, list[str]]) -> Tokenizer:
    """Trains byte-level BPE on an equal share of every domain, so that no script gets too few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(("\n".join(docs)[:1_500_000] for docs in texts.values()), trainer)
    return tokenizer
