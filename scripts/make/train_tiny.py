"""Trains the bundled model: a small Qwen3-MoE-form language model, from the project's own modules.

    python scripts/make/train_tiny.py train  --data ../shared/data --out runs/tiny --minutes 75
    python scripts/make/train_tiny.py export --out runs/tiny --to jmoe/assets/tiny

``train`` resumes from the last checkpoint in ``--out`` (Orbax) and stops after ``--minutes``; a new run may
start from a published model with ``--init jmoe/assets/tiny``. The learning rate is constant and falls to zero
over the last part of the time (``--decay``); the checkpoint from before the fall is kept too, and a later,
longer run goes on from there.
"""

import argparse
import json
import lzma
import math
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tiny_form import CONFIG, END, GENERATION_CONFIG, HF_CONFIG, TOKENIZER_CONFIG, train_tokenizer
from tokenizers import Tokenizer

from jmoe.checkpoint import load_model, save_hf
from jmoe.config.moe import MoEConfig
from jmoe.mesh import make_mesh
from jmoe.models.decoder import Decoder, make_blueprint
from jmoe.nn.sequences import Sequences
from jmoe.param import ParamMaker

TRAINED = MoEConfig(kernel="batched", train_capacity_factor=1.5)
BALANCE = 0.01  # weight of the load-balancing loss (Switch Transformer, eq. 4)
PHASES = ((0.0, 8, 512), (0.5, 8, 1024))  # from this share of the time: sequences x tokens per step


