"""Chooses the requests of the next step, and shares out the pages. Host code without jax.

A step is one token of every request that decodes and, on each rank, the next tokens of prompts, as many as
the token budget leaves (``Scheduler.next_step``). Requests are admitted first come, first served.
``admission`` chooses the rank: the one whose pages hold the request's beginning, or the one with most of its
experts, or the one with room. Pages are allocated as they are needed. If none is free, the request that came
last is preempted: its pages are freed and it runs again later. ``page_names`` names a page by the hash of all
tokens up to its end and of what else it depends on, so that requests with equal beginnings find each other's
pages (``pages``); a page that another request still writes is copied first. Prompts of one step share pages
too, because a layer writes the keys of all tokens before it reads any. If a request's logits are NaN, the
names of its pages are removed with it.
"""
