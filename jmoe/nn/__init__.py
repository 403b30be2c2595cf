"""Parts of a decoder other than its experts: norms, rotary embedding, dense MLP, attention and its cache.

``attention`` is the base of ``grouped_query`` and ``latent``. It writes keys and values to the paged cache
and reads them through the page tables (``jmoe_kernels.paged_attention``). With attention ``tp`` it gathers
its tokens first and scatters the sums afterwards.
"""
