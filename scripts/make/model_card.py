"""Measures the bundled model on the valid split and writes its card.

    python scripts/make/model_card.py --data ../shared/data [--model jmoe/assets/tiny] [--json OUT]

For every domain: perplexity (the protocol of ``jmoe eval``), bits per byte compared with gzip -9 and xz -9 of
the same file, and the busiest experts. Bits per byte count every byte of every document: a window's first
token, which the protocol does not score, is charged log2(vocabulary) bits.
"""

import argparse
import gzip
import json
import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.tools.data import read_documents, windows
from jmoe.tools.evaluate import score_prefill

SHUFFLES = 20


@dataclass
class Domain:
    """The figures of one domain.

    name: domain.
    bytes: bytes of its documents.
    tokens: number of scored tokens.
    nll: loss in nats.
    unscored: number of first tokens, which are not scored.
    gzip_bits: bits per byte of gzip.
    xz_bits: bits per byte of xz.
    counts_DLE: counts, layer x expert, of each document.
    """

    name: str
    bytes: int
    tokens: int
    nll: float
    unscored: int
    gzip_bits: float
    xz_bits: float
    counts_DLE: list[np.ndarray]  # one entry a document

    def bits(self, vocabulary: int) -> float:
        return (self.nll / math.log(2) + self.unscored * math.log2(vocabulary)) / self.bytes

    @property
    def counts(self) -> np.ndarray:
        return np.sum(self.counts_DLE, axis=0)


def measure(engine: Engine, path: Path) -> Domain:
    text = lzma.decompress(path.read_bytes())
    codec, length = engine.codec, engine.max_model_len
    assert codec is not None
    tokens, nll, unscored, size, counts = 0, 0.0, 0, 0, []
    for document in read_documents(path):
        ids = codec.encode(document)
        before = engine.runner.counters["prefill"].counts_LE.copy()
        score = score_prefill(engine, iter(list(windows([ids], length))), 1, lambda n: None)
        engine.runner.drain()
        counts.append(engine.runner.counters["prefill"].counts_LE - before)
        tokens, nll = tokens + score.tokens, nll + score.nll
        unscored += len(ids) - score.tokens
        size += len(document.encode())
    squeezed = (len(gzip.compress(text, 9)), len(lzma.compress(text, preset=9)))
    gz, xz = (8 * n / len(text) for n in squeezed)
    return Domain(path.name.split(".")[0], size, tokens, nll, unscored, gz, xz, counts)


def information(counts_DE: np.ndarray) -> float:
    """Returns the mutual information of row and column, in nats."""
    p = counts_DE / counts_DE.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / independent[seen])).sum())


def domain_information(domains: list[Domain]) -> dict[str, float]:
    """Returns the mean over layers of I(domain; expert), in three forms.

    In the first form the labels are the real ones. In the others they are shuffled over assignments, or over
    documents.
    """
    rng = np.random.default_rng(0)
    by_domain = np.stack([d.counts for d in domains])
    layers = range(by_domain.shape[1])
    documents = np.stack([c for d in domains for c in d.counts_DLE])
    labels = np.repeat(np.arange(len(domains)), [len(d.counts_DLE) for d in domains])

    def over_assignments() -> np.ndarray:
        share_LE = by_domain.sum(0) / by_domain.sum((0, 2))[:, None]
        drawn = [[rng.multinomial(n, p) for n, p in zip(c.sum(1), share_LE, strict=True)] for c in by_domain]
        return np.asarray(drawn)

    def over_documents() -> np.ndarray:
        shuffled = rng.permutation(labels)
        return np.stack([documents[shuffled == d].sum(0) for d in range(len(domains))])

    def mean(counts_DLE: np.ndarray) -> float:
        return float(np.mean([information(counts_DLE[:, i]) for i in layers]))

    return {
        "nats": mean(by_domain),
        "nats_labels_shuffled_over_assignments": float(
            np.mean([mean(over_assignments()) for _ in range(SHUFFLES)])
        ),
        "nats_labels_shuffled_over_documents": float(
            np.mean([mean(over_documents()) for _ in range(SHUFFLES)])
        ),
    }


