#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth, within a time; cut off anywhere it leaves valid rows, and the
# next call goes on from them.
#
#     benchmarks/gpu_session.sh ROWS [SECONDS]     ROWS: folder of the rows and of session.log; default 560 seconds
#     benchmarks/gpu_session.sh --list             the steps and what they take on an H100
#
# PYTHON          the interpreter (python3)           FLORA_COMMIT   where there is no git
# PYTEST_ADDOPTS  for the tests: "-n 8" where pytest-xdist is, since they compile most of the time
# REHEARSE=1      all of it so small that a CPU without a GPU goes through it; proves the road, and nothing of its speed
# STEPS="a b"     only these
# VLLM, SGLANG    folders that have vLLM, and SGLang's wheel unpacked: their kernels beside ours
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VLLM=${VLLM:-}
SGLANG=${SGLANG:-}
REHEARSE=${REHEARSE:-}
STEPS=${STEPS:-}
export PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:-}${PYTHONPATH:+:}$PWD
FLORA_COMMIT=${FLORA_COMMIT:-$(git describe --always --dirty=+ '--exclude=*' 2>/dev/null || echo unknown)}
export FLORA_COMMIT

# name: seconds on an H100, the most it may take, what it says
steps="
tests      170 300 the GPU tests: kernels, graphs, isolation, launches
gate        90 200 bf16 error against float32, PEFT's beside it; nothing is timed before it has passed
table      320 420 requests/s for 0, 5, 100, 1000, 2000 adapters; base beside adapters; all seven projections; leaks
latency     75 150 one stream: time per token, first token by where the adapter lies
kernels     90 200 shrink, expand, attention by graph replay; vLLM's and SGLang's kernels beside them where they are
served     150 260 a storm of loads; 256 clients over HTTP
paper     1150 1340 S-LoRA's list on its own shapes: S1, S2, merged, slots, early abort, capped, prefetch, clusters
peft        75 140 transformers and PEFT on the same trace
cost       110 200 2, 5, 20 fine-tunes of the 1B shape: checkpoints in turn, or adapters
invariant   95 160 what --batch-invariant costs
fp8        460 600 adapters in fp8: their own gate, the table, all seven projections, S-LoRA's shapes
after      160 260 LoRA after the base's products, not beside: one stream, 5 and 1,000 adapters
"

if [ "${1:-}" = --list ]; then
    echo "$steps" | sed '/^$/d'
    exit 0
fi
rows=${1:?"give a folder for the rows, or --list"}
budget=${2:-560}
mkdir -p "$rows"
rows=$(cd "$rows" && pwd)
log=$rows/session.log
touch "$log"
TMPDIR=$(mktemp -d)          # what a step that is cut off leaves behind lies in here
[ -w /dev/shm ] && GATE_DIR=$(mktemp -d -p /dev/shm) || GATE_DIR=$TMPDIR # 16 GB of weights: memory is quickest
export TMPDIR GATE_DIR
trap 'rm -rf "$TMPDIR" "$GATE_DIR"' EXIT

left() { echo $((budget - SECONDS)); }

bench() { "$PYTHON" -m flora bench "$@"; }

suite() { # NAME... : what is there of this commit is not repeated, so this is never marked as done
    local small=()
    [ -n "$REHEARSE" ] && small=(--small --device cpu)
    bench suite "$@" --out "$rows/suite.jsonl" --commit "$FLORA_COMMIT" --budget "$(left)s" ${small[@]+"${small[@]}"}
}

