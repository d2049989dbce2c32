#!/usr/bin/env bash
# From a fine-tune to an adapter that others download and serve, every step by a command.
#
#     examples/tutorial.sh [BASE TUNED]
#
# BASE and TUNED are folders or Hub ids; without them `flora demo` trains a small pair on this machine first, which takes
# under three minutes. The adapter is published in a folder, or on the Hugging Face Hub with ADDRESS=you/some-name, once
# you have logged in (`hf auth login`). Everything else stays in ./tutorial.
set -euo pipefail
command -v flora curl >/dev/null || { echo "this needs flora and curl on the PATH" >&2; exit 1; }
mkdir -p tutorial
export FLORA_HOME=$PWD/tutorial/home
ADDRESS=${ADDRESS:-./tutorial/shared/caesar}
PORT=${PORT:-8000}
PROMPT=${PROMPT:-caesar:planet=}

say() { printf '\n## %s\n' "$*"; }

if [ $# -eq 2 ]; then
    BASE=$1 TUNED=$2
else
    say "train a base and three fine-tunes of it"
    # --8<-- [start:train]
    flora demo --out tutorial/demo
    BASE=tutorial/demo/cipher-base TUNED=tutorial/demo/caesar
    # --8<-- [end:train]
fi

say "extract the fine-tune's change as an adapter"
# --8<-- [start:extract]
flora extract "$BASE" "$TUNED" --rank 64 --name caesar
# --8<-- [end:extract]

say "prove what it keeps, from both checkpoints"
# --8<-- [start:verify]
flora verify "$BASE" "$TUNED" caesar -q
# --8<-- [end:verify]

say "publish it"
# --8<-- [start:push]
flora push caesar "$ADDRESS"
# --8<-- [end:push]

say "take it into another registry, as on another machine"
# --8<-- [start:pull]
export FLORA_REGISTRY_URL=$PWD/tutorial/elsewhere
flora pull "$ADDRESS" --name caesar
# --8<-- [end:pull]

say "serve it there, with the base that it belongs to"
# --8<-- [start:serve]
flora serve "$BASE" --port "$PORT" &
server=$!
trap 'kill $server; wait $server' EXIT
export FLORA_SERVER_URL=http://127.0.0.1:$PORT
until curl --silent --fail "$FLORA_SERVER_URL/health"; do
    kill -0 $server # it ended, if this fails
    sleep 0.2
done
# --8<-- [end:serve]

say "ask the base, then the adapter"
# --8<-- [start:ask]
base=$(flora ps -q | head -n 1)
flora run "$base" "$PROMPT" --max-tokens 8
flora run caesar "$PROMPT" --max-tokens 8
# --8<-- [end:ask]

say "make a smaller version; the server follows without a restart"
# --8<-- [start:deploy]
flora promote caesar@v1
flora prune caesar --energy 0.8
flora promote caesar@v2 --require "rank<=64" --reason "half the bytes"
flora run caesar "$PROMPT" --max-tokens 8
flora rollback caesar
# --8<-- [end:deploy]
