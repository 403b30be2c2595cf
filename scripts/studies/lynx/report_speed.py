"""Tables of speed for docs/results/lynx.md."""

import statistics
from typing import Any

from shared.results import table

LEAST_R2, LEAST_GAIN = 0.95, 1.3  # targets: of the line, of the engine at batch 16 and half of the union
PAPERS = (
    "The papers, on their hardware: LYNX reports 1.09 to 1.30x median time a token on an H200 with vLLM, "
    "at most 16 sequences decoding, over its four models and four tasks; OEA a layer that takes 39 % less "
    "time at 25.1 of 48.8 active experts on Qwen3-30B-A3B (H100)."
)


def met(holds: bool) -> str:
    return "met" if holds else "**missed**"


def speed_part(speed: dict[str, Any]) -> list[str]:
    return [
        f"`{speed['command']}`, {speed['threads']} CPU core(s), {speed['rounds']} rounds "
        f"({speed['seconds'] / 60:.0f} minutes).",
        "",
        *layer_part(speed["layer"]),
        *engine_part(speed["engine"], speed["layer"]),
        PAPERS,
        "",
        "![speed](lynx_speed.svg)",
    ]


def layer_part(layer: dict[str, Any]) -> list[str]:
    experts, inner, model = layer["dims"]
    rows = []
    for active, seconds in layer["seconds"].items():
        read = int(active) * layer["expert_bytes"]
        rows.append([active, f"{read / 1e6:.0f}", f"{1e3 * seconds:.2f}", f"{read / seconds / 1e9:.1f}"])
    whole, stage = layer["seconds"][str(experts)], layer["stage"]
    added = stage["affinity"] - stage["route"]
    return [
        f"**A layer**: {experts} experts, inner {inner}, model {model}, top {layer['top_k']}, bfloat16; "
        f"{layer['tokens']} tokens whose assignments are spread evenly over the active experts; "
        f"{layer['layers']} layers' weights in turn; {layer['kernel']}.",
        "",
        *table(["active experts", "weights read, MB", "ms a layer", "GB/s"], rows),
        f"Line: {1e3 * layer['fixed']:.2f} ms + {1e3 * layer['each']:.3f} ms an active expert, R^2 "
        f"{layer['r_squared']:.4f} (target {LEAST_R2}: {met(layer['r_squared'] >= LEAST_R2)}); its slope is "
        f"{layer['bytes_per_s'] / 1e9:.1f} GB/s, this machine reads {layer['read_bandwidth'] / 1e9:.1f} "
        "GB/s. Other experts' weights are not read: `tests/kernel/test_kernel_cpu.py` runs the kernel with "
        "them on pages that cannot be.",
        "",
        f"**The stage itself**: routing takes {1e6 * stage['route']:.0f} us, routing and binning "
        f"{1e6 * stage['affinity']:.0f} us: {added / whole:.2%} of the layer with all experts, "
        f"{layer_pays_off(layer, added)}",
        "",
    ]


def layer_pays_off(layer: dict[str, Any], added: float) -> str:
    return f"as much as {added / layer['each']:.2f} experts fewer save."


def engine_part(engine: dict[str, Any], layer: dict[str, Any]) -> list[str]:
    rows = []
    for batch, row in engine["batches"].items():
        speeds = row["tokens_per_second"]
        ratio, least, most = row["ratio"]
        target = met(ratio >= LEAST_GAIN) if batch == "16" else ""
        rows.append([
            batch, f"{row['width']:.2f}", f"{row['union']:.1f}", f"{row['active']:.1f} ({row['share']:.0%})",
            f"{statistics.median(speeds['jmoe']):.1f}", f"{statistics.median(speeds['binned']):.1f}",
            f"{ratio:.2f} ({least:.2f}..{most:.2f})", target,
        ])  # fmt: skip
    stds = engine["logit_std"]
    return [
        f"**The engine**: decode of {engine['sizes']} with random weights, bfloat16, prompts of "
        f"{engine['context']} tokens, {engine['new']} generated for each; the two engines share their "
        f"weights and take turns. Gate weights are scaled by {engine['gate_scale']:.3f}: their logits' "
        f"deviation is {min(stds):.2f} to {max(stds):.2f} over the layers. The width is calibrated for half "
        "of the batch's experts. Ratio: median (least..greatest) of the rounds; the target at batch 16 is "
        f"{LEAST_GAIN}x.",
        "",
        *table(
            ["batch", "width", "experts, plain", "binned", "tokens/s, plain", "binned", "ratio", "target"],
            rows,
        ),
    ]


def gpu_part(gpu: dict[str, Any]) -> list[str]:
    experts, inner, model, k = gpu["dims"]
    plain, rows = gpu["seconds"]["plain"], []
    for name, seconds in gpu["seconds"].items():
        active = gpu["active"]["plain" if name == "plain" else "binned"]
        rate = active * gpu["expert_bytes"] / seconds / 1e12
        rows.append([name, f"{active:.1f}", f"{1e6 * seconds:.1f}", f"{rate:.2f}", f"{plain / seconds:.2f}"])
    return [
        f"`{gpu['command']}` on {gpu['device']}: a layer of Qwen3-30B-A3B's shape ({experts} experts, inner "
        f"{inner}, model {model}, top {k}, bfloat16), {gpu['tokens']} tokens, random weights, width "
        f"{gpu['width']:.2f}. {gpu['kernels']}.",
        "",
        *table(["route, bin, experts", "active experts", "us", "TB/s of weights", "speed-up"], rows),
        PAPERS,
    ]
