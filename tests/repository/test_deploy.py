"""The manifests in configs/deploy are valid and have consistent sizes, and their commands and probes work."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import prod
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jmoe.cli.main import parser
from jmoe.server.routes.table import ROUTES

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    kind: json.loads((ROOT / f"tests/data/{kind.lower()}.schema.json").read_text(encoding="utf-8"))
    for kind in ("JobSet", "LeaderWorkerSet", "Service")
}
GIVEN = {  # the variables that Kubernetes or the controller puts into every container
    "JobSet": {"JOB_COMPLETION_INDEX"},
    "LeaderWorkerSet": {"LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"},
}


@dataclass(frozen=True)
class Manifest:
    """The facts that a manifest of any kind states.

    workload: resource that makes the pods.
    service: the service.
    pods: number of pods.
    devices: number of devices of a pod.
    pod: specification of a pod.
    rank: variable with a pod's rank.
    """

    workload: dict[str, Any]
    service: dict[str, Any]
    pods: int
    devices: int
    pod: dict[str, Any]
    rank: str

    @property
    def container(self) -> dict[str, Any]:
        [only] = self.pod["containers"]
        return only

    def flag(self, name: str) -> str:
        [value] = [a.partition("=")[2] for a in self.container["args"] if a.startswith(name + "=")]
        return value


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "configs/deploy" / name).read_text(encoding="utf-8")))


def on_tpu() -> Manifest:
    workload, service = documents("tpu-jobset.yaml")
    [replicated] = workload["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completions"] == job["parallelism"] and replicated["replicas"] == 1
    pod = job["template"]["spec"]
    devices = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    return Manifest(workload, service, job["completions"], devices, pod, "JOB_COMPLETION_INDEX")


def on_gpu() -> Manifest:
    workload, service = documents("gpu-leaderworkerset.yaml")
    group = workload["spec"]["leaderWorkerTemplate"]
    pod = group["workerTemplate"]["spec"]
    devices = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    return Manifest(workload, service, group["size"], devices, pod, "LWS_WORKER_INDEX")


@pytest.fixture(params=[on_tpu, on_gpu])
def manifest(request) -> Manifest:
    return request.param()


def problems(document: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMAS[document["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def test_every_document_fits_its_schema():
    for path in (ROOT / "configs/deploy").iterdir():
        for document in documents(path.name):
            assert problems(document) == [], path


def renamed(where: str, field: str, wrong: str) -> Callable[[dict], None]:
    def change(document: dict) -> None:
        part = at(document, where)
        part[wrong] = part.pop(field)

    return change


def put(where: str, field: str, value: Any) -> Callable[[dict], None]:
    return lambda document: at(document, where).update({field: value})


def at(document: Any, where: str) -> Any:
    for step in filter(None, where.split(".")):
        document = document[int(step) if step.isdigit() else step]
    return document


JOB = "spec.replicatedJobs.0.template.spec"
GROUP = "spec.leaderWorkerTemplate"
POD = {on_tpu: f"{JOB}.template.spec", on_gpu: f"{GROUP}.workerTemplate.spec"}
MISTAKES = {
    "misspelt count": (on_tpu, renamed(JOB, "completions", "completion")),
    "misspelt policy": (on_tpu, renamed("spec", "failurePolicy", "failurepolicy")),
    "unknown mode": (on_tpu, put("spec.failurePolicy", "restartStrategy", "Sometimes")),
    "misspelt size": (on_gpu, renamed(GROUP, "size", "Size")),
    "unknown restart": (on_gpu, put(GROUP, "restartPolicy", "Always")),
    "no template": (on_gpu, lambda document: document["spec"].pop("leaderWorkerTemplate")),
    "another version": (on_gpu, put("", "apiVersion", "leaderworkerset.x-k8s.io/v1alpha1")),
}
for maker, pod in POD.items():
    MISTAKES |= {
        f"{maker.__name__}: {text}": (maker, change)
        for text, change in {
            "misspelt probe": renamed(f"{pod}.containers.0", "readinessProbe", "readynessProbe"),
            "misspelt threshold": renamed(f"{pod}.containers.0.startupProbe", "failureThreshold", "failures"),
            "port as text": put(f"{pod}.containers.0.ports.0", "containerPort", "8000"),
            "number as a variable": put(f"{pod}.containers.0.env.0", "value", 1),
            "field at a wrong level": put(f"{pod}.containers.0", "terminationGracePeriodSeconds", 90),
            "nameless mount": lambda document, pod=pod: at(
                document, f"{pod}.containers.0.volumeMounts.0"
            ).pop("name"),
            "misspelt claim": renamed(f"{pod}.volumes.0.persistentVolumeClaim", "claimName", "claim"),
        }.items()
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_does_not_fit_the_schema(mistake: str):
    maker, change = MISTAKES[mistake]
    document = copy.deepcopy(maker().workload)
    change(document)
    assert len(problems(document)) >= 1


def test_a_mistake_in_the_service_does_not_fit(manifest: Manifest):
    wrong = copy.deepcopy(manifest.service)
    renamed("spec.ports.0", "targetPort", "target")(wrong)
    assert len(problems(wrong)) == 1


def test_the_mesh_takes_the_devices_that_are_asked_for(manifest: Manifest):
    given = [re.sub(r"\$\(\w+\)", str(manifest.pods), a) for a in manifest.container["args"]]
    assert manifest.container["command"] == ["jmoe", "serve"]
    flags = vars(parser().parse_args(["serve", *given]))
    assert flags["nnodes"] == manifest.pods and {"node_rank", "dist_init_addr"} <= set(flags)
    mesh = [flags.get(f"{axis}_parallel_size", 1) for axis in ("data", "expert", "tensor")]
    assert prod(mesh) == manifest.pods * manifest.devices
    assert flags["max_num_seqs"] % prod(mesh[:2]) == 0
    assert (
        flags["host"] == "0.0.0.0"
        and flags["shutdown_timeout"] < manifest.pod["terminationGracePeriodSeconds"]
    )


def test_the_slice_has_the_chips_and_its_steps_are_compiled_by_the_check():
    manifest = on_tpu()
    where = manifest.pod["nodeSelector"]
    topology = where["cloud.google.com/gke-tpu-topology"]
    assert where["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    assert prod(map(int, topology.split("x"))) == manifest.pods * manifest.devices
    mesh = f"1x{manifest.flag('--expert-parallel-size')}x{manifest.flag('--tensor-parallel-size')}"
    sequences = int(manifest.flag("--max-num-seqs")) // int(manifest.flag("--expert-parallel-size"))
    spec = importlib.util.spec_from_file_location("tpu_aot_check", ROOT / "scripts/tpu_aot_check.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(check := importlib.util.module_from_spec(spec))
    case = (manifest.flag("--served-model-name"), f"v6e:{topology}", mesh, sequences)
    assert case in [listed[:4] for listed in check.CASES]
    assert int(manifest.flag("--max-model-len")) == check.CONTEXT


def test_ranks_find_the_leader(manifest: Manifest):
    kind = manifest.workload["kind"]
    nodes = {"JobSet": str(manifest.pods), "LeaderWorkerSet": "$(LWS_GROUP_SIZE)"}[kind]
    leader = {"JobSet": "$(LEADER)", "LeaderWorkerSet": "$(LWS_LEADER_ADDRESS)"}[kind]
    assert manifest.flag("--nnodes") == nodes
    assert manifest.flag("--node-rank") == f"$({manifest.rank})"
    host, _, port = manifest.flag("--dist-init-addr").rpartition(":")
    assert host == leader
    ports = {p["name"]: p["containerPort"] for p in manifest.container["ports"]}
    assert ports == {"http": int(manifest.flag("--port")), "coordinator": int(port)}
    known = GIVEN[kind] | {variable["name"] for variable in manifest.container["env"]}
    assert set(re.findall(r"\$\((\w+)\)", json.dumps(manifest.container["args"]))) <= known


def test_the_job_set_names_its_leader():
    spec = on_tpu().workload["spec"]
    [leader] = [v for v in on_tpu().container["env"] if v["name"] == "LEADER"]
    path = "metadata.annotations['jobset.sigs.k8s.io/coordinator']"  # it is set if spec.coordinator is set
    assert leader["valueFrom"]["fieldRef"]["fieldPath"] == path
    assert spec["coordinator"] == {
        "replicatedJob": spec["replicatedJobs"][0]["name"],
        "jobIndex": 0,
        "podIndex": 0,
    }


def test_checkpoint_and_cache_are_claims(manifest: Manifest):
    volumes = {volume["name"]: volume for volume in manifest.pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in manifest.container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    [cache] = [v["value"] for v in manifest.container["env"] if v["name"] == "JMOE_CACHE_DIR"]
    model = mounts[str(Path(manifest.container["args"][0]).parent)]
    assert model["readOnly"] and not mounts[cache].get("readOnly")
    for mount in (model, mounts[cache]):
        assert "persistentVolumeClaim" in volumes[mount["name"]]


def test_clients_reach_the_leader_only(manifest: Manifest):
    selector = manifest.service["spec"]["selector"]
    name = {"JobSet": "jobset.sigs.k8s.io/jobset-name", "LeaderWorkerSet": "leaderworkerset.sigs.k8s.io/name"}
    assert selector[name[manifest.workload["kind"]]] == manifest.workload["metadata"]["name"]
    assert "0" in selector.values()
    assert [p["targetPort"] for p in manifest.service["spec"]["ports"]] == ["http"]


@pytest.fixture
def server() -> Iterator[tuple[int, dict[str, int]]]:
    """Yields a port, and the status with which each path is answered there."""
    answers: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.get(self.path, 404))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield listening.server_port, answers
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_probes_ask_the_leader_and_pass_elsewhere(kind: str, manifest: Manifest, server):
    port, answers = server
    [*shell, command] = manifest.container[kind]["exec"]["command"]
    path = "/ready" if kind == "readinessProbe" else "/live"
    assert ("GET", path) in {(route.method, route.path) for route in ROUTES}
    assert f":{manifest.flag('--port')}{path}" in command
    command = command.replace(f":{manifest.flag('--port')}/", f":{port}/")

    def passes(rank: int) -> bool:
        folder = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {"PATH": folder, manifest.rank: str(rank)}
        return subprocess.run([*shell, command], env=environment, capture_output=True).returncode == 0

    answers[path] = 503
    assert not passes(0) and passes(1)
    answers[path] = 200
    assert passes(0)


def test_schemas_are_cut_without_losing_their_refusals():
    spec = importlib.util.spec_from_file_location("reduce_crd", ROOT / "scripts/make/reduce_crd.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(reduce_crd := importlib.util.module_from_spec(spec))
    port = {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    probe = {
        "type": "object",
        "description": "what to ask",
        "required": ["path"],
        "properties": {"path": {"type": "string", "pattern": "^/"}, "port": port},
    }
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {}}
    fields = {"live": probe, "ready": probe, "extra": free}
    versions = [
        {"name": "v1beta1", "storage": False},
        {
            "name": "v1",
            "storage": True,
            "schema": {
                "openAPIV3Schema": {
                    "type": "object",
                    "properties": {"spec": {"type": "object", "properties": fields}},
                }
            },
        },
    ]
    crd = {"spec": {"group": "example.com", "names": {"kind": "Thing"}, "versions": versions}}
    schema = reduce_crd.from_crd(crd, "v1.2.3", "https://example.com")
    assert list(schema["$defs"]) == ["live"] and "what to ask" not in json.dumps(schema)
    refused = jsonschema.Draft202012Validator(schema)

    def valid(**fields: Any) -> bool:
        head = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "a"}}
        return refused.is_valid(head | {"spec": fields})

    assert valid(live={"path": "/a", "port": 1}, ready={"path": "/a", "port": "http"}, extra={"any": 1})
    assert not valid(live={"path": "/a", "prot": 1})
    assert not valid(ready={"port": 1}) and not valid(ready={"path": "a"}) and not valid(readi={"path": "/a"})
