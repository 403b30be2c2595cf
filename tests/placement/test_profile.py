"""Tests profiles: counts against plain loops, bounded memory, the file, and the command that makes them."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models import hf_tiny
from support.models.routed import (
    LAYERS,
    VOCAB,
    K,
    builder_for,
    embeddings,
    planted,
    planted_homes,
    planted_requests,
)
from support.models.small import config, decoder, mesh_of, tokens

from jmoe.checkpoint import load_model
from jmoe.cli.main import main
from jmoe.engine.step.inputs import Sizes
from jmoe.engine.step.runner import Runner
from jmoe.nn.sequences import Sequences
from jmoe.placement import profile_builder
from jmoe.placement.profile import Profile
from jmoe.placement.profile_builder import RoutedRequest, nearest_seen
from jmoe.tools.data import bounded
from jmoe.tools.profile import routed

EXPERTS = 8


def test_counts_are_those_of_plain_loops(monkeypatch):
    monkeypatch.setattr(profile_builder, "BUFFERED", 500)  # so that there are several merges
    requests = planted_requests(planted_homes(EXPERTS, 4))
    builder = builder_for(planted_homes(EXPERTS, 4))
    chosen = np.zeros((LAYERS, VOCAB, EXPERTS), int)
    together, following = (
        np.zeros((LAYERS, EXPERTS, EXPERTS), int),
        np.zeros((LAYERS - 1, EXPERTS, EXPERTS), int),
    )
    for request in requests:
        builder.add(request)
        for i, token in enumerate(request.tokens_N):
            for layer in range(LAYERS):
                for one in request.ids_LNK[layer, i]:
                    chosen[layer, token, one] += 1
                    for other in request.ids_LNK[layer, i]:
                        together[layer, one, other] += 1
                    if layer + 1 < LAYERS:
                        for after in request.ids_LNK[layer + 1, i]:
                            following[layer, one, after] += 1
    made = builder.finish("m", nearest_seen(embeddings(), builder.seen_V))
    text = np.concatenate([r.tokens_N for r in requests])
    assert made.tokens == len(text) and (made.layers, made.experts, made.vocab) == (LAYERS, EXPERTS, VOCAB)
    np.testing.assert_array_equal(made.frequency_V, np.bincount(text, minlength=VOCAB))
    np.testing.assert_array_equal(made.together_LEE, together)
    np.testing.assert_array_equal(made.following_LEE, following)
    np.testing.assert_array_equal(made.loads_LE, chosen.sum(1))
    for layer in range(LAYERS):
        np.testing.assert_array_equal(made.chosen(layer, np.arange(VOCAB)), chosen[layer])
        some = np.array([1, 5, 38])
        np.testing.assert_array_equal(made.chosen(layer, some), chosen[layer, some])


def test_the_sample_is_requests_with_a_piece_of_each():
    requests = planted_requests(planted_homes(EXPERTS, 4))
    builder = builder_for(planted_homes(EXPERTS, 4), trace_length=24)
    for request in requests:
        builder.add(request)
    sample = builder.finish("m", np.arange(VOCAB)).sample
    for i, request in enumerate(requests):
        counts = [np.bincount(ids.ravel(), minlength=EXPERTS) for ids in request.ids_LNK]
        np.testing.assert_array_equal(sample.experts_QLE[i], counts)
        np.testing.assert_array_equal(sample.gates_QLE[i], request.gates_LE.astype(np.float16))
        np.testing.assert_array_equal(sample.embeddings_QD[i], request.embedding_D.astype(np.float16))
        np.testing.assert_array_equal(sample.maps_QMLE[i], request.maps_MLE.astype(np.float16))
        np.testing.assert_array_equal(sample.map_tokens_QM[i], request.map_tokens_M)
        length = min(24, len(request.tokens_N))
        assert (sample.tokens_QP[i, length:] == -1).all()
        starts = [
            s for s in range(len(request.tokens_N) - length + 1)
            if (request.tokens_N[s : s + length] == sample.tokens_QP[i, :length]).all()
            and (request.ids_LNK[:, s : s + length].transpose(1, 0, 2) == sample.ids_QPLK[i, :length]).all()
        ]  # fmt: skip
        assert starts, "not a contiguous piece"
        piece = request.weights_LNK[:, starts[0] : starts[0] + length].transpose(1, 0, 2)
        np.testing.assert_array_equal(sample.weights_QPLK[i, :length], piece.astype(np.float16))


def test_memory_and_file_do_not_grow_with_the_text(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(profile_builder, "BUFFERED", 2000)
    requests = planted_requests(planted_homes(EXPERTS, 4), 40)
    builder = builder_for(planted_homes(EXPERTS, 4), sample_size=16)
    tracemalloc.start()
    held = []
    for rounds in (5, 45):
        for _ in range(rounds):
            for request in requests:
                builder.add(request)
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] < held[0] + 50_000, "the builder's own arrays; one round of requests is 200 kB"
    made = builder.finish("m", np.arange(VOCAB))
    assert len(made.sample.tokens_QP) == 16 and len(made.pairs_X) <= LAYERS * VOCAB * EXPERTS
    assert made.tokens == 50 * sum(len(r.tokens_N) for r in requests) == made.frequency_V.sum()


def test_every_request_is_as_likely_to_be_kept_and_the_seed_decides():
    requests = planted_requests(planted_homes(EXPERTS, 4), 30)
    kept = np.zeros(30, int)
    for seed in range(80):
        builder = builder_for(planted_homes(EXPERTS, 4), sample_size=10, seed=seed)
        for i, request in enumerate(requests):
            builder.add(replace(request, embedding_D=np.full(4, i)))
        kept[builder.finish("m", np.arange(VOCAB)).sample.embeddings_QD[:, 0].astype(int)] += 1
    assert kept.sum() == 800 and kept.min() > 10 and kept.max() < 45, "26.7 expected of each"
    assert kept[:10].sum() < 350, "the first ones are not kept for being first"


def test_an_unseen_token_has_the_nearest_seen_one_by_cosine():
    made, _ = planted()
    assert not made.frequency_V[38:].any()
    np.testing.assert_array_equal(made.nearest_V, [*range(38), 3, 0])


def test_the_file_gives_back_what_was_saved(tmp_path: Path):
    made, _ = planted()
    made.save(tmp_path / "profile")
    again = Profile.load(tmp_path / "profile")
    assert (again.model, again.tokens, again.k) == ("planted", made.tokens, K)
    for name in ("frequency_V", "pairs_X", "counts_X", "together_LEE", "following_LEE", "nearest_V"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
    for name, array in vars(made.sample).items():
        np.testing.assert_array_equal(getattr(again.sample, name), array)


def test_files_that_are_no_profile_are_refused(tmp_path: Path):
    path = tmp_path / "p.npz"
    with pytest.raises(ValueError, match=r"cannot read the profile .*p\.npz"):
        Profile.load(path)
    for content in (b"", b"PK\x03\x04 not a zip", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the profile .*p\.npz"):
            Profile.load(path)
    for other in ("jmoe placement 2", "jmoe profile 1"):
        np.savez(path, format=np.array(other))
        with pytest.raises(ValueError, match="this release reads 'jmoe profile 2'"):
            Profile.load(path)
    np.savez(path, format=np.array("jmoe profile 2"))
    with pytest.raises(ValueError, match=r"p\.npz is not a profile"):
        Profile.load(path)
    made, _ = planted()
    for change, message in (
        ({"nearest_V": made.nearest_V[1:]}, r"nearest must be \[40\], it is \[39\]"),
        ({"pairs_X": made.pairs_X[::-1]}, "pairs must ascend"),
        ({"nearest_V": made.nearest_V + VOCAB}, "nearest must be from 0 to 39"),
        ({"k": 3}, r"trace ids must be \[12, 32, 3, 3\]"),
        (
            {"sample": replace(made.sample, maps_QMLE=made.sample.maps_QMLE[:, :1])},
            r"maps must be \[12, 2, 3",
        ),
        (
            {"sample": replace(made.sample, map_tokens_QM=made.sample.map_tokens_QM + VOCAB)},
            "map tokens must be from 0 to 39",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(made, **change)
    object.__setattr__(made, "counts_X", made.counts_X[1:])
    made.save(path)
    with pytest.raises(ValueError, match=r"cannot read the profile .*p\.npz: counts must be"):
        Profile.load(path)


def test_windows_on_a_mesh_have_the_routing_of_the_decoder():
    cfg, mesh = config(), mesh_of((1, 4, 1))
    runner = Runner(decoder(cfg, mesh), mesh, Sizes((1,), (64,), 32, 4, 4))
    windows = [tokens(cfg, n, seed=n).tolist() for n in (12, 30, 3)]
    found = list(routed(runner, iter(windows), 2))
    again = [request.map_tokens_M for request in routed(runner, iter(windows), 2)]
    np.testing.assert_array_equal(again, [request.map_tokens_M for request in found])
    plain = decoder(cfg, mesh_of((1, 1, 1)))
    embed, run = np.asarray(plain.embed[...]), jax.jit(lambda given: plain(given).routing)
    for window, request in zip(windows, found, strict=True):
        ids = np.array([window], np.int32)
        out = run(Sequences(ids, np.arange(len(window), dtype=np.int32)[None]))
        np.testing.assert_array_equal(request.tokens_N, window)
        np.testing.assert_array_equal(request.ids_LNK, [r.ids_TK for r in out])
        np.testing.assert_allclose(request.weights_LNK, [r.weights_TK for r in out], atol=1e-5)
        np.testing.assert_allclose(request.gates_LE, [np.mean(r.scores_TE, 0) for r in out], atol=1e-5)
        np.testing.assert_allclose(request.embedding_D, embed[window].mean(0), atol=1e-5)
        check_maps(request, np.stack([r.scores_TE for r in out], 1))


def check_maps(request: RoutedRequest, scores_NLE: np.ndarray) -> None:
    """Checks that the maps are four whole gate distributions of distinct positions.

    A request with fewer positions has as many maps as positions, and the rest are none.
    """
    kept = (request.map_tokens_M >= 0).sum()
    assert kept == min(4, len(request.tokens_N)) and (request.map_tokens_M[kept:] == -1).all()
    far_MN = np.abs(request.maps_MLE[:kept, None] - scores_NLE).max((2, 3))
    places_M = far_MN.argmin(1)
    assert (far_MN.min(1) < 1e-5).all() and len(set(places_M)) == kept
    np.testing.assert_array_equal(request.tokens_N[places_M], request.map_tokens_M[:kept])


def test_max_tokens_cuts_the_last_window():
    assert [*bounded([[1, 2, 3], [4, 5, 6], [7]], 5, free=0)] == [[1, 2, 3], [4, 5]]
    assert [*bounded([[1, 2], [3]], None, free=0)] == [[1, 2], [3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    changes = {"vocab_size": 256, "max_position_embeddings": 64, "eos_token_id": None}
    hf_tiny.write_checkpoint(directory, hf_tiny.hf_config(**changes))
    hf_tiny.write_tokenizer(directory)
    return str(directory)


def test_the_commands_from_text_to_placement(capsys, model: str, tmp_path: Path):
    text, profile, placement = tmp_path / "a.txt", tmp_path / "profile.npz", tmp_path / "placement.npz"
    documents = ["a first document, of some length", "and the second"] * 20
    text.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    make = ["profile", model, "--data", str(text), "--out", str(profile), "--json"]
    assert main(make) == 0
    report = json.loads(capsys.readouterr().out)
    made = Profile.load(profile)
    assert report["tokens"] == made.tokens == made.loads_LE[0].sum() / made.k and report["windows"] == 40
    assert report["model"] == made.model and report["bytes"] == profile.stat().st_size
    assert main([*make[:-1], "--max-tokens", "100"]) == 0
    assert Profile.load(profile).tokens == 100 and "wrote" in capsys.readouterr().out
    place = ["place", str(profile), "--devices", "2", "--out", str(placement), "--json"]
    assert main(place) == 2
    assert "100 tokens; 128 are needed, 16 for each of 8 experts" in capsys.readouterr().err
    assert main(make) == 0 and capsys.readouterr()
    assert main(place) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == 2 and 0 <= report["remote"] <= 1 and report["max_over_mean_load"] >= 1
    for change, message in (
        ({"--devices": "3"}, "3 devices do not divide 8 experts; it can be one of [1, 2, 4, 8]"),
        ({"--method": "best"}, "unknown method 'best'; it can be one of alternating, cross_entropy"),
        ({"profile": str(text)}, f"cannot read the profile {text}"),
    ):
        argv = dict(zip(("", "profile", "--devices", "d", "--out", "o"), place[:-1], strict=True))
        argv |= {"d": change.get("--devices", "2"), "profile": change.get("profile", str(profile))}
        method = ["--method", change["--method"]] if "--method" in change else []
        assert main(["place", argv["profile"], "--devices", argv["d"], "--out", argv["o"], *method]) == 2
        assert message in (err := capsys.readouterr().err) and err.count("\n") == 1
    nowhere = ["--out", str(tmp_path / "none" / "p.npz")]
    for argv in (make, place):
        assert main([*argv, *nowhere]) == 2
        assert "cannot be written" in (err := capsys.readouterr().err) and err.count("\n") == 1
    shuffled = '{"shuffle": {"placement": "p.npz", "tokens": false}}'
    assert main([*make, "--moe-config", shuffled]) == 2
    assert "leave moe.shuffle out" in capsys.readouterr().err
    assert load_model(model, mesh_of((1, 1, 1))).cfg.num_experts == 8
