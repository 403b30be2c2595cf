"""Tests models of the Hub against a fake one on loopback: ids, files, cuts, refusals, and the commands."""

import errno
import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.command_line import run
from support.models import hf_tiny
from support.server.fake_hub import COMMIT, FakeHub, serving

from jmoe import LLM, SamplingParams
from jmoe.checkpoint.hf.hub import HubId, fetch, hub_id
from jmoe.engine.deployment.found import find_model

REPOSITORY = HubId("org/model")
TEXTS = {"config.json", "tokenizer.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns the files of a repository: what jmoe reads, and what it must not fetch."""
    folder = tmp_path_factory.mktemp("repository")
    hf_tiny.write_checkpoint(folder, hf_tiny.hf_config(vocab_size=256, eos_token_id=None))
    hf_tiny.write_tokenizer(folder)
    assert (folder / "model.safetensors").stat().st_size > 100_000, "a cut download is a large one"
    (folder / "original").mkdir()
    for name in ("model.py", "pytorch_model.bin", "original/model.safetensors", "README.md"):
        (folder / name).write_bytes(b"unwanted")
    return folder


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    """Yields a running hub, which huggingface_hub uses with an empty cache."""
    with serving(FakeHub(folder)) as hub:
        files = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Qwen/Qwen3-30B-A3B", HubId("Qwen/Qwen3-30B-A3B")),
        ("org/name.v1_x", HubId("org/name.v1_x")),
        ("org/name-GGUF:Q4_K_M", HubId("org/name-GGUF", kind="Q4_K_M")),
        ("org/name/sub/a-00001-of-00002.gguf", HubId("org/name", file="sub/a-00001-of-00002.gguf")),
        *(
            (text, None)
            for text in ("./models/x", "/models/x", "models/x/", "tiny", "a/b/c", "~/x", "../x/y")
        ),
        *((text, None) for text in ("org/model.gguf", "org/a--b", "org/..", "http://host/x", "org/nämé", "")),
    ],
)
def test_ids_and_paths(text, want):
    assert hub_id(text) == want


def test_only_what_is_read_is_fetched_and_a_second_time_nothing(hub, tmp_path):
    found = fetch(REPOSITORY)
    assert hub.fetched() == {*TEXTS, "model.safetensors"} and found.commit == COMMIT
    assert {path.name for path in found.path.iterdir()} == hub.fetched()
    assert found.path.is_relative_to(tmp_path / "cache")
    hub.asked.clear()
    assert fetch(REPOSITORY) == found == fetch(REPOSITORY, COMMIT) and hub.fetched() == set()


def test_a_folder_of_the_cache_may_be_given(hub, tmp_path):
    assert fetch(REPOSITORY, download_dir=str(tmp_path / "own")).path.is_relative_to(tmp_path / "own")
    assert not (tmp_path / "cache").exists()


