"""One step on the device: its inputs, the compiled functions, the runner, the results.

``fill`` writes the plan into plain host arrays (``inputs.StepInput``). A prompt takes rows of 64 tokens (256
on a GPU), a long one several rows, so that a few compiled shapes serve any mix. ``Runner.run`` starts the one
compiled step (``functions``): it reads the tokens that the last step sampled from the device, by the
request's seat, runs the decoder, and samples the next tokens from the last positions' logits (``sampling``),
with each row's biases, grammar mask and penalties (``penalties`` has their counts), by the row's own seed and
position. ``counters`` keeps what the
experts did on the device. ``results`` fetches the results of a step; ``answers`` turns them into increments.
``windows`` computes whole windows without pages.

Axes: as in ``jmoe.moe.types``, except for these:

B  rows of a batch (windows of text in ``windows``), or tokens to sample
T  tokens of a row
R  ranks, and N columns, of the grid of ``Sequences``; elsewhere N is any number of tokens, or of chunks
S  seats of requests
V  ids of the vocabulary
W  words of a bit mask over the vocabulary
A  likeliest tokens
X  biases of a row
Y  pairs of tokens that a row may not have
M  pages of a page table, or picked positions; in ``counters``, means
L  layers with experts
P  pages of the KV cache
C  positions of a chunk; in ``counters``, counters
"""
