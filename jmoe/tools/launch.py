"""``jmoe launch``: coding agents, each with the variables and words that lead it to a server."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

NO_KEY = "none"  # agents want a key, also where the server does not


@dataclass(frozen=True)
class Target:
    """A server and its model.

    url: address, without ``/v1``.
    model: name of the model.
    context: limit on the tokens of prompt and answer; None = not known.
    api_key: key of the server; None = it needs none.
    """

    url: str
    model: str
    context: int | None = None
    api_key: str | None = None

    @property
    def key(self) -> str:
        return self.api_key or NO_KEY


@dataclass(frozen=True)
class Agent:
    """A program that talks to a server.

    title: its name, for people.
    program: its name on PATH.
    page: page that tells how to install it.
    route: route of the server that it uses.
    variables: function that returns the variables which it needs.
    words: function that returns the words before the user's own.
    removed: variables that would lead it elsewhere.
    """

    title: str
    program: str
    page: str
    route: str
    variables: Callable[[Target], dict[str, str]]
    words: Callable[[Target], list[str]]
    removed: tuple[str, ...] = ()


def _claude_variables(target: Target) -> dict[str, str]:
    models = ("MODEL", "SMALL_FAST_MODEL", *(f"DEFAULT_{name}_MODEL" for name in ("OPUS", "SONNET", "HAIKU")))
    return {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        **{f"ANTHROPIC_{name}": target.model for name in models},
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
    }


def _codex_words(target: Target) -> list[str]:
    provider = "model_providers.jmoe"
    settings: dict[str, str | int] = {
        "model": target.model,
        "model_provider": "jmoe",
        f"{provider}.name": "jmoe",
        f"{provider}.base_url": f"{target.url}/v1",
        f"{provider}.wire_api": "responses",
        f"{provider}.env_key": "JMOE_API_KEY",
    }
    if target.context is not None:
        settings["model_context_window"] = target.context
    return [word for key, value in settings.items() for word in ("-c", f"{key}={json.dumps(value)}")]


def _opencode_config(target: Target) -> str:
    limit = {} if target.context is None else {"limit": {"context": target.context, "output": target.context}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "jmoe",
        "options": {"baseURL": f"{target.url}/v1", "apiKey": target.key},
        "models": {target.model: {"name": target.model, **limit}},
    }
    name = f"jmoe/{target.model}"
    return json.dumps(
        {"provider": {"jmoe": provider}, "model": name, "small_model": name, "autoupdate": False}
    )


AGENTS = {
    "claude": Agent(
        "Claude Code", "claude", "https://code.claude.com/docs", "/v1/messages", _claude_variables,
        lambda target: [], removed=("ANTHROPIC_API_KEY",),
    ),
    "codex": Agent(
        "Codex", "codex", "https://developers.openai.com/codex/cli", "/v1/responses",
        lambda target: {"JMOE_API_KEY": target.key}, _codex_words,
    ),
    "opencode": Agent(
        "opencode", "opencode", "https://opencode.ai/docs", "/v1/chat/completions",
        lambda target: {"OPENCODE_CONFIG_CONTENT": _opencode_config(target)}, lambda target: [],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """An agent as it is run.

    words: the program and its arguments.
    variables: variables that it gets.
    removed: variables that it does not get.
    """

    words: tuple[str, ...]
    variables: Mapping[str, str]
    removed: tuple[str, ...]

    def shell(self) -> str:
        """Returns lines for a shell that do the same."""
        lines = [f"unset {name}" for name in self.removed]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return "\n".join([*lines, shlex.join(self.words)])

    def told(self, secret: str | None) -> list[str]:
        """Returns a line for each variable, and one for the command; the key is hidden."""
        lines = [f"{name} is not passed on" for name in self.removed]
        lines += [f"{name}={value}" for name, value in self.variables.items()]
        lines.append(shlex.join(self.words))
        return [line if secret is None else line.replace(secret, "***") for line in lines]

    def run(self) -> int:
        """Runs the agent with this terminal; returns its exit code. Ctrl-C is the agent's."""
        import subprocess  # not for ``--help``, which needs the table alone

        own = {name: value for name, value in os.environ.items() if name not in self.removed}
        with subprocess.Popen(self.words, env=own | dict(self.variables)) as process:
            while True:
                try:
                    code = process.wait()
                    return code if code >= 0 else 128 - code
                except KeyboardInterrupt:
                    continue


def launch_of(agent: Agent, target: Target, words: Sequence[str]) -> Launch:
    """Returns the agent's command against a server.

    words: the user's own words for the agent.
    """
    removed = tuple(name for name in agent.removed if name in os.environ)
    return Launch((agent.program, *agent.words(target), *words), agent.variables(target), removed)


def check_installed(agent: Agent) -> None:
    """Raises ValueError if the agent is not on PATH."""
    if shutil.which(agent.program) is None:
        raise ValueError(f"{agent.program} is not on PATH; {agent.page} tells how to install {agent.title}")
