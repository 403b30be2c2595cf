"""The parts that commands share: a parser with one-line errors, the flags of model commands, and settings."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from jmoe_kernels.settings import Activations

from jmoe.config.choices import (
    AttentionSplit,
    DTypeChoice,
    KVCacheName,
    QuantizationName,
    QuantizedProducts,
)
from jmoe.config.units import parse_size

if TYPE_CHECKING:
    from jmoe.engine.deployment.found import FoundModel
    from jmoe.engine.deployment.settings import EngineSettings


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def size(text: str) -> int:
    """Returns the number of bytes of a text such as "2GiB"; it is a flag's type."""
    try:
        return parse_size("size", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def integer(text: str) -> int:
    """Returns the integer of a text; it is a flag's type, with the error text of ``jmoe.config.reading``. The
    setting checks the bounds."""
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"must be an integer, got {text[:80]!r}")
    return int(text)


def number(text: str) -> float:
    """Returns the number of a text; it is a flag's type. The setting refuses a number that is not finite."""
    try:
        if "_" not in text:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number, got {text[:80]!r}")


def reported(run: Callable[[], int]) -> int:
    """Returns the exit code of ``run``; a bad input is reported in one line."""
    try:
        return run()
    except (ValueError, OSError) as error:
        print("jmoe: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def add_command(commands: Any, name: str, run: Any, text: str) -> Parser:
    made = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
    made.set_defaults(run=run)
    return made


def add_model_flags(p: Parser) -> None:
    """Adds the flags of every command that runs a model; absent ones keep the defaults of
    ``EngineSettings``."""
    what = "tiny (bundled, the default), a directory, a GGUF file, or ORG/NAME of the Hugging Face Hub"
    p.add_argument("model", metavar="MODEL", nargs="?", help=what)
    add_hub_flags(p)
    p.add_argument("--max-model-len", type=integer, metavar="N", help="context length in tokens")
    p.add_argument("--dtype", choices=get_args(DTypeChoice))
    add_quantization_flags(p)
    rounded = "what activations are rounded to in products of quantised weights on a CPU (auto: int16)"
    p.add_argument("--activation-dtype", choices=get_args(Activations), help=rounded)
    p.add_argument("--data-parallel-size", type=integer, metavar="N")
    p.add_argument("--expert-parallel-size", type=integer, metavar="N")
    p.add_argument("--tensor-parallel-size", type=integer, metavar="N")
    split = "sequences or heads over the expert ranks"
    p.add_argument("--attention", choices=get_args(AttentionSplit), help=split)
    p.add_argument("--moe-config", metavar="JSON|F.toml", help="how the MoE layers run")
    p.add_argument("--kv-cache-dtype", choices=get_args(KVCacheName), help="keys and values in one byte")
    p.add_argument("--kv-memory", type=size, metavar="SIZE", help="KV cache on each rank, e.g. 2GiB")


def add_hub_flags(p: Parser) -> None:
    """Adds the flags that say which files of the Hub a model has, and where they are kept."""
    p.add_argument("--revision", metavar="R", help="branch, tag or commit of a model of the Hub")
    p.add_argument("--download-dir", metavar="D", help="cache of models of the Hub (default: HF_HOME's)")


def add_quantization_flags(p: Parser) -> None:
    """Adds the flags that say how weights are quantised while they load."""
    methods, products = get_args(QuantizationName), get_args(QuantizedProducts)
    p.add_argument("--quantization", choices=methods, help="quantise a plain checkpoint while it loads")
    p.add_argument("--quantize", choices=products, help="what is quantised (default: all products)")


def add_chat_flags(p: Parser) -> None:
    """Adds the flags that say how a model chats."""
    p.add_argument("--chat-template", metavar="F.jinja", help="a chat template instead of the model's own")
    forms = "how the model writes calls: auto (from its template, the default), none, a name or a TOML file"
    p.add_argument("--tool-format", metavar="NAME|F.toml", help=forms)


def add_json_flag(p: Parser) -> None:
    p.add_argument("--json", action="store_true", help="print one JSON object")


def reasons_of(text: str) -> tuple[str, ...]:
    """Returns a comma-separated list of a text; it is a flag's type. "none" is an empty list."""
    return () if text == "none" else tuple(text.split(","))


def add_serve_flags(p: Parser) -> None:
    """Adds the flags that only ``serve`` has."""
    p.add_argument("--config", type=Path, metavar="F.toml", help="the same flags in a file; flags win")
    p.add_argument("--host")
    p.add_argument("--port", type=integer)
    names = "the names that requests may use; the first is that of answers to requests without one"
    p.add_argument("--served-model-name", metavar="N", nargs="+", help=names)
    p.add_argument("--api-key", metavar="K")
    add_chat_flags(p)
    origins = "web pages whose scripts may use the server, e.g. https://chat.example.org; * for all"
    p.add_argument("--allowed-origins", metavar="O", nargs="+", help=origins)
    p.add_argument(
        "--response-store",
        action=argparse.BooleanOptionalAction,
        help="answers of /v1/responses stay in memory for later requests (the default)",
    )
    p.add_argument("--keep-alive", type=integer, metavar="S", help="how long an idle connection stays open")
    p.add_argument("--max-queue", type=integer, metavar="N", help="waiting requests at most")
    p.add_argument("--shutdown-timeout", type=number, metavar="S")
    p.add_argument("--request-timeout", type=number, metavar="S", help="longest time to a whole answer")
    p.add_argument("--log-format", choices=["text", "json"], help="json: one object a line")
    p.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    p.add_argument("--otlp-traces-endpoint", metavar="URL", help="where spans go (needs the otel extra)")
    p.add_argument("--max-num-seqs", type=integer, metavar="N", help="most requests decoded together")
    p.add_argument(
        "--max-num-batched-tokens",
        type=integer,
        metavar="N",
        help="tokens of a step, of both kinds",
    )
    p.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="prompts that begin alike share KV pages (the default)",
    )
    reasons = "what says which rank a request goes to, the first one first (prefix,experts,load)"
    p.add_argument("--dispatch", type=reasons_of, metavar="R,...", help=reasons)
    p.add_argument(
        "--nnodes", type=integer, metavar="N", help="processes that serve together, e.g. one a machine"
    )
    p.add_argument(
        "--node-rank", type=integer, metavar="R", help="this one's number; 0 schedules and serves HTTP"
    )
    p.add_argument("--dist-init-addr", metavar="HOST:PORT", help="where process 0 waits for the others")


