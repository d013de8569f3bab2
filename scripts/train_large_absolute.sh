#!/usr/bin/env bash
# BERT-large, whole-word masking, with absolute positions on SQuAD 1.1; published with 8 GPUs: exact 86.91, f1 93.15.
# Further flags go to run_squad.py and win over those below. NPROC_PER_NODE: processes, one a GPU (8).
set -euo pipefail
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
torchrun --nproc_per_node="$NPROC_PER_NODE" "$(dirname "${BASH_SOURCE[0]}")/../run_squad.py" \
    --model_name_or_path google-bert/bert-large-uncased-whole-word-masking \
    --dataset_name squad \
    --do_train \
    --do_eval \
    --learning_rate 3e-5 \
    --num_train_epochs 2 \
    --max_seq_length 384 \
    --doc_stride 128 \
    --output_dir ./examples/models/wwm_uncased_finetuned_squad/ \
    --per_device_eval_batch_size=3   \
    --per_device_train_batch_size=3   \
    "$@"
