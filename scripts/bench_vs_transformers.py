"""Prints jmoe's speed beside that of transformers on torch: same CPU, checkpoint, dtype and prompts, greedy.

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
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = tuple[float, list[list[int]]]  # tokens/s, and what was generated
Contender = Callable[[list[list[int]], int], Run]  # prompts, tokens to generate for each
Samples = dict[str, dict[str, list[float]]]  # row, contender -> tokens/s of each round
JMOE, WAYS = "jmoe", ("generate", "bare loop")
PAUSE = 0.05  # seconds between two contenders, in which the threads of the first go to sleep


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, a Hugging Face directory, or a TOML of sizes")
    parser.add_argument("--threads", type=int, default=1, help="cores that everything is pinned to")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill row's prompt")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32], help="decode rows")
    parser.add_argument("--context", type=int, default=64, help="tokens of each decode prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens generated for each decode prompt")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"], help="transformers' own")
    parser.add_argument("--json", type=Path, help="also write settings and all samples here")
    args = parser.parse_args()
    if min(args.rounds, args.prompt, args.context, args.threads, *args.batches) < 1 or args.new < 2:
        parser.error("sizes must be at least 1, and --new at least 2")
    return args


def pin(threads: int) -> None:
    """Keeps this process on ``threads`` cores. Call it before importing jax and torch: they count cores."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise SystemExit(f"--threads {threads}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[:threads])


# ---- the model -----------------------------------------------------------------------------------------


def write_random(toml: Path, directory: Path) -> None:
    """A Hugging Face checkpoint of the shape in ``toml``: normal weights (std 0.02), norms of ones."""
    import jax.numpy as jnp
    from flax import nnx

    from jmoe.checkpoint.hf_writer import save_hf
    from jmoe.config import ModelConfig, MoEConfig, check_keys, read_toml
    from jmoe.mesh import make_mesh
    from jmoe.models.decoder import Decoder
    from jmoe.nn.param import ParamMaker

    values = read_toml(toml)
    check_keys(str(toml), values, ModelConfig.__dataclass_fields__)
    cfg = ModelConfig(**values)
    make = ParamMaker(jnp.dtype(cfg.dtype), nnx.Rngs(0), platform="cpu")
    save_hf(Decoder(cfg, MoEConfig(), make_mesh(), make), hf_config(cfg), directory)


def hf_config(cfg: Any) -> dict[str, Any]:
    """The ``config.json`` of a ModelConfig, under the names that the families' classes have."""
    model_types = {"MixtralForCausalLM": "mixtral", "Qwen3MoeForCausalLM": "qwen3_moe"}
    return {
        **dataclasses.asdict(cfg),
        "architectures": [cfg.architecture],
        "model_type": model_types.get(cfg.architecture, "olmoe"),
        "intermediate_size": cfg.moe_intermediate_size,
        "num_local_experts": cfg.num_experts,
        "use_sliding_window": cfg.sliding_window is not None,
        "eos_token_id": list(cfg.eos_token_ids) or None,
    }


# ---- the contenders ------------------------------------------------------------------------------------


