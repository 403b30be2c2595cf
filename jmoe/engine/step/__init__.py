"""One step on the device: its inputs, the compiled functions, the runner, the results.

``fill`` writes the plan into plain host arrays (``inputs.StepInput``). A prompt takes rows of 64 tokens (256
on a GPU), a long one several rows, so that a few compiled shapes serve any mix. ``Runner.run`` starts the one
compiled step (``functions``): it reads the tokens that the last step sampled from the device, by the
request's seat, runs the decoder, and samples the next tokens from the last positions' logits (``sampling``),
with each row's biases and grammar mask, by the row's own seed and position. ``counters`` keeps what the
experts did on the device. ``results`` fetches the results of a step; ``answers`` turns them into increments.
``windows`` computes whole windows without pages.
"""
