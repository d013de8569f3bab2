#!/usr/bin/env bash
# BERT-large, whole-word masking, with relative positions (relative_key_query) on SQuAD 1.1; published with 8 GPUs:
# f1 93.52. Further flags go to run_squad.py and win over those below. NPROC_PER_NODE: processes, one a GPU (8).
set -euo pipefail
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-$(seq -s , 0 $((NPROC_PER_NODE - 1)))}"
torchrun --nproc_per_node="$NPROC_PER_NODE" "$(dirname "${BASH_SOURCE[0]}")/../run_squad.py" \
    --model_name_or_path zhiheng-huang/bert-large-uncased-whole-word-masking-embedding-relative-key-query \
    --dataset_name squad \
    --do_train \
    --do_eval \
    --learning_rate 3e-5 \
    --num_train_epochs 2 \
    --max_seq_length 512 \
    --doc_stride 128 \
    --output_dir relative_squad \
    --per_device_eval_batch_size=6 \
    --per_device_train_batch_size=2 \
    --gradient_accumulation_steps 3 \
    "$@"
