"""Experts in host memory: a cache of some of them on the device, filled ahead of time.

Each layer visits a cache that is kept from step to step (``cache``: ``Visit``, ``ExpertCache``). The router's
scores refresh a predictor's forecast of the next layers (``predictors``). The slot table (``slot_table``;
``slots`` and ``policy`` decide, in numpy or jax alike) pins the experts that the layer needs, copies missing
ones into slots of the pool (``copies``) and begins copies of those that the forecast wants most. Then the
pool's experts run by slot instead of by id. Experts that got no slot, and in prefill all that the pool lacks,
stream through a buffer. The host has every layer's experts in two stacks. With ``executor = "host"`` the same
decisions are made in numpy between the compiled halves of each layer (``jmoe.engine.offload.host_runner``),
on one device.
"""
