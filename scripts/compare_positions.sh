#!/usr/bin/env bash
# Trains the three position types on the toy SQuAD at the same budget, and compares them: a table of f1, and a picture
# of f1 over steps. A seed decides the paragraphs, the first weights and the order of training. Then asks the trained
# models about longer texts, which they read in windows of the length they were trained in and, with relative positions,
# in one long window: another table and picture. About 40 minutes on 2 cores; a comparison that was interrupted goes
# on with the same command.
#
#   bash scripts/compare_positions.sh [OUTPUT_DIR] [flags of run_squad.py]
#
# SEEDS: the seeds ("0 1 2"). TRAIN_PARAGRAPHS: the size of the toy SQuAD (10000). TIMES: the lengths of the longer
# texts, in windows of training ("1 2 4 8 16"; "" leaves them out).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output_dir=compare_positions_output
if [[ $# -gt 0 && $1 != -* ]]; then
    output_dir="$1"
    shift
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

fail() {
    echo "compare_positions.sh: error: $1" >&2
    exit 2
}

python -c "import matplotlib" 2>/dev/null || fail "matplotlib is missing: python -m pip install matplotlib"
window=48 # tokens; the models have positions for no more
times="${TIMES-1 2 4 8 16}"
for factor in $times; do
    [[ $factor =~ ^[1-9][0-9]*$ ]] || fail "TIMES holds $factor: give whole numbers from 1, such as \"1 2 4\""
done

mkdir -p "$output_dir"
budget="$(printf '%s ' "TRAIN_PARAGRAPHS=${TRAIN_PARAGRAPHS:-10000}" "max_position_embeddings=$window" "$@")"
trained=("$output_dir"/seed-*/*/eval_results.json)
if [[ -f ${trained[0]} && $(cat "$output_dir/budget.txt") != "$budget" ]]; then
    fail "$output_dir holds a comparison with other flags: name another folder"
fi
printf '%s\n' "$budget" >"$output_dir/budget.txt"

# The scores of an evaluation are the last that it writes; --eval_strategy goes with flags such as early stopping's.
run_squad() { # output_dir, flags
    [[ -f $1/eval_results.json ]] || python "$root/run_squad.py" \
        --per_device_eval_batch_size 64 --doc_stride 24 --eval_strategy steps --eval_steps 200 --save_strategy no \
        --do_eval --output_dir "$@"
}

seeds="${SEEDS:-0 1 2}"
for seed in $seeds; do
    toy_squad="$output_dir/seed-$seed/toy_squad_${TRAIN_PARAGRAPHS:-10000}"
    lengths="$(for factor in $times; do echo $((factor * window)); done)"
    needed="relative_key_query/tokenizer_config.json $(for length in $lengths; do echo "validation_$length.json"; done)"
    # shellcheck disable=SC2086
    if ! (cd "$toy_squad" && ls $needed) &>/dev/null; then
        python "$root/scripts/make_toy_squad.py" "$toy_squad" --seed "$seed" \
            --train_paragraphs "${TRAIN_PARAGRAPHS:-10000}" --max_position_embeddings "$window" \
            ${lengths:+--validation_lengths $lengths}
    fi
    for position_type in absolute relative_key relative_key_query; do
        run="$output_dir/seed-$seed/$position_type"
        run_squad "$run" \
            --model_name_or_path "$toy_squad/$position_type" \
            --train_file "$toy_squad/train.json" \
            --validation_file "$toy_squad/validation.json" \
            --do_train \
            --num_train_epochs 1 \
            --per_device_train_batch_size 32 \
            --learning_rate 7e-4 \
            --warmup_steps 0.05 \
            --lr_scheduler_type constant_with_warmup \
            --adam_beta2 0.98 \
            --train_sampling_strategy random \
            --max_seq_length "$window" \
            --logging_steps 200 \
            --seed "$seed" \
            "$@"
        for factor in $times; do
            asked=("$@" --push_to_hub False --model_name_or_path "$run"
                --validation_file "$toy_squad/validation_$((factor * window)).json")
            run_squad "$run/texts_x$factor/windows" "${asked[@]}" --max_seq_length "$window"
            if [[ $factor != 1 && $position_type != absolute ]]; then # which has positions for one window only
                run_squad "$run/texts_x$factor/one_window" "${asked[@]}" --max_seq_length $((factor * window))
            fi
        done
    done
done
# shellcheck disable=SC2086
python "$root/scripts/compare_positions.py" "$output_dir" $seeds ${times:+--times $times}