def read_serve_config(path: Path) -> dict[str, Any]:
    """Reads a ``--config`` file: the flags' names with underscores, and ``[moe]`` tables.

    Each value must have the type that the setting of its name declares; a ValueError names file and key.
    """
    from jmoe.config.moe import MoEConfig
    from jmoe.config.reading import check_keys, hints, named, read_toml, typed
    from jmoe.engine.deployment.settings import EngineSettings
    from jmoe.engine.processes.nodes import Nodes
    from jmoe.server.settings import ServerSettings
    from jmoe.server.watch.logs import Format, Level

    values = read_toml(path)
    kinds = hints(EngineSettings) | hints(ServerSettings) | hints(Nodes)
    kinds |= {"log_format": Format, "log_level": Level, "model": str, "otlp_traces_endpoint": str}
    kinds |= {"revision": str, "download_dir": str}
    flags = Parser(argument_default=argparse.SUPPRESS)
    add_model_flags(flags)
    add_serve_flags(flags)
    known = {action.dest for action in flags._actions} - {"help", "config", "moe_config"}
    with named(path):
        moe = values.pop("moe", None)
        check_keys("serve", values, sorted(known))
        values = {key: typed(key, value, kinds[key]) for key, value in values.items()}
        if moe is not None:
            MoEConfig.from_dict(moe)
            values["moe_config"] = moe
    return values


def settings_from(values: dict[str, Any]) -> "EngineSettings":
    """Makes the engine settings from parsed flags, and switches the compilation cache on."""
    import dataclasses

    from jmoe_kernels.cache import usable, user_cache

    from jmoe.config.moe import MoEConfig
    from jmoe.engine.deployment.room import check_start
    from jmoe.engine.deployment.settings import EngineSettings
    from jmoe.engine.step.compilation_cache import use_compilation_cache

    check_start()
    use_compilation_cache(usable(user_cache() / "xla"))
    known = {f.name for f in dataclasses.fields(EngineSettings)}
    fields = {key: value for key, value in values.items() if key in known}
    moe = values.get("moe_config")
    if isinstance(moe, str):
        fields["moe"] = MoEConfig.from_text(moe)
    elif moe is not None:
        fields["moe"] = MoEConfig.from_dict(moe)
    return EngineSettings(**fields)


def found_model(values: dict[str, Any], *, weights: bool = True) -> "FoundModel":
    """Returns the files of the model that the parsed flags name; one of the Hub is fetched first. Call it
    after ``settings_from``: a bad setting is then reported before a long download.

    weights: see ``find_model``.
    """
    from jmoe.engine.deployment.found import find_model

    model, revision = values.get("model", "tiny"), values.get("revision")
    return find_model(model, revision, values.get("download_dir"), weights=weights)


def given_settings(values: dict[str, Any]) -> str:
    """Returns the settings from the command line and the file as text for the log, with the API key
    hidden."""
    shown = {k: v for k, v in values.items() if k not in ("command", "run", "config")}
    if "api_key" in shown:
        shown["api_key"] = "***"
    return ", ".join(f"{name}={value}" for name, value in sorted(shown.items())) or "none"
