"""The dialects in which models write calls of functions: from text to events, and the grammars of answers.

A ``dialect.Dialect`` is what a request uses: a format over the model's tokenizer, or ``json_call`` for models
without a format. ``formats`` is the table of formats (``format`` declares one, ``files`` and
``response_template`` read further ones); ``marks`` finds a format's markers in a tokenizer. ``reader`` reads
an answer in any format into the events of ``events``; ``grammars`` writes the grammar of an answer.
"""
