"""``jmoe serve``: one process, or several whose devices form one mesh."""

import argparse
import signal
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from jmoe import __version__
from jmoe.cli.flags import (
    add_command,
    add_model_flags,
    add_serve_flags,
    found_model,
    given_settings,
    read_serve_config,
    reported,
    settings_from,
)
from jmoe.engine.faults import interrupt_ends_at_once
from jmoe.tools.progress import Bars

if TYPE_CHECKING:
    from jmoe.engine.processes.nodes import Nodes

NODE_FLAGS = ("nnodes", "node_rank", "dist_init_addr")


def add_serve(commands: Any) -> None:
    p = add_command(commands, "serve", run_serve, "an OpenAI-compatible server")
    add_model_flags(p)
    add_serve_flags(p)


@interrupt_ends_at_once()
def run_serve(args: argparse.Namespace) -> int:
    from jmoe.engine.processes.nodes import Nodes, leave
    from jmoe.server.run import without_threads
    from jmoe.server.watch.logs import configure

    values = vars(args) | {}
    if "config" in values:
        values = read_serve_config(values["config"]) | values
    configure(values.get("log_format", "text"), values.get("log_level", "info"))
    nodes = Nodes(**{k: values[k] for k in NODE_FLAGS if k in values})
    if nodes.nnodes == 1:
        return without_threads(serve_model(values))
    run = follow_leader if nodes.rank else serve_model
    return without_threads(leave(reported(lambda: run(values, nodes))))


def serve_model(values: dict[str, Any], nodes: "Nodes | None" = None) -> int:
    """Serves over HTTP, with the devices of all of ``nodes``. It returns the exit code."""
    import logging

    from jmoe.engine.build import build_engine
    from jmoe.engine.processes.lockstep import lead
    from jmoe.engine.request import EngineDead
    from jmoe.engine.worker import EngineWorker
    from jmoe.server.run import bind, serve
    from jmoe.server.settings import ServerSettings

    log = logging.getLogger(__name__)
    log.info("jmoe %s, settings given: %s", __version__, given_settings(values))
    server = ServerSettings(**{f.name: values[f.name] for f in fields(ServerSettings) if f.name in values})
    tracer = make_tracer(values, next(iter(server.served_names), None))
    socket = bind(server.host, server.port)  # before the model is loaded: a port in use is reported at once
    settings, name = settings_from(values), values.get("model", "tiny")
    model = found_model(values)
    try:
        with Bars() as bars:
            engine = lead(nodes, model, settings, bars) if nodes else build_engine(model.path, settings, bars)
    except EngineDead as error:
        log.error("the model was not started: %s", error)
        return 1
    kernels = engine.runner.kernels
    log.info("expert kernels: %s (%s)", kernels.experts, kernels.why_experts)
    if engine.runner.is_lossy:
        log.info("lossy techniques are on: %s", ", then ".join(map(str, settings.moe.stages)))
    log.info("paged attention: %s (%s)", kernels.attention, kernels.why_attention)
    worker = EngineWorker(engine)
    worker.start()
    try:
        return serve(worker, server, socket, model.path, name, [tracer] if tracer else [])
    finally:
        if tracer:
            tracer.close()
        if engine.runner.is_alive:  # else a step may never end
            worker.close()


def make_tracer(values: dict[str, Any], served_model_name: str | None) -> Any:
    """Returns the observer that sends spans; None if no endpoint is set."""
    if "otlp_traces_endpoint" not in values:
        return None
    try:
        from jmoe.server.watch.tracing import Tracer, span_exporter
    except ImportError:
        raise ValueError("--otlp-traces-endpoint needs the otel extra: pip install 'jmoe[otel]'") from None
    model = served_model_name or values.get("model", "tiny")
    return Tracer(span_exporter(values["otlp_traces_endpoint"]), model)


def follow_leader(values: dict[str, Any], nodes: "Nodes") -> int:
    """Follows process 0, without HTTP, until it ends. It returns 0, or 1 if process 0 ends without saying
    so."""
    import logging

    from jmoe.engine.processes.lockstep import follow
    from jmoe.engine.request import EngineDead

    log = logging.getLogger(__name__)

    def leave_it_to_the_leader(number: int, frame: Any) -> None:
        """Ignores the first signal: process 0 gets it too, but first finishes running answers, for which it
        needs this process."""
        signal.signal(number, signal.SIG_DFL)
        log.info("process %d ends with process 0; a second signal ends it at once", nodes.rank)

    def ready(runner: Any) -> None:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN:  # ignored with nohup
                signal.signal(each, leave_it_to_the_leader)

    try:
        with Bars() as bars:
            settings = settings_from(values)
            follow(nodes, found_model(values), settings, bars, ready)
    except EngineDead as error:
        log.error("process %d ends without process 0: %s", nodes.rank, error)
        return 1
    return 0
