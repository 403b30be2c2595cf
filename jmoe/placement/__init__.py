"""The placement of experts on devices: Speculative MoE's offline half, in numpy alone.

``profile_builder`` counts which tokens choose which experts. ``group`` places experts by a ``profile`` so
that few activations leave their token's device (``objective``; ``coclustering`` is the solver, the methods
in ``baselines`` are compared with it). ``tabulate`` makes the ``tables`` that say where a token's
experts will be.
"""
