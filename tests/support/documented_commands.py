"""Every command that README, docs/ and the results name, in the smallest form that still runs all of it."""

from dataclasses import dataclass

# Words that stand for something: {tmp} an empty folder, {data} the project's data, {text} a short text file,
# {sizes} a TOML file of a small model's sizes, {hf} a Hugging Face directory, {study} one with the bundled
# model's experts, {corpus} a folder of two domains' held-out text, {profile} a routing profile,
# {trace} a recorded trace, {url} a server of the bundled model.


@dataclass(frozen=True)
class Command:
    """A documented command.

    words: words after ``python``, or after ``jmoe``.
    needs: modules without which it is skipped.
    devices: number of emulated devices.
    elsewhere: why it does not run here: the step of ``.ci/run``, or the test, that runs it.
    """

    words: str = ""
    needs: tuple[str, ...] = ()
    devices: int = 1
    elsewhere: str = ""


OUT = "--out {tmp}"
SMALL = "--rounds 1 --context 8 --new 4"
TEXT = "--data {text}"
DRY = "--data {data} --model {study} --dry"
PLOTS = ("matplotlib",)

COMMANDS: dict[str, list[Command]] = {
    "scripts/demo.sh": [Command("scripts/demo.py")],
    "scripts/test.sh": [Command(elsewhere="the first step of .ci/run")],
    "scripts/acceptance.sh": [Command(elsewhere="the step 'real clients' of .ci/run")],
    "scripts/bench_vs_transformers.py": [
        Command(
            f"scripts/bench_vs_transformers.py --model {{sizes}} {SMALL} --prompt 8 --batches 1 2 "
            "--json {tmp}/r",
            needs=("torch", "transformers"),
        )
    ],
    "scripts/bench_vs_llama_cpp.py": [
        Command(
            f"scripts/bench_vs_llama_cpp.py --model {{sizes}} {SMALL} --prompt 8 --batches 1 "
            "--correlation 0.5 --types bf16 q8_0 q4_0 q4_K_M --quantizations int8",
            needs=("llama_cpp", "gguf"),
        ),
        Command(
            elsewhere="tests/scripts/test_bench_vs_llama_cpp.py, but for llama.cpp, which builds for minutes"
        ),
    ],
    "scripts/study.py": [
        Command(f"scripts/study.py capacity --data {{data}} --parts load --batch 8 {OUT} --threads 1", PLOTS),
        Command(f"scripts/study.py capacity {DRY} --parts quality --tokens 64 --length 16 --rows 1"),
        Command("scripts/study.py capacity --data {data} --parts speed --dry --rounds 1 --threads 1"),
        Command(
            "scripts/study.py binning --parts speed --dry --sizes {sizes} --layers 1 --batches 2 --context 8 "
            "--new 4 --rounds 1 --threads 1"
        ),
        Command(f"scripts/study.py binning {DRY} --parts quality capacity --length 4 --domains en_drama"),
        Command("scripts/study.py offload --parts large --dry --sizes {sizes} --threads 1"),
        Command(f"scripts/study.py offload {DRY} --parts simulate mt_bench sensitivity --windows 1"),
        Command(f"scripts/study.py offload {DRY} --parts engine"),
        Command(
            f"scripts/study.py shuffle --data {{data}} --parts moves bytes {OUT} --threads 1 --train 2 "
            "--windows 1 --model {study}",
            PLOTS,
        ),
        Command(f"scripts/study.py shuffle {DRY} --parts grouping published --train 2 --windows 1"),
        Command(f"scripts/study.py shuffle {DRY} --parts engine locality"),
        Command(
            f"scripts/study.py together --data {{data}} {OUT} --tokens 64 --profile-tokens 512 "
            "--batch 2 --ranks 2"
        ),
        Command(
            f"scripts/study.py serving --parts transformers {OUT} --concurrency 1 2 --requests 2 --rounds 1 "
            "--input-len 4 --output-len 2",
            needs=("torch", "transformers", "fastapi"),
        ),
        Command(
            f"scripts/study.py serving --data {{data}} --parts traces --max-requests 3 --max-num-seqs 2 {OUT}"
        ),
        Command("scripts/study.py serving --parts host --sizes {sizes} --dry"),
        Command("scripts/study.py serving --data {data} --parts tools --dry"),
        Command("scripts/study.py ttft --model {sizes} --dry"),
        Command("scripts/study.py quantised --parts speed --dry --sizes {sizes} --types --threads 1"),
        Command("scripts/study.py quantised --parts streaming vllm start --dry --sizes {sizes} --threads 1"),
        Command("scripts/study.py quantised --data {data} --parts quality loading --dry --threads 1"),
        Command(f"scripts/study.py reproducibility --prompts 2 --max-tokens 2 --dtype float32 {OUT}"),
    ],
    "scripts/bench_cpu_kernels.py": [
        Command(
            "scripts/bench_cpu_kernels.py --model {sizes} --threads 1 --layers 1 --rounds 1 --json {tmp}/r"
        )
    ],
    "scripts/paper_table.py": [
        Command(
            "scripts/paper_table.py shuffle --model {study} --devices 2 --data {text} --num-prompts 1 "
            "--tasks",
            devices=2,
        )
    ],
    "scripts/acceptance/lm_eval_parity.py": [Command(elsewhere="'real clients' of .ci/run (lm-eval)")],
    "scripts/make/model_sizes.py": [Command("scripts/make/model_sizes.py")],
    "scripts/make/model_card.py": [Command("scripts/make/model_card.py --data {corpus} --model {study}")],
    "scripts/make/golden.py": [Command(elsewhere="tests/models/test_golden.py reads what it wrote")],
    "scripts/make/train_tiny.py": [
        Command("scripts/make/train_tiny.py train --data {data} --out {tmp} --minutes 0.05"),
    ],
    "scripts/gpu_check.py": [Command(elsewhere="tests/scripts/test_gpu_check.py, with --dry")],
    "scripts/tpu_aot_check.py": [Command(elsewhere="tests/engine/step/test_aot.py")],
    "scripts/tpu_kernel_report.py": [Command(elsewhere="tests/kernel/test_tpu_aot.py")],
    "scripts/make/reduce_crd.py": [Command(elsewhere="tests/repository/test_deploy.py")],
    "jmoe serve": [Command(elsewhere="the server that the other commands here ask")],
    "jmoe chat": [Command("chat {hf} --max-model-len 64")],
    "jmoe launch": [Command("launch codex --url {url} --print")],
    "jmoe generate": [
        Command(
            "generate {hf} --prompt Hi --max-tokens 2 --temperature 0 --expert-parallel-size 4 "
            "--tensor-parallel-size 2",
            devices=8,
        ),
    ],
    "jmoe eval": [
        Command(f"eval {{hf}} {TEXT} --max-tokens 16 --mode decode --batch-size 2 --json"),
    ],
    "jmoe profile": [Command(f"profile {{hf}} {TEXT} --out {{tmp}}/profile.npz --max-tokens 64")],
    "jmoe place": [Command("place {profile} --devices 2 --out {tmp}/placement.npz")],
    "jmoe bench": [
        Command(
            "bench serve --base-url {url} --num-prompts 2 --input-len 4 --output-len 2 --max-concurrency 2 "
            "--request-rate 100 --prompt-form text"
        ),
        Command("bench serve --base-url {url} --trace {trace} --max-requests 2 --time-scale 0"),
        Command("bench throughput {hf} --num-prompts 2 --input-len 4 --output-len 2"),
        Command("bench latency {hf} --batch-size 2 --input-len 4 --output-len 2"),
        Command("bench moe-layer {sizes} --active 2 4"),
    ],
    "jmoe convert": [Command("convert {hf} {tmp}/converted")],
    "jmoe doctor": [Command("doctor tiny --json")],
}

# A model of random weights for these commands, as a file of sizes.
SIZES = """
architecture = "OlmoeForCausalLM"
vocab_size = 512
hidden_size = 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
head_dim = 16
num_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 32
max_position_embeddings = 256
qk_norm = "full"
rms_norm_eps = 1e-5
dtype = "bfloat16"

[router]
norm_topk_prob = false
"""
