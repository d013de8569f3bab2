#!/usr/bin/env bash
# BERT-base with absolute positions, made relative on the questions and contexts of SQuAD 1.1, then trained on them.
# MODEL: any other BERT. Further flags go to run_squad.py and win over those below. NPROC_PER_NODE: processes, one a GPU (8).
# Add --text_file or --text_dataset_name to the first command where there is more text of the model's language.
set -euo pipefail
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
scripts="$(dirname "${BASH_SOURCE[0]}")"
torchrun --nproc_per_node="$NPROC_PER_NODE" "$scripts/make_relative.py" "${MODEL:-google-bert/bert-base-uncased}" \
    --dataset_name squad \
    --position_embedding_type relative_key_query \
    --num_train_epochs 1 \
    --output_dir made_relative
torchrun --nproc_per_node="$NPROC_PER_NODE" "$scripts/../run_squad.py" \
    --model_name_or_path made_relative \
    --dataset_name squad \
    --do_train \
    --do_eval \
    --learning_rate 3e-5 \
    --num_train_epochs 2 \
    --max_seq_length 384 \
    --doc_stride 128 \
    --output_dir made_relative_squad \
    --per_device_eval_batch_size=60 \
    --per_device_train_batch_size=6 \
    "$@"
