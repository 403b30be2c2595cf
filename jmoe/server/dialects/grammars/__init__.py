"""The grammars of answers that may call functions: ``schemas`` prepares the functions, ``calls`` writes the
answer, ``values`` its arguments, ``harmony`` the answers of gpt-oss.
"""
