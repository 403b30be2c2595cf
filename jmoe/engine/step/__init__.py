"""One step on the device: its inputs, the compiled functions, the runner, what comes back.

``fill`` writes the plan into plain host arrays (``inputs.StepInput``). A prompt takes rows of 64 tokens, a
long one several, so that a handful of compiled shapes serves any mix. ``Runner.run`` starts the one compiled
step (``functions``): it takes the tokens that the last step drew from the device, by the request's seat, runs
the decoder, and draws the next tokens from the last positions' logits (``sampling``), with each row's biases
and grammar mask, by the row's own seed and position. ``counters`` keeps what the experts did on the device.
``started`` and ``scores`` fetch what a step gives; ``answers`` turns it into increments.
"""
