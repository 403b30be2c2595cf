"""GGUF files as models: sizes, names, numbers and the tokenizer come from the file's own metadata.

``file`` reads a header, ``checkpoint`` opens a model of one or several files, ``config`` makes the values
that ``config.json`` would have, ``names`` finds the tensor of each parameter, ``blocks`` unpacks the numbers,
and ``tokenizer`` makes the files of a tokenizer.
"""
