#!/usr/bin/env bash
# BERT-base with absolute positions on contracts: CUAD's train_separate_questions.json and test.json, here in this folder.
# Further flags go to run_squad.py and win over those below. NPROC_PER_NODE: processes, one a GPU (8).
# A clause is an answer of many tokens, and stands in a few of a contract's fifty windows: hence the long answers, and a
# twentieth of the windows without one, which still are the most.
set -euo pipefail
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
torchrun --nproc_per_node="$NPROC_PER_NODE" "$(dirname "${BASH_SOURCE[0]}")/../run_squad.py" \
    --model_name_or_path google-bert/bert-base-uncased \
    --train_file train_separate_questions.json \
    --validation_file test.json \
    --version_2_with_negative \
    --negative_windows 0.05 \
    --do_train \
    --do_eval \
    --learning_rate 3e-5 \
    --num_train_epochs 3 \
    --max_seq_length 512 \
    --doc_stride 256 \
    --max_answer_length 250 \
    --output_dir contracts \
    --per_device_eval_batch_size=32 \
    --per_device_train_batch_size=6 \
    "$@"