def test_a_cut_download_goes_on_where_it_ended(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is written at a time
    hub.num_cuts = 1
    weights = fetch(REPOSITORY).path / "model.safetensors"
    assert weights.read_bytes() == (folder / "model.safetensors").read_bytes()
    ranges = [part for method, path, part in hub.asked if method == "GET" and path.endswith(".safetensors")]
    half = weights.stat().st_size // 2
    assert ranges == ["", f"bytes={half // 1000 * 1000}-"], "the first half is not fetched again"


def test_without_the_hub_the_cache_is_used(hub, monkeypatch):
    found = fetch(REPOSITORY)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(REPOSITORY) == found and not hub.asked
    with pytest.raises(ValueError, match=r"'org/other' is no folder here; .* and HF_HUB_OFFLINE is set$"):
        fetch(HubId("org/other"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert fetch(REPOSITORY) == found
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:1 does not answer$"):
        fetch(HubId("org/other"))


def test_a_cache_without_the_weights_is_not_whole(hub, monkeypatch):
    assert fetch(REPOSITORY, weights=False).commit == COMMIT and hub.fetched() == TEXTS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"not whole in the cache|has no \*\.safetensors"):
        fetch(REPOSITORY)


def test_refusals_are_one_line(hub, monkeypatch):
    def refusal(name="org/model", revision=None):
        with pytest.raises(ValueError) as error:
            fetch(HubId(name), revision)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refusal("org/none") == (
        f"'org/none' is neither a folder here nor a repository of {hub.url} that your token may read"
    )
    assert refusal("org/old-model") == "org/old-model was renamed: give its new name, org/model"
    assert refusal(revision="nope") == "org/model has no revision 'nope'"
    hub.token = "secret"
    assert refusal().startswith(f"org/model is gated: accept its terms on {hub.url}/org/model, and log in")
    assert hub.fetched() == set()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetch(REPOSITORY).commit == COMMIT


def test_a_full_disk_is_told(hub, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ValueError, match=rf"no space left in {tmp_path}/cache"):
        fetch(REPOSITORY)


def test_a_repository_without_a_model_is_told(tmp_path, hub):
    hub.folder = tmp_path / "other"
    hub.folder.mkdir()
    (hub.folder / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"commit a{40} has no config\.json; .* given as org/model:QUANT"):
        fetch(REPOSITORY, COMMIT)
    hub.folder = tmp_path / "pickled"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other weights \(\*\.bin\) are not read"):
        fetch(REPOSITORY, COMMIT, str(tmp_path / "second"))


def test_gguf_files(hub, tmp_path):
    hub.folder = tmp_path / "gguf"
    (hub.folder / "big").mkdir(parents=True)
    names = {
        "m-Q4_K_M.gguf",
        "m-IQ4_K_M.gguf",
        "mmproj-Q4_K_M.gguf",
        "a-F16.gguf",
        "b.F16.gguf",
        "tokenizer.json",
    }
    names |= {f"big/m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)}
    for name in names:
        (hub.folder / name).write_text(name)  # equal files are fetched once

    def file(text):
        hub.asked.clear()
        wanted = hub_id(text)
        assert wanted is not None
        return fetch(wanted).path

    assert file("org/model:q4_k_m").name == "m-Q4_K_M.gguf"
    assert hub.fetched() == {"m-Q4_K_M.gguf", "tokenizer.json"}
    first = file("org/model:Q8_0")
    assert first.name == "m-Q8_0-00001-of-00002.gguf"
    assert {path.name for path in first.parent.iterdir()} == {f"m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)}
    assert file("org/model/big/m-Q8_0-00001-of-00002.gguf") == first
    with pytest.raises(ValueError, match=r"has 2 GGUF files of F16, such as a-F16\.gguf; give one of them"):
        file("org/model:F16")
    with pytest.raises(ValueError, match=r"has no GGUF file of Q2_K$"):
        file("org/model:Q2_K")


def test_what_is_here_comes_first(hub, monkeypatch, tmp_path):
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/model").path == Path("org/model") and not hub.asked
    with pytest.raises(ValueError, match=r"revision is for a model of the Hub .* 'org/model' is not one"):
        find_model("org/model", "main")
    with pytest.raises(ValueError, match="download_dir is for a model of the Hub"):
        find_model("tiny", download_dir="x")


def test_the_commands_take_ids_and_report_the_commit(capsys, hub, folder):
    facts = {"model": "org/model", "commit": COMMIT}
    code, out, _ = run(capsys, "doctor", "org/model", "--json")
    assert code == 0 and json.loads(out)["hub"] == facts and hub.fetched() == TEXTS
    words = ("--prompt", "hi", "--max-tokens", "2", "--temperature", "0", "--max-model-len", "16", "--json")
    code, out, err = run(capsys, "generate", "org/model", "--revision", "main", *words)
    report = json.loads(out)
    assert code == 0 and err == "" and report["hub"] == facts
    with LLM("org/model", max_model_len=16, warm_up=False) as llm:
        [output] = llm.generate(["hi"], SamplingParams(max_tokens=2, temperature=0.0))
    assert output.outputs[0].token_ids == report["outputs"][0]["token_ids"]
    code, out, err = run(capsys, "generate", "org/none", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("jmoe: 'org/none' is neither")
