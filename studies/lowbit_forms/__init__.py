r"""Compares forms of the low-bit key index by the error of attention's output at equal bytes, on any model.

A model reads a piece of each text, from its middle, in one forward pass.
The queries, keys and values of some layers are kept on disk; layers with a sliding window are left out.
For each prefix, stage 1 keeps what the prefix's last queries looked at.
Each form then chooses, for some of the next 256 tokens, what to attend to.
The form "base" is today's default in 16 bits; every other form differs from it in what its name says.
A form is given the same bytes at each of these steps: a budget of t tokens is `t * 2 * head_dim` elements of 16 bits a
KV head.
What a form reads to score is counted in full: codes, steps, zeros, the spread of the channels and the 16-bit keys of
the last group while that group is not full. The remaining bytes are spent on tokens to attend to.
The error is the distance from full attention's output relative to that output's norm, the mean over heads, steps and
layers.
Keys and values are bfloat16 numbers; arithmetic is float32.

    .venv/bin/python -m studies.lowbit_forms northanger_abbey.txt persuasion.txt \
        --axes channels heads share pins bounds --out forms-smollm2.json.gz
    .venv/bin/python -m studies.lowbit_forms northanger_abbey.txt persuasion.txt --model gemma3-270m --layers 3 \
        --lengths 2048 4096 8192 --budgets 128 256 512 --axes channels heads share pins bounds --out forms-gemma.json.gz

These commands made the files in `benchmarks/results`; `python -m studies.lowbit_forms.study FILE` shows their tables.
With texts read before, the first takes 2 minutes of one core and the second 40 s; without `--axes` all forms run.
"""
