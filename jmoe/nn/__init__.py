"""Parts of a decoder outside of its experts: norms, rotary embedding, dense MLP, attention and its cache.

``attention`` is the frame that ``grouped_query`` and ``latent`` fill. It writes keys and values to the paged
cache and reads them through the page tables (``jmoe_kernels.paged_attention``). With attention ``tp`` it
gathers its tokens first and scatters the sums afterwards.
"""
