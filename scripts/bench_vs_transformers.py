"""jmoe against transformers on this CPU: prefill of 512 tokens and greedy decoding at batch 1, 8 and 32.

    python scripts/bench_vs_transformers.py [--model tiny|DIR|configs/model/olmoe-0.9b.toml]
                                            [--threads 1|2] [--rounds N] [--json OUT]

Both run the same checkpoint (bfloat16), prompts and number of tokens. In every round the engines take turns,
so that the machine's mood hits both; reported are medians of milliseconds and, round by round, ratios. A
ratio above 1 means that jmoe is faster. transformers is timed as ``generate()`` and as a bare loop of
``forward`` over a static cache, each with its default experts and with the eager ones; the faster counts.

Run it on an otherwise idle machine: torch's OpenMP threads wait for one another, and any other busy process
makes them stall by tens of milliseconds, which would flatter jmoe.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

PREFILL, CONTEXT, NEW = 512, 64, 24
BATCHES = (1, 8, 32)
Timed = Callable[[], float]  # runs once, returns seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


ARGS = parse()
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: ARGS.threads]))  # before the thread pools exist

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from jmoe import LLM  # noqa: E402
from jmoe.checkpoint.hf_writer import save_hf  # noqa: E402
from jmoe.config import ModelConfig, MoEConfig  # noqa: E402
from jmoe.engine.build import model_directory  # noqa: E402
from jmoe.engine.request import Output, Request, SamplingParams  # noqa: E402

torch.set_num_threads(ARGS.threads)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def random_checkpoint(config: Path, directory: Path) -> None:
    """A Hugging Face checkpoint of a configuration file's shape with random weights."""
    import jax.numpy as jnp
    from flax import nnx

    from jmoe.mesh import make_mesh
    from jmoe.models.decoder import Decoder
    from jmoe.nn.param import ParamMaker

    values = tomllib.loads(config.read_text())
    cfg = ModelConfig(**values)
    model = Decoder(cfg, MoEConfig(), make_mesh(), ParamMaker(jnp.dtype(cfg.dtype), nnx.Rngs(0)))
    hf = {k: v for k, v in values.items() if k not in ("architecture", "qk_norm")}
    hf |= {
        "architectures": [cfg.architecture],
        "model_type": "olmoe",
        "intermediate_size": cfg.moe_intermediate_size,
        "rope_theta": cfg.rope_theta,
        "torch_dtype": cfg.dtype,
    }
    save_hf(model, hf, directory)


class Jmoe:
    """The engine, stepped by hand: what is timed is its steps, scheduling and sampling included."""

    def __init__(self, directory: Path):
        self.llm = LLM(directory, max_num_seqs=32, max_num_batched_tokens=1024, max_model_len=1024)
        self.engine = self.llm.engine

    def _add(self, prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        ignore: Callable[[Output], None] = lambda output: None  # noqa: E731
        self.engine.add([Request(str(i), p, params, ignore, 0.0) for i, p in enumerate(prompts)])

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self._add([prompt], 1)
        while self.engine.step():
            pass
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]]) -> float:
        """Seconds a step, from every request's second token on."""
        self._add(prompts, NEW)
        while any(not r.token_ids for r in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]):
            self.engine.step()
        start, steps = time.perf_counter(), 0
        while self.engine.step():
            steps += 1
        return (time.perf_counter() - start) / steps