do_tests() {
    local marked=()
    [ -n "$REHEARSE" ] && marked=(-m gpu) # which are skipped, then
    "$PYTHON" -m pytest -q -p no:cacheprovider ${marked[@]+"${marked[@]}"} \
        tests/kernels/on_triton tests/serve/engine/test_cuda.py
}
do_gate() {
    local small=()
    [ -n "$REHEARSE" ] && small=(--shape tiny --device cpu --pool-gib 0.1)
    "$PYTHON" benchmarks/bench_gate.py --out "$rows/gate.jsonl" --scratch "$GATE_DIR" ${small[@]+"${small[@]}"}
}
do_table() { suite table base linear leak; } # one engine for all of them
do_latency() {
    local small=()
    [ -n "$REHEARSE" ] && small=(--shape tiny --device cpu --rank 4 --pool-gib 0.1 --host-gib 0.1 --loaders 0)
    "$PYTHON" benchmarks/bench_latency.py --out "$rows/latency.jsonl" ${small[@]+"${small[@]}"}
}
do_after() {
    local small=()
    [ -n "$REHEARSE" ] && small=(--shape tiny --device cpu --rank 4 --pool-gib 0.1 --host-gib 0.1 --loaders 0)
    "$PYTHON" benchmarks/bench_latency.py --beside-rows 0 --out "$rows/latency.jsonl" ${small[@]+"${small[@]}"} &&
        suite after
}
do_kernels() {
    [ -n "$REHEARSE" ] && return 0 # the interpreter takes minutes for them: bench_kernels.py --dry
    "$PYTHON" benchmarks/bench_kernels.py --out "$rows/kernels.jsonl" ${VLLM:+--vllm "$VLLM"} \
        ${SGLANG:+--sglang "$SGLANG"}
}
do_served() { suite storm && suite http; } # processes of their own: a server needs all of the GPU's memory
do_paper() { suite paper; }
do_peft() {
    local small=()
    [ -n "$REHEARSE" ] && small=(--shape tiny --device cpu --dtype float32 --requests 8 --lengths 4,9 --ranks 8,4)
    "$PYTHON" benchmarks/bench_peft.py --adapters 100 --seconds 45 --out "$rows/peft.jsonl" ${small[@]+"${small[@]}"}
}
do_cost() {
    local small=()
    [ -n "$REHEARSE" ] && small=(--shape tiny --device cpu --requests 8 --lengths 4,9 --ranks 4 --pool-gib 0.05
        --max-sequences 8 --loaders 0)
    "$PYTHON" benchmarks/bench_cost.py --fine-tunes 20,5,2 --out "$rows/cost.jsonl" ${small[@]+"${small[@]}"}
}
do_invariant() { suite invariant; }
do_fp8() {
    local small=()
    [ -n "$REHEARSE" ] && small=(--shape tiny --device cpu --pool-gib 0.1)
    "$PYTHON" benchmarks/bench_gate.py --adapter-dtype float8_e4m3fn --out "$rows/gate.jsonl" --scratch "$GATE_DIR" \
        ${small[@]+"${small[@]}"} && suite fp8
}

export -f do_tests do_gate do_table do_latency do_after do_kernels do_served do_paper do_peft do_cost do_invariant do_fp8
export -f suite bench left
export PYTHON REHEARSE VLLM SGLANG rows budget

run_step() { # NAME EXPECTED MOST
    local name=$1 expected=$2 most=$3 remaining
    if grep -qx "done $name $FLORA_COMMIT" "$log"; then
        return 0
    fi
    remaining=$(left)
    case $name in # of those whose rows come one by one: what fits is worth beginning
    table | served | paper) expected=70 ;;
    fp8) expected=150 ;;
    esac
    if [ -z "$REHEARSE" ] && [ "$remaining" -lt "$expected" ]; then
        echo "--- $name: $expected s are not left" | tee -a "$log"
        return 0
    fi
    [ "$remaining" -lt "$most" ] && most=$remaining
    [ "$most" -lt 1 ] && return 0
    local started=$SECONDS code
    echo "--- $name, at most $most s" | tee -a "$log"
    # a process group of its own, so that an end by time takes loaders and servers along; the budget is what is left
    budget=$most timeout --kill-after=20 "$most" bash -c "SECONDS=0; do_$name" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    echo "--- $name ended with $code after $((SECONDS - started)) s" | tee -a "$log"
    if [ "$code" -eq 0 ]; then
        case $name in
        table | after | served | paper | invariant | fp8) ;; # their own rows say what is there
        *) echo "done $name $FLORA_COMMIT" >>"$log" ;;
        esac
    fi
    return "$code"
}

while read -r name expected most _; do
    [ -z "$name" ] && continue
    [ -n "$STEPS" ] && [[ " $STEPS " != *" $name "* ]] && continue
    if [ "$name" != tests ] && [ "$name" != gate ] && ! grep -qx "done gate $FLORA_COMMIT" "$log"; then
        echo "--- $name: nothing is timed before the gate has passed on this code" | tee -a "$log"
        exit 1
    fi
    run_step "$name" "$expected" "$most" </dev/null
    rm -rf "${GATE_DIR:?}"/*
done <<<"$steps"

echo "--- claims" | tee -a "$log"
bench claims "$rows"/*.jsonl 2>&1 | tee -a "$log"
