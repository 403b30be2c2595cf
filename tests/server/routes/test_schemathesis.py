"""The examples, coverage and fuzzing phases of schemathesis find no fault in the server."""

import subprocess
import sys

import pytest
from support.server.fake_engine import TEMPLATE, ByteCodec, FakeEngine, listening

from jmoe.server.request.conversation.chat_model import chat_model
from jmoe.server.template.chat_template import ChatTemplate

CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance"
RUN = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"


@pytest.mark.matrix
@pytest.mark.parametrize("key", [None, "secret"])
def test_schemathesis_finds_nothing(key, tmp_path):
    with listening(FakeEngine(ByteCodec(), max_model_len=512), api_key=key) as (url, server):
        server.service.chat = chat_model(ChatTemplate(TEMPLATE, {}), server.service.facts, "auto")
        command = [sys.executable, "-c", RUN, "run", f"{url}/openapi.json", "--checks", CHECKS, "--seed", "1"]
        command += ["--phases", "examples,coverage,fuzzing", "-n", "20", "--max-time", "20", "--no-color"]
        command += ["-H", f"Authorization: Bearer {key}"] if key else []
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "Operations:       21 selected / 21 total" in result.stdout and "passed" in result.stdout
