#!/bin/sh
# The whole case: the questions, the teacher, the API's labels, the study, the int8 file, speed, price, and the page for
# those who decide. Runs go to runs/, or KD_RUNS.
set -ex
HERE=$(dirname "$0")
RUNS=${KD_RUNS:-runs}
RUN=$RUNS/study_customer_service/soft_3/seed0

python "$HERE/../many_classes/encoder.py"
python "$HERE/questions.py"
kd study customer_service --only teacher "$@"
python "$HERE/flagship.py" "$RUNS/study_customer_service/teacher/seed0"
kd study customer_service "$@"
rm -rf "$RUN/export" # of a run of this script before
kd export "$RUN" quantize=dynamic weights=last
kd bench "$RUN" against=teacher backends=onnx,int8 batch_sizes=1 length=16 rounds=20 out="$RUN/bench.json"
kd cost customer_service
kd decide "$RUN" page="$RUN/decision.html" cost=customer_service slices=[length]
