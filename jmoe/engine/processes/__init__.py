"""Several processes as one engine: process 0 schedules, and all of them run its steps in the same order.

``rendezvous`` is process 0's only port, where the others join; ``channel`` carries the operations and their
host arrays; ``lockstep`` sends them (``Leader``) and repeats them (``follow``); ``nodes`` says which process
is which.
"""
