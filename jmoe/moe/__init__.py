"""One MoE layer, inside one ``shard_map``.

The router (``routing``) gives each token its experts, and gives the techniques a distribution over all
experts and an order of preference (``Routing``). In a decode step with binning, ``bin_assignments`` moves the
assignments that a batch wants least to experts that other tokens want. With a capacity, ``limit`` cuts or
moves what is over it. ``decide`` runs the router and these stages in order. A transport brings the rows to
the ranks that hold the experts; there ``plan_dispatch`` sorts them by expert and ``ExpertMath`` runs them
through ``jmoe_kernels.grouped_mlp``, which reads the weights of experts with rows only. The weighted sum
returns to the token, and the counts (``DispatchStats``) with it.

With ``[moe.shuffle] tokens``, a layer first guesses which rank each token's experts are on (``orders``). The
reduce-scatter after attention deals the rows out in that order, and the residuals of tokens whose rank
changes move with them (``shuffle``). The rows keep this order until the next layer's attention gathers them;
after the last layer they return to their original ranks. With ``[moe.offload]`` the experts come from
``jmoe.offload``.
"""
