"""Makes the tables of docs/results/quantised.md."""

import statistics
from typing import Any

from shared.protocol import JMOE, paired_ratio
from shared.results import table

GB = 1e9
SERVED = {  # figures of a server: title and digits
    "output_throughput": ("output tokens/s", 1),
    "median_ttft_ms": ("TTFT, median, ms", 1),
    "median_tpot_ms": ("TPOT, median, ms", 2),
}


def speed(found: dict[str, Any]) -> str:
    """Returns tokens/s of each contender, and its ratio to jmoe in bfloat16, a column for each row."""
    samples = found["tokens_per_second"]
    rows = []
    for name in next(iter(samples.values())):
        cells = [_speed(speeds, name) for speeds in samples.values()]
        check = found["check"].get(name)
        rows.append([name, *cells, "-" if check is None else f"{check['correlation']:.5f}"])
    return table(["tokens/s", *samples, "logits"], rows)


def _speed(speeds: dict[str, list[float]], name: str) -> str:
    text = f"{statistics.median(speeds[name]):.1f}"
    return text if name == JMOE else f"{text} ({paired_ratio(speeds[name], speeds[JMOE])[0]:.2f})"


def files(found: dict[str, Any]) -> str:
    """Returns the sizes of llama.cpp's files."""
    return ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in found["file_bytes"].items())


def served(found: dict[str, Any]) -> str:
    """Returns the table of two servers: medians of both and the ratio jmoe / vLLM, a row for each load."""
    loads = {f"{count} at a time": row for count, row in found["rows"].items()}
    loads[f"prompt of {found['prefill']['input_len']}"] = found["prefill"]
    rows = []
    for load, sides in loads.items():
        for key, (title, digits) in SERVED.items():
            ours, theirs = sides["jmoe"][key], sides["vllm"][key]
            medians = (f"{statistics.median(side):.{digits}f}" for side in (ours, theirs))
            ratio = "-" if 0 in theirs else f"{paired_ratio(ours, theirs)[0]:.2f}"
            rows.append([load, title, *medians, ratio])
    return table(["load", "", "jmoe", "vLLM", "ratio"], rows)


def streaming(found: dict[str, Any]) -> str:
    """Returns the table of the kernel's rates."""
    rows = []
    for form in found["forms"]:
        weights, read, bandwidth = form["weights_per_s"][0], form["bytes_per_s"][0], form["bandwidth"]
        rows.append([
            form["form"], "int8" if form["activations"] == "int8" else "auto", f"{weights / GB:.1f}",
            f"{read / GB:.1f}", f"{bandwidth / GB:.1f}", f"{read / bandwidth:.0%}",
        ])  # fmt: skip
    return table(("form", "activations", "Gweights/s", "GB/s", "read bandwidth, GB/s", "share"), rows)


def quality(part: dict[str, Any]) -> str:
    """Returns the table of perplexities."""
    rows = [
        [name, form["made"] or "as it is", f"{form['nll']:.4f}", change(form)]
        for name, form in part["forms"].items()
    ]
    return table(("form", "made by", "nats a token", "perplexity"), rows)


def change(form: dict[str, Any]) -> str:
    """Returns the change of perplexity with its standard error."""
    if not form["made"]:
        return "-"
    return f"{form['change_percent']:+.3f} ± {form['error_percent']:.3f} %"


def loading(part: dict[str, Any]) -> str:
    """Returns the table of bytes on a rank."""
    rows = []
    for model, forms in part["bytes"].items():
        for form, sizes in forms.items():
            shares = (size / plain for size, plain in zip(sizes, forms["bfloat16"], strict=True))
            cells = [f"{size / GB:.2f} ({share:.2f})" for size, share in zip(sizes, shares, strict=True)]
            rows.append([model, form, *cells])
    return table(("model", "form", *(f"{ranks} ranks" for ranks in part["ranks"])), rows)


def start(part: dict[str, Any]) -> str:
    """Returns the table of seconds to the first answer."""
    rows = []
    for name, seconds in part["seconds"].items():
        ratio, low, high = paired_ratio(seconds, part["seconds"]["bfloat16"])
        rows.append([name, f"{statistics.median(seconds):.2f}", f"{ratio:.2f} ({low:.2f}..{high:.2f})"])
    return table(("form", "seconds", "ratio"), rows)
