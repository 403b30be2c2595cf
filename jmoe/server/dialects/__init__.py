"""The dialects in which models write calls of functions: from text to events, and the grammars of answers.

``formats`` is the table of formats (``format`` declares one); ``reader`` reads an answer in any of them, with
the steps of ``scanner`` and ``arguments``, and ``events`` declares what it finds.
"""