def read_documents(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [d for d in file.read().split(f"\n{END}\n") if d]


def domains(data: Path, split: str) -> dict[str, list[str]]:
    return {
        p.name.removesuffix(".txt.xz"): read_documents(p) for p in sorted((data / split).glob("*.txt.xz"))
    }


def token_streams(tokenizer: Tokenizer, texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Returns each domain's documents as one stream of ids. The end token (0) ends each document."""
    return {
        name: np.concatenate([np.array([*e.ids, 0], np.int32) for e in tokenizer.encode_batch(docs)])
        for name, docs in texts.items()
    }


def batches(streams: dict[str, np.ndarray], rng: np.random.Generator, sequences: int, tokens: int):
    """Yields windows at random places. A domain is drawn in proportion to the 0.7th power of its size."""
    pool = list(streams.values())
    share = np.array([len(s) for s in pool], float) ** 0.7
    share /= share.sum()
    while True:
        picks = rng.choice(len(pool), sequences, p=share)
        starts = [rng.integers(0, len(pool[d]) - tokens - 1) for d in picks]
        yield np.stack([pool[d][s : s + tokens + 1] for d, s in zip(picks, starts, strict=True)])


def cast(params, dtype):
    """Returns the parameters with matrices in ``dtype``. Norms and the router stay float32."""
    return jax.tree.map_with_path(
        lambda path, p: p if p.ndim < 2 or "gate_ED" in jax.tree_util.keystr(path) else p.astype(dtype),
        params,
    )


def losses(graph, params, window_BT):
    """Returns (cross entropy of every predicted token, load-balancing loss, dropped share)."""
    model = nnx.merge(graph, cast(params, jnp.bfloat16))
    b, t = window_BT.shape[0], window_BT.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    out = model(Sequences(window_BT[:, :-1], positions))
    ce = optax.softmax_cross_entropy_with_integer_labels(model.logits(out.hidden_RND), window_BT[:, 1:])
    assigned = b * t * CONFIG.num_experts_per_tok
    balance = [CONFIG.num_experts * jnp.sum(s.counts_E / assigned * s.mean_score_E) for s in out.stats]
    dropped = sum(s.counts["dropped"] for s in out.stats) / (assigned * len(out.stats))
    return ce, jnp.mean(jnp.stack(balance)), dropped


def make_optimizer() -> optax.GradientTransformation:
    """Returns Muon for matrices (batched over experts) and Adam for the rest, without the learning rate.

    The learning rate is applied outside.
    """
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    def spec(params):
        return jax.tree.map_with_path(
            lambda path, p: None if p.ndim < 2 or "embed" in jax.tree_util.keystr(path) else dims, params
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            1.0, consistent_rms=0.2, adam_b2=0.95, weight_decay=0.05, muon_weight_dimension_numbers=spec
        ),
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(optimizer, graph, params, state, window_BT, rate):
    def objective(params):
        ce, balance, dropped = losses(graph, params, window_BT)
        return ce.mean() + BALANCE * balance, (ce.mean(), balance, dropped)

    grads, report = jax.grad(objective, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    updates = jax.tree.map(lambda u: u * rate, updates)
    return optax.apply_updates(params, updates), state, report


@partial(jax.jit, static_argnums=0)
def eval_step(graph, params, window_BT):
    return losses(graph, params, window_BT)[0].sum()


def quick_bits(graph, params, valid: dict[str, np.ndarray], texts: dict[str, list[str]], windows: int = 8):
    """Returns bits per byte of every domain on its first windows of 1,024 tokens.

    The windows are packed, so the figure only serves to choose a checkpoint.
    """
    bits = {}
    for name, stream in valid.items():
        n = max(1, min(windows, (len(stream) - 1) // 1024))
        rows = np.stack([stream[i * 1024 : i * 1024 + 1025] for i in range(n)])
        rows = np.concatenate([rows, np.zeros((-n % 8, 1025), np.int32)])
        total = sum(float(eval_step(graph, params, rows[i : i + 1])) for i in range(n))
        bytes_per_token = sum(len(d.encode()) + len(END) + 2 for d in texts[name]) / len(stream)
        bits[name] = total / math.log(2) / (n * 1024 * bytes_per_token)
    return bits


def fresh_state(seed: int, optimizer: optax.GradientTransformation):
    """Returns (graph, state) of a new run. A checkpoint holds the state."""
    model = Decoder(make_blueprint(CONFIG, TRAINED, make_mesh()), ParamMaker(jnp.float32, nnx.Rngs(seed)))
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    return graph, {"params": params, "opt": optimizer.init(params), "step": 0, "best": np.inf}


def restore(manager: ocp.CheckpointManager, state):
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))


@dataclass(frozen=True)
class Corpus:
    """The texts of a run, by domain.

    train: ids of the train split.
    valid: ids of the valid split.
    valid_texts: documents of the valid split.
    """

    train: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]
    valid_texts: dict[str, list[str]]


def read_corpus(data: Path, out: Path, init: Path | None) -> Corpus:
    """Reads both splits. The tokenizer in ``out`` is an earlier one, that of ``init``, or a new one."""
    texts, valid_texts, path = domains(data, "train"), domains(data, "valid"), out / "tokenizer.json"
    if init and not path.exists():
        shutil.copy(init / "tokenizer.json", path)
    if not path.exists():
        train_tokenizer(texts).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    corpus = Corpus(token_streams(tokenizer, texts), token_streams(tokenizer, valid_texts), valid_texts)
    print({name: len(stream) for name, stream in corpus.train.items()}, flush=True)
    return corpus


class Training:
    """The state of a run, which goes on from the last checkpoint in ``out``.

    last: the checkpoint from which a longer run goes on.
    best: the checkpoint with the fewest bits per byte.
    """

    def __init__(self, out: Path, seed: int, init: Path | None):
        keep_one = ocp.CheckpointManagerOptions(max_to_keep=1)
        self.last, self.best = (
            ocp.CheckpointManager(out / name, options=keep_one) for name in ("last", "best")
        )
        self.optimizer = make_optimizer()
        self.graph, state = fresh_state(seed, self.optimizer)
        if self.last.latest_step() is not None:
            state = restore(self.last, state)
            print("resumed at step", state["step"], flush=True)
        elif init:
            model = load_model(init, make_mesh(), TRAINED, "float32")
            state["params"] = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
        self.params, self.optimizer_state = state["params"], state["opt"]
        self.step, self.best_bits = int(state["step"]), float(state["best"])

    def save(self, manager: ocp.CheckpointManager) -> None:
        tree = {"params": self.params, "opt": self.optimizer_state}
        tree |= {"step": self.step, "best": self.best_bits}
        manager.save(self.step, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()

    def take_step(self, window_BT: np.ndarray, rate: float) -> list[float]:
        """Updates the parameters and returns the loss, the load-balancing loss and the dropped share."""
        self.params, self.optimizer_state, report = train_step(
            self.optimizer, self.graph, self.params, self.optimizer_state, window_BT, rate
        )
        jax.block_until_ready(report)
        self.step += 1
        return [float(value) for value in report]

    def evaluate(self, corpus: Corpus, label: str) -> None:
        """Prints the bits per byte of every domain, and saves the best checkpoint if they are the fewest."""
        bits = quick_bits(self.graph, self.params, corpus.valid, corpus.valid_texts)
        mean = sum(bits.values()) / len(bits)
        print(label, self.step, round(mean, 4), {k: round(v, 3) for k, v in bits.items()}, flush=True)
        if mean < self.best_bits:
            self.best_bits = mean
            self.save(self.best)


def train(args: argparse.Namespace) -> None:
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(args.data, out, args.init)
    run = Training(out, args.seed, args.init)
    rng = np.random.default_rng(args.seed + run.step)
    sources = [(at, batches(corpus.train, rng, b, t)) for at, b, t in PHASES]
    start = last_eval = last_print = time.monotonic()
    seen, is_falling = 0, False
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        if done >= 1 - args.decay and not is_falling:  # a longer run goes on from before the fall
            run.save(run.last)
            is_falling = True
        rate = args.rate * min(1.0, (run.step + 1) / 100, (1 - done) / args.decay + 0.01)
        window_BT = next([source for at, source in sources if done >= at][-1])
        ce, balance, dropped = run.take_step(window_BT, rate)
        seen += window_BT.shape[0] * (window_BT.shape[1] - 1)
        now = time.monotonic()
        if now - last_print > 20:
            print(f"{run.step} {seen} tokens {now - start:.0f} s loss {ce:.3f} balance {balance:.3f} "
                  f"dropped {dropped:.4f} rate {rate:.5f}", flush=True)  # fmt: skip
            last_print = now
        if now - last_eval > 60 * args.eval_minutes:
            run.evaluate(corpus, "eval")
            if not is_falling:
                run.save(run.last)
            last_eval = time.monotonic()
    run.evaluate(corpus, "final")


def export(args: argparse.Namespace) -> None:
    """Writes the best checkpoint as a Hugging Face directory in bfloat16, with its tokenizer and template."""
    out, to = Path(args.out).resolve(), Path(args.to)
    graph, state = fresh_state(0, make_optimizer())
    best = ocp.CheckpointManager(out / args.which)
    params = restore(best, state)["params"]
    flat = nnx.state(nnx.merge(graph, params))
    save_hf(nnx.merge(graph, flat), HF_CONFIG, to)
    shutil.copy(out / "tokenizer.json", to / "tokenizer.json")
    (to / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    (to / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")
    print(f"exported step {best.latest_step()} to {to}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("train")
    run.set_defaults(run=train)
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--out", required=True)
    run.add_argument("--minutes", type=float, default=75)
    run.add_argument("--eval-minutes", type=float, default=10)
    run.add_argument("--rate", type=float, default=3e-3)
    run.add_argument("--decay", type=float, default=0.35)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--init", type=Path, help="a Hugging Face directory to start from")
    write = commands.add_parser("export")
    write.set_defaults(run=export)
    write.add_argument("--out", required=True)
    write.add_argument("--to", required=True)
    write.add_argument("--which", choices=["best", "last"], default="best")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
