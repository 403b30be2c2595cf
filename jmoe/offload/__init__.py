"""Experts in host memory: a cache of some of them on the device, filled ahead of time.

A layer visits a cache that goes from step to step (``cache``: ``Visit``, ``ExpertCache``). What the router
says refreshes a predictor's forecast of the next layers (``predictors``). The slot table (``table``;
``slots`` and ``policy`` decide, in numpy or jax alike) pins what the layer needs, copies what is missing into
slots of the pool (``copies``) and begins copies of what the forecast wants most. Then the pool's experts run
by slot instead of by id. Experts that got no slot, and in prefill all that the pool lacks, stream through a
buffer. The host has every layer's experts in two stacks. With ``executor = "host"`` the same decisions are
taken in numpy between the compiled halves of each layer (``jmoe.engine.offload.host_runner``), on one device.
"""
