#!/usr/bin/env bash
# Requests that an operator sends by hand.  curl.sh BASE MODEL
set -euo pipefail
base=$1 model=$2
fail() { echo "curl: $*"; exit 1; }
status() { curl -s -o /dev/null -w '%{http_code}' "$@"; }
json='Content-Type: application/json'

for path in /live /ready /health /ping /version /metrics /openapi.json /moe/stats /v1/models "/v1/models/$model"; do
  [ "$(status "$base$path")" = 200 ] || fail "GET $path is not 200"
done
for path in /health /metrics /v1/models; do
  [ "$(status -I "$base$path")" = 200 ] || fail "HEAD $path is not 200"
done
body="{\"model\": \"$model\", \"prompt\": \"Once\", \"max_tokens\": 4, \"stream\": true}"
stream=$(curl -sN "$base/v1/completions" -H "$json" -d "$body")
[ "$(tail -2 <<< "$stream" | head -1)" = "data: [DONE]" ] || [ "$(tail -1 <<< "$stream")" = "data: [DONE]" ] ||
  fail "the stream does not end with [DONE]"
[ "$(status "$base/v1/completions" -d "$body")" = 415 ] || fail "a form is not refused with 415"
[ "$(status "$base/v1/completions" -H "$json" -d '{')" = 400 ] || fail "half a body is not refused with 400"
[ "$(status "$base/v1/completions")" = 405 ] || fail "GET /v1/completions is not 405"
[ "$(status "$base/nowhere")" = 404 ] || fail "GET /nowhere is not 404"
printf '{"model": "%s", "prompt": "%s", "max_tokens": 1}' "$model" "$(printf 'a%.0s' $(seq 3000))" |
  curl -s -o /dev/null -H "$json" -H 'Transfer-Encoding: chunked' --data-binary @- "$base/v1/completions" ||
  fail "a chunked body is not answered"
echo "health, models, metrics, a stream, and five refusals are as they should be"