class Jmoe:
    """jmoe's engine, driven step by step. active: experts that a layer touched in a decode step, by batch."""

    def __init__(self, directory: Path, args: argparse.Namespace):
        from jmoe import LLM

        longest = max(args.prompt + 1, args.context + args.new)
        self.engine = LLM(
            directory,
            dtype=args.dtype,
            max_model_len=longest,
            max_num_seqs=max(args.batches, default=1),
            max_num_batched_tokens=args.prompt,
        ).engine
        self.engine.codec = None  # token ids only, as transformers is asked for
        self.active: dict[int, float] = {}

    def _requests(self, prompts: list[list[int]], new: int) -> list[Any]:
        from jmoe.engine.request import Request, SamplingParams

        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, seed=0)
        now = time.monotonic()
        return [Request(str(i), prompt, params, lambda output: None, now) for i, prompt in enumerate(prompts)]

    def prefill(self, prompts: list[list[int]], new: int) -> Run:
        requests = self._requests(prompts, new)
        start = time.perf_counter()
        self.engine.run(requests)
        return len(prompts[0]) / (time.perf_counter() - start), [r.token_ids for r in requests]

    def decode(self, prompts: list[list[int]], new: int) -> Run:
        requests = self._requests(prompts, new)
        self.engine.add(requests)
        while not all(r.token_ids for r in requests):  # prompts go first, so nothing decodes yet
            self.engine.step()
        assert all(len(r.token_ids) == 1 for r in requests)
        start = time.perf_counter()
        while self.engine.step():
            pass
        seconds = time.perf_counter() - start
        return len(prompts) * (new - 1) / seconds, [r.token_ids for r in requests]

    def measure_active(self, prompts: list[list[int]], new: int) -> None:
        def so_far() -> tuple[int, float]:
            decode = self.engine.moe_stats()["decode"]
            return decode["steps"], decode["steps"] * decode["active_experts"]

        steps, active = so_far()
        self.decode(prompts, new)
        steps_now, active_now = so_far()
        self.active[len(prompts)] = (active_now - active) / (steps_now - steps)


class Clock:
    """A streamer for ``generate`` that notes when it is given tokens: the prompt, then each step's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """One model in memory; the contenders switch its implementation of the experts."""

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
    """samples of every row, contender and round; how many tokens were those of jmoe; experts touched."""
    import numpy as np

    from jmoe.checkpoint import read_config

    ours, theirs = Jmoe(directory, args), Transformers(directory, args)
    rng, vocab = np.random.default_rng(0), read_config(directory).vocab_size
    rows = {f"prefill {args.prompt}": ("prefill", rng.integers(0, vocab, (1, args.prompt)).tolist(), 1)}
    for batch in args.batches:
        prompts = rng.integers(0, vocab, (batch, args.context)).tolist()
        rows[f"decode {batch}"] = ("decode", prompts, args.new)
    ways = list(itertools.product(WAYS, args.experts))
    contenders: dict[str, list[tuple[str, Contender]]] = {
        phase: [
            (JMOE, getattr(ours, phase)),
            *((f"{way}, {experts}", theirs.contender(phase, way, experts)) for way, experts in ways),
        ]
        for phase in ("prefill", "decode")
    }
    samples: Samples = {row: {} for row in rows}
    equal: dict[str, dict[str, float]] = {row: {} for row in rows}
    for turn in range(-1, args.rounds):  # the first only warms up
        for row, (phase, prompts, new) in rows.items():
            tokens = {}
            for name, run in contenders[phase][:: 1 if turn % 2 == 0 else -1]:
                time.sleep(PAUSE)
                speed, tokens[name] = run(prompts, new if turn >= 0 else min(new, 4))
                if turn >= 0:
                    samples[row].setdefault(name, []).append(speed)
            equal[row] = {
                name: float(np.mean(np.equal(tokens[name], tokens[JMOE]))) for name in tokens if name != JMOE
            }
    for phase, prompts, new in rows.values():
        if phase == "decode":
            ours.measure_active(prompts, new)
    return {"tokens_per_second": samples, "equal_tokens": equal, "active_experts": ours.active}


def best(samples: dict[str, list[float]], way: str) -> str:
    """The name of the way's contender with the highest median."""
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
            ratios = [a / b for a, b in zip(samples[JMOE], samples[name], strict=True)]
            line += f"{statistics.median(samples[name]):11.1f} {name.split(', ')[1]:>12}"
            spread = f"({min(ratios):.2f}..{max(ratios):.2f})"
            line += f"{statistics.median(ratios):6.2f} {spread:>13}"
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
    from jmoe.engine.build import model_directory

    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        directory = model_directory(args.model)
        if directory.suffix == ".toml":
            write_random(directory, Path(temporary))
            directory = Path(temporary)
        name = f"{Path(args.model).name.removesuffix('.toml')}, {read_config(directory, args.dtype).dtype}"
        result = measure(args, directory)
    show(name, args, result)
    if args.json:
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
        versions = {module.__name__: module.__version__ for module in (jax, torch, transformers)}
        report = {"model": name, "settings": settings, "versions": versions, **result}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
