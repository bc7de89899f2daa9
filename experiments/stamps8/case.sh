#!/bin/sh
# The whole case: study, int8 file, speed, price, and the page for those who decide. Runs go to runs/, or KD_RUNS.
set -ex
HERE=$(dirname "$0")
RUN=${KD_RUNS:-runs}/study_stamps8/soft/seed0

python "$HERE/weights.py"
kd study stamps8 "$@"
rm -rf "$RUN/export" # of a run of this script before
kd export "$RUN" quantize=static weights=last
kd bench "$RUN" against=teacher backends=onnx,int8 batch_sizes=1 rounds=20 out="$RUN/bench.json"
# images a second by ONNX Runtime, one at a time, as measured just now
RATES=$(python - "$RUN/bench.json" <<'PYTHON'
import json, sys
(speed,) = [s for s in json.load(open(sys.argv[1]))["speeds"] if (s["backend"], s["batch_size"]) == ("onnx", 1)]
print(*(f"{who.partition(':')[0]}.requests_per_second={rate:.0f}" for who, rate in speed["throughput"].items()))
PYTHON
)
kd cost "$HERE/prices.yaml" $RATES
kd decide "$RUN" page="$RUN/decision.html" cost="$HERE/prices.yaml" $RATES