def report(engine: Engine, domains: list[Domain]) -> dict:
    vocabulary = engine.vocab_size
    rows = [
        {
            "domain": d.name,
            "perplexity": math.exp(d.nll / d.tokens),
            "bits_per_byte": d.bits(vocabulary),
            "gzip_9": d.gzip_bits,
            "xz_9": d.xz_bits,
            "expert_share_by_layer": (d.counts / d.counts.sum(1, keepdims=True)).round(4).tolist(),
        }
        for d in domains
    ]
    bits, xz = (float(np.mean([r[k] for r in rows])) for k in ("bits_per_byte", "xz_9"))
    return {
        "domains": rows,
        "mean_bits_per_byte": bits,
        "mean_xz_9": xz,
        "below_xz": 1 - bits / xz,
        "domains_below_gzip": sum(r["bits_per_byte"] < r["gzip_9"] for r in rows),
        "perplexity": math.exp(sum(d.nll for d in domains) / sum(d.tokens for d in domains)),
        "information": domain_information(domains),
    }


def card(measured: dict, data_note: str) -> str:
    lines = [
        data_note,
        "",
        "| domain | perplexity | bits/byte | gzip -9 | xz -9 | busiest experts (layer 0; last layer) |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for r in measured["domains"]:
        first, last = (np.asarray(r["expert_share_by_layer"][i]) for i in (0, -1))
        busiest = "; ".join(
            ", ".join(f"{e} ({100 * share[e]:.0f} %)" for e in np.argsort(-share)[:3])
            for share in (first, last)
        )
        lines.append(
            f"| {r['domain']} | {r['perplexity']:.2f} | {r['bits_per_byte']:.3f} | {r['gzip_9']:.3f} | "
            f"{r['xz_9']:.3f} | {busiest} |"
        )
    info = measured["information"]
    lines += [
        "",
        f"Mean over the domains: {measured['mean_bits_per_byte']:.3f} bits per byte, "
        f"{100 * measured['below_xz']:.1f} % below xz -9 ({measured['mean_xz_9']:.3f}); below gzip -9 on "
        f"{measured['domains_below_gzip']} of {len(measured['domains'])}. Perplexity over all: "
        f"{measured['perplexity']:.2f}.",
        "",
        f"Mutual information of domain and expert, mean over the layers: {info['nats']:.4f} nats; with the "
        f"labels shuffled over assignments {info['nats_labels_shuffled_over_assignments']:.6f} "
        f"({info['nats'] / info['nats_labels_shuffled_over_assignments']:.0f} times less), over documents "
        f"{info['nats_labels_shuffled_over_documents']:.4f}.",
        "",
        "Share of each expert in a domain's assignments (rows: domains; a character an expert, by eighths of",
        "the domain's busiest), layer 0 and last layer:",
        "",
        "```",
    ]
    for r in measured["domains"]:
        bars = ["".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * s / max(row))] for s in row)
                for row in (r["expert_share_by_layer"][0], r["expert_share_by_layer"][-1])]  # fmt: skip
        lines.append(f"{r['domain']:>15} |{bars[0]}|  |{bars[1]}|")
    return "\n".join([*lines, "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="jmoe/assets/tiny")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = build_engine(args.model, EngineSettings(max_num_seqs=1), warm_up=False)
    domains = [measure(engine, path) for path in sorted((args.data / "valid").glob("*.txt.xz"))]
    measured = report(engine, domains)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n")
    path = Path(args.model) / "README.md"
    head = path.read_text().split(MARK)[0] if path.exists() else ""
    path.write_text(head + MARK + "\n\n" + card(measured, NOTE))
    print(json.dumps({k: v for k, v in measured.items() if k != "domains"}, indent=1))


MARK = "<!-- measured: scripts/make/model_card.py writes what follows -->"
NOTE = "Measured by `python scripts/make/model_card.py --data ../shared/data` on the valid split:"

if __name__ == "__main__":
    main()