class Transformers:
    """One experts implementation; ``generate`` and a bare loop over a static cache."""

    def __init__(self, directory: Path, experts: str | None):
        how = {} if experts is None else {"experts_implementation": experts}
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(directory, dtype=torch.bfloat16, **how).eval()
        self.model.generation_config.stop_strings = None
        self.name = experts or "default"

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        self.model(ids, logits_to_keep=1, use_cache=True).logits.argmax(-1)
        return time.perf_counter() - start

    def _generate(self, ids: torch.Tensor, new: int) -> float:
        start = time.perf_counter()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode_generate(self, prompts: list[list[int]]) -> float:
        """Seconds a step: the difference of a long and a one-token run, prefill excluded."""
        ids = torch.tensor(prompts)
        return (self._generate(ids, NEW) - self._generate(ids, 1)) / (NEW - 1)

    @torch.inference_mode()
    def decode_loop(self, prompts: list[list[int]]) -> float:
        ids = torch.tensor(prompts)
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=CONTEXT + NEW)
        out = self.model(ids, past_key_values=cache, logits_to_keep=1)
        token = out.logits.argmax(-1)
        start = time.perf_counter()
        for i in range(NEW - 1):
            position = torch.tensor([CONTEXT + i])
            out = self.model(
                token, past_key_values=cache, cache_position=position, position_ids=position[None]
            )
            token = out.logits.argmax(-1)
        return (time.perf_counter() - start) / (NEW - 1)


def measure(timed: dict[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, after one that does not count."""
    results: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(rounds + 1):
        for name, run in timed.items():
            ms = run() * 1e3
            if i:
                results[name].append(ms)
    return results


def summarise(results: dict[str, list[float]]) -> dict[str, dict]:
    """Medians, and the ratios of every peer to jmoe; a group's fastest peer (by median) stands for it."""
    row: dict[str, dict] = {"jmoe": {"ms": statistics.median(results["jmoe"])}}
    for group in sorted({name.split(":")[0] for name in results} - {"jmoe"}):
        peers = {n: ms for n, ms in results.items() if n.startswith(f"{group}:")}
        best = min(peers, key=lambda n: statistics.median(peers[n]))
        ratios = [theirs / ours for theirs, ours in zip(peers[best], results["jmoe"], strict=True)]
        row[group] = {
            "experts": best.split(":")[1],
            "ms": statistics.median(peers[best]),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    return row


def run(directory: Path) -> dict[str, dict]:
    ours = Jmoe(directory)
    peers = [Transformers(directory, None), Transformers(directory, "eager")]
    rng = np.random.default_rng(0)
    vocabulary = ours.engine.vocab_size

    def prompts(count: int, length: int) -> list[list[int]]:
        return rng.integers(1, vocabulary, (count, length)).tolist()

    [long] = prompts(1, PREFILL)
    timed: dict[str, Timed] = {"jmoe": lambda: ours.prefill(long)}
    timed |= {f"forward:{p.name}": (lambda p=p: p.prefill(long)) for p in peers}
    report = {f"prefill {PREFILL}": summarise(measure(timed, ARGS.rounds))}
    for batch in BATCHES:
        given = prompts(batch, CONTEXT)
        timed = {"jmoe": lambda given=given: ours.decode(given)}
        timed |= {f"generate:{p.name}": (lambda p=p, g=given: p.decode_generate(g)) for p in peers}
        timed |= {f"loop:{p.name}": (lambda p=p, g=given: p.decode_loop(g)) for p in peers}
        report[f"decode batch {batch}"] = summarise(measure(timed, ARGS.rounds))
    return report


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_directory(ARGS.model)
        if ARGS.model.endswith(".toml"):
            directory = Path(scratch)
            random_checkpoint(Path(ARGS.model), directory)
        report = run(directory)
    print(f"{ARGS.model}, bfloat16, {ARGS.threads} threads, medians of {ARGS.rounds} paired rounds")
    for name, row in report.items():
        print(f"{name:>16}: jmoe {row['jmoe']['ms']:8.2f} ms", end="")
        for group in (g for g in row if g != "jmoe"):
            peer = row[group]
            low, high = peer["ratio_range"]
            print(
                f" | {group} ({peer['experts']}) {peer['ms']:8.2f} ms = {peer['ratio']:.2f}x "
                f"[{low:.2f}, {high:.2f}]",
                end="",
            )
        print()
    if ARGS.json:
        ARGS.json.write_text(
            json.dumps({"model": ARGS.model, "threads": ARGS.threads, "rows": report}, indent=1)
        )


if __name__ == "__main__":
    sys.exit(main())
