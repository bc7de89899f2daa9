#!/usr/bin/env bash
# The pilot: rates of each loss on Austen's validation, with a seed that is not the study's. After
# kd study lm_divergences --only 'austen_tuned,austen_start'; ten minutes on one core. With the argument austen_start: of the
# network as it was cut
set -eu
runs=${KD_RUNS:-runs}
start=$runs/study_lm_divergences/${1:-austen_tuned}/seed0/last
common=(data=lm data.root="$(realpath "$runs")/lm_texts" data.train=austen.train.txt data.val=austen.held.txt data.test_fraction=0.8
  data.length=129 data.tokenizer="$start" task=causal_lm model@student=transformers student.model.name="$start"
  recipe=adamw_linear recipe.batch_size=4 recipe.steps=120 recipe.warmup=12 protocol.val_every=null protocol.val_every_steps=120
  hardware=cpu hardware.threads=1 hydra.launcher.n_jobs=1
  recipe.optimizer.lr=2e-3,4e-3,8e-3 seed=100)
kept="teacher.answers={_target_: kd.distill.cache.CachedAnswers, what: hidden, path: $runs/lm_answers/austen_hidden}"
kd train -m "${common[@]}" 'loss=[ce]'
kd train -m "${common[@]}" "$kept" 'loss=[kd]' loss.kd.temperature=1
kd train -m "${common[@]}" "$kept" 'loss=[rkl],[jsd],[skl],[srkl]'
