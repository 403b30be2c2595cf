"""The steps by which a reader follows an answer: ``scanner`` waits for text, ``arguments`` reads a call's
arguments in each encoding, ``declared`` says what a raw text means by the function's schema.
"""
