"""Compares forms of the low-bit key index and sizes of stage 1 by the error of attention's output at equal bytes.

A model reads a piece of each text, from its middle, in one forward pass.
The queries, keys and values of some layers are kept on disk.
For each prefix, stage 1 keeps the tokens to which the prefix's last queries attend.
Each form then chooses, for some of the next 256 tokens, the tokens to attend to.
A form is given the same bytes at each of these steps: a budget of t tokens is `t * 2 * head_dim` elements of 16 bits a
KV head.
What a form reads to score is counted in full: codes, steps, zeros and the 16-bit keys of the last group while that
group is not full. The remaining bytes are spent on tokens to attend to.
The error is the distance from full attention's output relative to that output's norm, the mean over heads, steps and
layers.
"Above the oracle" is the error less that of the exact top-k of t tokens out of all, whose scoring is not counted,
divided by the same difference of the published method: the mean over prefixes and texts, and the worst.
Keys and values are bfloat16 numbers; arithmetic is float32.

    .venv/bin/python -m studies.lowbit_forms persuasion.txt northanger_abbey.txt --cache build/forms --json forms.json

The study takes half an hour on one core; `--axes` takes less.
The axis "size" ends with a fit of stage 1's size, on the first text at all lengths but the last, checked on everything
else.
"""
