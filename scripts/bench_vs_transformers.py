"""Compares jmoe's speed with that of transformers on torch: same CPU, checkpoint, dtype and prompts, greedy.

    python scripts/bench_vs_transformers.py --model configs/model/olmoe-0.9b.toml --threads 2 --json OUT

Rows: the time to the first token of a long prompt, and decoding at several batch sizes. Both as tokens/s:
prompt tokens over the time to the first one, and the tokens from each request's second one on over the time
that they took. Columns: jmoe, then transformers' ``generate()`` and a bare loop over ``model.forward`` with a
``StaticCache`` (prefill: the default cache), which has none of generate's overhead. transformers runs with
each of ``--experts`` and the fastest counts, row by row. The ratios are jmoe / transformers: the median of
the rounds' ratios and their range.

All contenders are loaded and warmed up in one process and then run strictly in turn, in opposite order every
other round, so that each round's ratio compares neighbours in time. jmoe's step includes scheduling and
sampling. One engine with as many places as the largest batch serves all rows; a batch between two of its
compiled sizes (1, 4, 8, 16 ... and the largest) pays for the larger one.

Needs the parity extra and Linux (threads are pinned). Run it on an otherwise idle machine: torch's OpenMP
threads wait for one another at every parallel region, and stall for milliseconds at each where another
process takes a core; such a run says nothing about torch. With ``--threads 1`` this cannot happen.
Weights made from a TOML file are random: their routing is nearly uniform, and text repeats itself soon.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from shared.pinning import pin
from shared.protocol import (
    JMOE,
    Contender,
    Jmoe,
    Run,
    add_options,
    check_options,
    paired_ratio,
    random_rows,
    settings,
    take_turns,
)
from shared.random_checkpoint import checkpoint

WAYS = ("generate", "bare loop")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"], help="transformers' own")
    parser.add_argument("--json", type=Path, help="also write settings and all samples here")
    args = parser.parse_args()
    check_options(parser, args)
    return args


# ---- the contenders ------------------------------------------------------------------------------------


class Clock:
    """A streamer for ``generate`` that records when tokens arrive: the prompt's, then each step's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """One model in memory. The contenders switch its implementation of the experts."""

    def __init__(self, directory: Path, args: argparse.Namespace):
        import torch
        import transformers

        from jmoe.checkpoint import read_config

        torch.set_num_threads(args.threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        dtype = getattr(torch, read_config(directory, args.dtype).dtype)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model: Any = load(directory, dtype=dtype, local_files_only=True).eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False)  # no end token
        self.torch, self.cache = torch, transformers.StaticCache

    def contender(self, phase: str, way: str, experts: str) -> Contender:
        step = {
            ("prefill", "generate"): self._generate_first,
            ("prefill", "bare loop"): self._forward_first,
            ("decode", "generate"): self._generate_next,
            ("decode", "bare loop"): self._forward_next,
        }[phase, way]

        def run(prompts: list[list[int]], new: int) -> Run:
            self.model.set_experts_implementation(experts)
            with self.torch.inference_mode():
                return step(self.torch.tensor(prompts), new)

        return run

    def _generate_first(self, ids: Any, new: int) -> Run:
        start = time.perf_counter()
        out = self._generate(ids, new)
        return ids.shape[1] / (time.perf_counter() - start), out

    def _forward_first(self, ids: Any, new: int) -> Run:
        start = time.perf_counter()
        token = self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        return ids.shape[1] / (time.perf_counter() - start), token[:, None].tolist()

    def _generate_next(self, ids: Any, new: int) -> Run:
        clock = Clock()
        out = self._generate(ids, new, streamer=clock)
        return len(ids) * (new - 1) / (clock.times[-1] - clock.times[1]), out

    def _forward_next(self, ids: Any, new: int) -> Run:
        cache = self.cache(config=self.model.config, max_cache_len=ids.shape[1] + new)

        def following(tokens: Any) -> Any:
            out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1, keepdim=True)

        tokens = [following(ids)]
        start = time.perf_counter()
        for _ in range(new - 1):
            tokens.append(following(tokens[-1]))
        seconds = time.perf_counter() - start
        return len(ids) * (new - 1) / seconds, self.torch.cat(tokens, 1).tolist()

    def _generate(self, ids: Any, new: int, **more: Any) -> list[list[int]]:
        mask = self.torch.ones_like(ids)
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=new, **more)
        return out[:, ids.shape[1] :].tolist()


# ---- measuring -----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Returns each row's samples by contender and round, the share of jmoe's tokens, and touched experts."""
    from jmoe.checkpoint import read_config

    ours, theirs = Jmoe(directory, args), Transformers(directory, args)
    rows = random_rows(args, read_config(directory).vocab_size)
    ways = list(itertools.product(WAYS, args.experts))
    contenders: dict[str, list[tuple[str, Contender]]] = {
        name: [
            (JMOE, getattr(ours, row.phase)),
            *((f"{way}, {experts}", theirs.contender(row.phase, way, experts)) for way, experts in ways),
        ]
        for name, row in rows.items()
    }
    samples, equal = take_turns(rows, contenders, args.rounds)
    for row in rows.values():
        if row.phase == "decode":
            ours.measure_active(row.prompts, row.new)
    return {"tokens_per_second": samples, "equal_tokens": equal, "active_experts": ours.active}


def best(samples: dict[str, list[float]], way: str) -> str:
    """Returns the name of the contender with the highest median among those of ``way``."""
    return max((n for n in samples if n.startswith(way)), key=lambda n: statistics.median(samples[n]))


def show(model: str, args: argparse.Namespace, result: dict[str, Any]) -> None:
    print(
        f"{model}, {args.threads} thread(s), {args.rounds} rounds; tokens/s, and ratios median (min..max)\n"
    )
    print(f"{'':13}{'jmoe':>9}" + "".join(f"{way:>24}{'ratio':>20}" for way in WAYS))
    for row, samples in result["tokens_per_second"].items():
        line = f"{row:13}{statistics.median(samples[JMOE]):9.1f}"
        for way in WAYS:
            name = best(samples, way)
            ratio, least, most = paired_ratio(samples[JMOE], samples[name])
            line += f"{statistics.median(samples[name]):11.1f} {name.split(', ')[1]:>12}"
            spread = f"({least:.2f}..{most:.2f})"
            line += f"{ratio:6.2f} {spread:>13}"
        print(line)
    least = min(share for row in result["equal_tokens"].values() for share in row.values())
    print(f"\ntokens equal to jmoe's: {least:.0%} or more in every row")
    for batch, active in result["active_experts"].items():
        print(f"decode {batch}: {active:.1f} experts a layer and step")


def main() -> None:
    args = arguments()
    pin(args.threads)
    import jax
    import torch
    import transformers

    from jmoe.checkpoint import read_config

    jax.config.update("jax_platforms", "cpu")
    with checkpoint(args.model) as directory:
        name = f"{Path(args.model).name.removesuffix('.toml')}, {read_config(directory, args.dtype).dtype}"
        result = measure(args, directory)
    show(name, args, result)
    if args.json:
        versions = {module.__name__: module.__version__ for module in (jax, torch, transformers)}
        report = {"model": name, "settings": settings(args), "versions": versions, **result}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
